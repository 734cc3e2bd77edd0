// A register tile of a matrix product.
#pragma once

#include <cstdint>

#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

inline constexpr int kTileTokens = 4;  // rows of a register tile
inline constexpr int kTileVecs =
    SVDQ_TARGET == 512 ? 4 : 2;  // columns of a register tile, in vectors
static_assert(kPageTokens % kTileTokens == 0 && kPageTokens % kVecLanes == 0);

// out[m][n] (+)= sum_k a[k * a_stride_k + m * a_stride_m] * b[k][n] for a tile of kRows rows and kVecs vectors. k
// ascends, one fused multiply-add each: targets with FMA agree to the last bit.
template <int kRows, int kVecs, bool kAccumulate>
inline void outer_product_tile(const float* a, int64_t a_stride_m, int64_t a_stride_k,
                               const float* b, int64_t b_stride, int64_t num_k, float* out,
                               int64_t out_stride) {
  F32 acc[kRows][kVecs];
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) {
      acc[m][v] = kAccumulate ? load<F32>(out + m * out_stride + v * kVecLanes) : F32{};
    }
  }
  for (int64_t k = 0; k < num_k; ++k) {
    F32 row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = load<F32>(b + k * b_stride + v * kVecLanes);
    for (int m = 0; m < kRows; ++m) {
      const F32 x = splat(a[k * a_stride_k + m * a_stride_m]);
      for (int v = 0; v < kVecs; ++v) acc[m][v] += x * row[v];
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) store(out + m * out_stride + v * kVecLanes, acc[m][v]);
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
