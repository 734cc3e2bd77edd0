// Online softmax over blocks of 64 tokens; scores are in units of log2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pages/page_span-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

inline constexpr float kNoScore = -std::numeric_limits<float>::infinity();

// State of a block of query rows: the online softmax, in units of log2, and the output so far. Probabilities are
// relative to `max`. While packed values are added up, `out` is that of rotated values less middle_sum, the part of the
// mid codes, the same for all channels; see finish_packed.
struct RowBlock {
  float* max;         // [rows]
  float* sum;         // [rows, kVecLanes], partial sums by lane
  float* middle_sum;  // [rows, kVecLanes], partial sums by lane
  float* out;         // [rows, D]
};

inline RowBlock sub_block(const RowBlock& rows, int64_t first, int head_dim) {
  return {rows.max + first, rows.sum + first * kVecLanes, rows.middle_sum + first * kVecLanes,
          rows.out + first * head_dim};
}

inline void reset_rows(const RowBlock& rows, int count, int head_dim) {
  std::fill_n(rows.max, count, kNoScore);
  std::memset(rows.sum, 0, sizeof(float) * count * kVecLanes);
  std::memset(rows.middle_sum, 0, sizeof(float) * count * kVecLanes);
  std::memset(rows.out, 0, sizeof(float) * count * head_dim);
}

inline void rescale_row(const RowBlock& rows, int r, float factor, int head_dim) {
  store(rows.sum + r * kVecLanes, load<F32>(rows.sum + r * kVecLanes) * factor);
  float* middles = rows.middle_sum + r * kVecLanes;
  store(middles, load<F32>(middles) * factor);
  for (int d = 0; d < head_dim; d += kVecLanes)
    store(rows.out + r * head_dim + d, load<F32>(rows.out + r * head_dim + d) * factor);
}

// Raises the maximum of row r to that of a block, which is larger.
inline void raise_max(const RowBlock& rows, int r, float block_max, int head_dim) {
  if (rows.max[r] != kNoScore) rescale_row(rows, r, std::exp2(rows.max[r] - block_max), head_dim);
  rows.max[r] = block_max;
}

// Probabilities p[64] of the scores s[64] of row r, 0 outside `mask`. Returns false if `mask` is empty or its scores
// are all -inf.
inline bool softmax_row(const RowBlock& rows, int r, const float* s, uint64_t mask, int head_dim,
                        float* p) {
  F32 max_score = splat(kNoScore);
  for (int t = 0; t < kPageTokens; t += kVecLanes)
    max_score = max(max_score, select_lanes(mask_lanes(mask, t), load<F32>(s + t), max_score));
  const float block_max = reduce_max(max_score);
  if (block_max == kNoScore) return false;
  if (block_max > rows.max[r]) raise_max(rows, r, block_max, head_dim);
  F32 sum = load<F32>(rows.sum + r * kVecLanes);
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const F32 v = select_lanes(mask_lanes(mask, t), exp2(load<F32>(s + t) - rows.max[r]), F32{});
    sum += v;
    store(p + t, v);
  }
  store(rows.sum + r * kVecLanes, sum);
  return true;
}

// Probabilities of kRows rows of scores; those of rows that see no token are zero. Returns false if no row sees any.
template <int kRows>
inline bool softmax_rows(const RowBlock& rows, const float* scores, const uint64_t (&masks)[kRows],
                         int dim, float (*probs)[kPageTokens]) {
  bool any = false;
  for (int r = 0; r < kRows; ++r) {
    if (softmax_row(rows, r, scores + r * kPageTokens, masks[r], dim, probs[r])) {
      any = true;
    } else {
      std::memset(probs + r, 0, sizeof(probs[r]));
    }
  }
  return any;
}

// Applies a softcap to the scores s[row][64].
template <int kRows>
inline void cap_scores(float softcap, float* s) {
  const F32 cap = splat(softcap * kLog2E);  // in their units
  for (int t = 0; t < kRows * kPageTokens; t += kVecLanes)
    store(s + t, tanh(load<F32>(s + t) / cap) * cap);
}

inline constexpr float kMaskedScore = std::numeric_limits<float>::lowest();

// Sets the scores s[row][64] of tokens outside `mask` to the lowest float: their probabilities are then negligible, and
// the scales of their values are 0.
template <int kRows>
inline void mask_scores(uint64_t mask, float* s) {
  const F32 lowest = splat(kMaskedScore);
  for (int r = 0; r < kRows; ++r) {
    for (float* at = s + r * kPageTokens; at < s + (r + 1) * kPageTokens; at += kVecLanes) {
      const int t = static_cast<int>(at - s) % kPageTokens;
      store(at, select_lanes(mask_lanes(mask, t), load<F32>(at), lowest));
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
