// Scores and outputs of uncompressed keys and values: those of the window, of outliers and of 16- and 32-bit values.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// s[r][0] = query[r] . key for one uncompressed key, whose numbers begin at `at`.
template <int kRows>
inline void uncompressed_score(const float* query, int head_dim, const void* keys, DataType dtype,
                               int64_t at, float* s) {
  F32 acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = F32{};
  for (int d = 0; d < head_dim; d += kVecLanes) {
    const F32 key = load_as_float(keys, dtype, at + d);
    for (int r = 0; r < kRows; ++r) acc[r] += key * load<F32>(query + r * head_dim + d);
  }
  for (int r = 0; r < kRows; ++r) s[r * kPageTokens] = reduce_add(acc[r]);
}

// s[r][t] = query[r] . key_t for `count` uncompressed keys [count, D]; 0 for the other tokens, which the caller masks.
template <int kRows>
inline void uncompressed_scores(const float* query, int head_dim, const void* keys, DataType dtype,
                                int64_t first, int count, float* s) {
  for (int t = 0; t < count; ++t)
    uncompressed_score<kRows>(query, head_dim, keys, dtype, first + int64_t{t} * head_dim, s + t);
  for (int r = 0; r < kRows; ++r) {
    for (int t = count; t < kPageTokens; ++t) s[r * kPageTokens + t] = 0;
  }
}

// out[r] += probabilities . uncompressed values [64, D]; tokens outside the mask are not read.
template <int kRows>
inline void accumulate_uncompressed(const float (*probabilities)[kPageTokens], const void* values,
                                    DataType dtype, int64_t first, uint64_t mask, int head_dim,
                                    float* out) {
  constexpr int kChunk = 2;  // vectors of a row held while its tokens go by
  for (int d = 0; d < head_dim; d += kChunk * kVecLanes) {
    const int vecs = std::min(kChunk, (head_dim - d) / kVecLanes);
    F32 acc[kRows][kChunk];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < vecs; ++v) acc[r][v] = load<F32>(out + r * head_dim + d + v * kVecLanes);
    }
    for (uint64_t rest = mask; rest; rest &= rest - 1) {
      const int t = __builtin_ctzll(rest);
      for (int v = 0; v < vecs; ++v) {
        const F32 value =
            load_as_float(values, dtype, first + int64_t{t} * head_dim + d + v * kVecLanes);
        for (int r = 0; r < kRows; ++r) acc[r][v] += value * probabilities[r][t];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < vecs; ++v) store(out + r * head_dim + d + v * kVecLanes, acc[r][v]);
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
