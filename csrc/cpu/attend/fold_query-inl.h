// Folds a row of floats over the channels of a head into int8 rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/cpu/attend/folded_rows-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// One float per channel of a head, in whole vectors; zeros past the last channel.
using ChannelRow = float[kMaxHeadDim + 4 * kVecLanes];

// Quantizes a row over the channels of `bands`; `constant` is the term without codes. Writes whole lines of high and
// low terms.
inline void quantize_folded_row(const Bands& bands, const ChannelRow& row_values, float constant,
                                int8_t* high, int8_t* low, float* scale, float* offset) {
  const int rank = bands.rank();
  F32 max_abs{};
  for (int j = 0; j < rank; j += kVecLanes) {
    const F32 w = load<F32>(row_values + j);
    max_abs = max(max_abs, max(w, -w));
  }
  *scale = reduce_max(max_abs) / kMaxFolded;
  const F32 inverse = splat(*scale > 0 ? 1.0f / *scale : 0.0f);
  for (int j = 0; j < rank; j += 4 * kVecLanes) {
    I32 code[4], rest[4];
    for (int v = 0; v < 4; ++v) {
      const F32 w = load<F32>(row_values + j + v * kVecLanes) * inverse;
      code[v] = round_to_int(w);
      rest[v] = round_to_int((w - to_float(code[v])) * kLowPerHigh);
    }
    store_bytes(high + j, code);
    store_bytes(low + j, rest);
  }
  // Subtract the mid codes' share of the quantized row, so that its rounding errors multiply code - mid and not the
  // much larger code.
  float middle = 0;
  int channel = 0;
  for (int w = 0; w < kNumWidths; ++w) {
    int64_t sum = 0, low_sum = 0;
    for (int j = channel; j < channel + bands.count[w]; ++j) {
      sum += high[j];
      low_sum += low[j];
    }
    middle += mid_code(kWidths[w]) * static_cast<float>(sum);
    if (kWidths[w] == 8) middle += mid_code(8) / kLowPerHigh * static_cast<float>(low_sum);
    channel += bands.count[w];
  }
  *offset = constant - middle * *scale;
}

inline float dot_rows(const float* a, const float* b, int n) {
  F32 sum{};
  for (int i = 0; i < n; i += kVecLanes) sum += load<F32>(a + i) * load<F32>(b + i);
  return reduce_add(sum);
}

inline float dot_basis(const uint16_t* basis, const float* x, int n) {
  F32 sum{};
  for (int i = 0; i < n; i += kVecLanes) sum += load_bfloat16(basis + i) * load<F32>(x + i);
  return reduce_add(sum);
}

// Stores row `row` of a head's folded rows.
inline void store_folded_row(const AttendPlan& plan, int64_t sequence_head, int64_t row,
                             const Bands& bands, const ChannelRow& row_values, float constant) {
  const int64_t at = sequence_head * plan.folded_rows + row;
  const int dim = plan.p.keys.layout.head_dim, rank = bands.rank();
  int8_t high[kMaxHeadDim + 4 * kVecLanes], low[kMaxHeadDim + 4 * kVecLanes];
  quantize_folded_row(bands, row_values, constant, high, low, plan.folded_scales + at,
                      plan.folded_offsets + at);
  std::memcpy(plan.folded + at * 2 * dim, high, rank);
  std::memcpy(plan.folded + at * 2 * dim + rank, low, rank);
}

// Folds a head's queries into the basis of its post-RoPE channels.
inline void fold_queries(const AttendPlan& plan, int64_t sequence_head) {
  const AttendParams& p = plan.p;
  const int64_t b = sequence_head / p.keys.layout.num_heads;
  const int dim = p.keys.layout.head_dim;
  const HeadPlan& head = plan.head(sequence_head % p.keys.layout.num_heads);
  const int64_t channel = b * p.keys.layout.rank + head.first_post_channel();
  const uint16_t* basis = p.keys.codec.basis + channel * dim;
  const float* scale = p.keys.codec.scale + channel;
  const bool hybrid = p.keys.layout.rope == RopeMode::kHybrid;
  const float* mean = (hybrid ? p.keys.codec.post_mean : p.keys.codec.mean) + sequence_head * dim;
  ChannelRow row_values{};
  for (int64_t row = 0; row < plan.rows; ++row) {
    const float* q = plan.query + (sequence_head * plan.rows + row) * dim;
    for (int j = 0; j < head.post.rank(); ++j)
      row_values[j] = dot_basis(basis + int64_t{j} * dim, q, dim) * scale[j];
    store_folded_row(plan, sequence_head, plan.pre_rows + row, head.post, row_values,
                     dot_rows(q, mean, dim));
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
