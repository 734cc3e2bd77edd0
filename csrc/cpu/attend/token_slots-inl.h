// Rotations of gathered tokens, each to the position of the slot that it came from.
#pragma once

#include <cstdint>

#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/task-inl.h"
#include "csrc/cpu/lanes-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Rotations of the 64 tokens of a gathered page, by pair: that of the page that a token came from times that of its
// offset in it.
inline void rotate_gathered(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                            int64_t page) {
  const int rotary_pairs = plan.p.keys.codec.rope.rotary_pairs;
  const int32_t* slots = gathered_slots(plan, task, page);
  for (int first = 0; first < kPageTokens; first += kVecLanes) {
    const float* base[kVecLanes];
    const float* offset[kVecLanes];
    for (int t = 0; t < kVecLanes; ++t) {
      const int64_t slot = slots[first + t] == kNoSlot ? 0 : slots[first + t];
      base[t] = plan.page_start(task.b, slot / kPageTokens);
      offset[t] = plan.angles.row_cos(static_cast<int>(slot % kPageTokens));
    }
    int i = 0;
    for (; i + kVecLanes <= rotary_pairs; i += kVecLanes) {
      F32 cosines[kVecLanes], sines[kVecLanes];
      for (int t = 0; t < kVecLanes; ++t) {
        const F32 a = load<F32>(base[t] + i), b = load<F32>(base[t] + rotary_pairs + i);
        const F32 c = load<F32>(offset[t] + i), d = load<F32>(offset[t] + rotary_pairs + i);
        cosines[t] = a * c - b * d;
        sines[t] = b * c + a * d;
      }
      transpose(cosines);
      transpose(sines);
      for (int j = 0; j < kVecLanes; ++j) {
        float* to = s.token_cos_sin + int64_t{i + j} * 2 * kPageTokens + first;
        store(to, cosines[j]);
        store(to + kPageTokens, sines[j]);
      }
    }
    for (; i < rotary_pairs; ++i) {
      float* to = s.token_cos_sin + int64_t{i} * 2 * kPageTokens + first;
      for (int t = 0; t < kVecLanes; ++t) {
        const float a = base[t][i], b = base[t][rotary_pairs + i], c = offset[t][i],
                    d = offset[t][rotary_pairs + i];
        to[t] = a * c - b * d;
        to[kPageTokens + t] = b * c + a * d;
      }
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
