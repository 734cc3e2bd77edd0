// The mass of a token: the sum over query rows of its share of the row's softmax, whose norm is estimated from a
// sample of pages.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "csrc/core/absorb.h"
#include "csrc/cpu/attend/softmax-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/pages/page_span-inl.h"
#include "csrc/cpu/pages/prefetch-inl.h"
#include "csrc/cpu/select/plan-inl.h"
#include "csrc/cpu/select/proxy-inl.h"
#include "csrc/cpu/select/score-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Log-sum-exp of every row's scores over the sample of pages.
inline void prepare_norms(const SelectPlan& plan, const SelectHead& head) {
  const int64_t pages = plan.pages(head.b), stride = select_sample_stride(pages);
  float* largest = plan.norms + head.sequence_head * plan.rows;
  float* sums = plan.sums + head.sequence_head * plan.rows;
  std::fill(largest, largest + plan.rows, kNoScore);
  std::fill(sums, sums + plan.rows, 0.0f);
  for (int64_t page = stride / 2; page < pages; page += stride) {
    const uint64_t mask = valid_slots(plan.p.keys, head.b, page);
    if (mask == 0) continue;
    const auto add = [&]<int kRows>(int64_t, int64_t row, int part, const F32(&s)[kRows][kGroups]) {
      for (int r = 0; r < kRows; ++r) {
        F32 max_score = splat(kNoScore), sum{};
        for (int g = 0; g < kGroups; ++g)
          max_score = max(max_score, select_lanes(mask_lanes(mask, tokens_at(g, part)), s[r][g],
                                                  splat(kNoScore)));
        const float top = std::max(reduce_max(max_score), largest[row + r]);
        if (top == kNoScore) continue;
        for (int g = 0; g < kGroups; ++g)
          sum += select_lanes(mask_lanes(mask, tokens_at(g, part)), exp2(s[r][g] - top), F32{});
        const float before =
            largest[row + r] == kNoScore ? 0.0f : std::exp2(largest[row + r] - top);
        sums[row + r] = sums[row + r] * before + reduce_add(sum);
        largest[row + r] = top;
      }
    };
    for_each_score(plan, head, page, page + 1, add);
  }
  for (int64_t r = 0; r < plan.rows; ++r)
    largest[r] = largest[r] == kNoScore ? 0.0f : largest[r] + std::log2(sums[r]);
}

// 2^v with a relative error below 0.8 %, for v <= 100; anything from 0 to 2^-126 for v < -126.
inline F32 rough_exp2(F32 v) {
#if SVDQ_TARGET != 512
  v = max(v, splat(-126.0f));
#endif
  const F32 whole = round_even(v), x = v - whole;
  return scale_by_power((splat(0.24022651f) * x + 0.69314718f) * x + 1.0f, whole);
}

// Mass of the tokens of pages first .. last - 1; -1 for slots that must not be selected.
inline void estimate_mass(const SelectPlan& plan, const SelectHead& head, int64_t first,
                          int64_t last) {
  constexpr float kMaxLog2Mass = 100.0f;  // keeps the sum over rows finite
  constexpr int64_t kPagesAhead = 4;      // distance of prefetching
  const float* norms = plan.norms + head.sequence_head * plan.rows;
  float* token_mass = plan.token_mass + head.sequence_head * plan.max_pages() * kPageTokens;
  const int64_t pages = plan.pages(head.b);
  for (int64_t chunk = first; chunk < last; chunk += kChunkPages) {
    const auto add = [&]<int kRows>(int64_t page, int64_t row, int part,
                                    const F32(&s)[kRows][kGroups]) {
      // Prefetch the proxy channels of a later page.
      if (row == 0 && part == 0 && page + kPagesAhead < pages) {
        const uint8_t* next = plan.lines(head.b, head.h, page + kPagesAhead);
        for (int i = 0; i < head.proxy.bands; ++i) {
          const ProxyBand& band = head.proxy.band[i];
          for (int64_t at = 0; at < band.bytes; at += kLineBytes)
            prefetch_line(next + band.offset + at);
        }
      }
      // Add this tile's share of the mass; mark invalid slots after the last tile.
      const uint64_t mask = valid_slots(plan.p.keys, head.b, page);
      for (int g = 0; g < kGroups; ++g) {
        float* at = token_mass + page * kPageTokens + g * kLanes + part * kVecLanes;
        F32 sum = row ? load<F32>(at) : F32{};
        for (int r = 0; r < kRows; ++r)
          sum += rough_exp2(min(s[r][g] - norms[row + r], splat(kMaxLog2Mass)));
        const bool done = row + kRows == plan.rows && mask != ~uint64_t{0};
        store(at, done ? select_lanes(mask_lanes(mask, tokens_at(g, part)), sum, splat(-1)) : sum);
      }
    };
    for_each_score(plan, head, chunk, std::min(chunk + kChunkPages, last), add);
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
