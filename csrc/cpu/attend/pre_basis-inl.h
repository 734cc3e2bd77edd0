// The scaled basis of a head's pre-RoPE channels by key channel, and the key channels that are reconstructed from it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/parallel.h"
#include "csrc/cpu/attend/fold_query-inl.h"
#include "csrc/cpu/attend/interleaved-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/lanes-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// The scaled basis of a head's pre-RoPE channels by key channel.
class PreBasis {
 public:
  // basis [rank, D] bfloat16, scale [rank].
  PreBasis(const uint16_t* basis, const float* scale, int rank, int dim)
      : stride_(static_cast<int>(round_up(rank, 4 * kVecLanes))),
        numbers_(sizeof(float) * dim * stride_) {
    float* numbers = numbers_.as<float>();
    for (int j = 0; j < stride_; j += kVecLanes) {
      for (int d = 0; d < dim; d += kVecLanes) {
        F32 block[kVecLanes];
        for (int i = 0; i < kVecLanes; ++i) {
          block[i] =
              j + i < rank ? load_bfloat16(basis + int64_t{j + i} * dim + d) * scale[j + i] : F32{};
        }
        transpose(block);
        for (int i = 0; i < kVecLanes; ++i) store(numbers + int64_t{d + i} * stride_ + j, block[i]);
      }
    }
  }

  // [rank], then zeros to a whole line of int8.
  const float* row(int channel) const { return numbers_.as<float>() + int64_t{channel} * stride_; }

 private:
  int stride_;
  AlignedBuffer numbers_;
};

// Lists the interleaved channels of a head, all or those of the fast pairs that it codes or has a mean in, and folds
// their rows of the basis.
inline void prepare_interleaved(const AttendPlan& plan, int64_t sequence_head, const HeadPlan& head,
                                const PreBasis& pre, const float* mean) {
  const int dim = plan.p.keys.layout.head_dim, rotary_pairs = plan.p.keys.codec.rope.rotary_pairs,
            rank = head.pre.rank();
  int16_t* pairs = plan.interleaved_pairs + sequence_head * rotary_pairs;
  const auto coded = [&](int channel) {
    const float* x = pre.row(channel);
    return !std::all_of(x, x + rank, [](float v) { return v == 0; });
  };
  int count = 0, means = 0;
  const auto list = [&](bool with_codes, int& listed) {
    for (int i = 0; i < rotary_pairs; ++i) {
      if (plan.absorbs && plan.slow.slow(plan.p.keys.codec.rope.inv_freq[i])) continue;
      const bool has_codes = !plan.absorbs || coded(i) || coded(i + rotary_pairs);
      if (has_codes != with_codes) continue;
      if (!has_codes && mean[i] == 0 && mean[i + rotary_pairs] == 0) continue;
      pairs[count + means] = static_cast<int16_t>(i);
      ++listed;
    }
  };
  list(true, count);
  list(false, means);
  const InterleavedChannels interleaved{
      pairs,       count, means, 2 * rotary_pairs, plan.absorbs ? 0 : dim - 2 * rotary_pairs,
      rotary_pairs};
  plan.interleaved[sequence_head] = interleaved;
  ChannelRow row_values{};
  for (int c = 0; c < interleaved.count(); ++c) {
    const bool used = c < interleaved.used();
    for (int j = 0; j < rank; ++j) row_values[j] = used ? pre.row(interleaved.channel(c))[j] : 0.0f;
    store_folded_row(plan, sequence_head, c, head.pre, row_values,
                     used ? mean[interleaved.channel(c)] : 0.0f);
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
