// The rotation of values (kernels/rotation.h): before they are packed, and back once they are attended.
#pragma once

#include <cstdint>

#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/rotation.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Signs of all channels, and those of the butterflies inside a vector.
struct RotationSigns {
  alignas(kLineBytes) float of[kMaxHeadDim];
  constexpr RotationSigns() : of{} {
    for (int d = 0; d < kMaxHeadDim; ++d) of[d] = rotation_sign(d);
  }
};
inline constexpr RotationSigns kRotationSigns;

// Sum of each lane and the one kStride further, their difference in the other one.
template <int kStride>
inline F32 lane_butterfly(F32 v) {
  I32 partner;
  F32 sign;
  for (int i = 0; i < kVecLanes; ++i) {
    partner[i] = i ^ kStride;
    sign[i] = i & kStride ? -1.0f : 1.0f;
  }
  return __builtin_shuffle(v, partner) + v * sign;
}

// The Hadamard matrix, not normalised, of each block of `block` numbers; strides ascend. block >= kLanes.
inline void hadamard_row(float* row, int head_dim, int block) {
  for (int d = 0; d < head_dim; d += kVecLanes) {
    F32 v = load<F32>(row + d);
    v = lane_butterfly<1>(v);
    v = lane_butterfly<2>(v);
    if constexpr (kVecLanes > 4) v = lane_butterfly<4>(v);
    if constexpr (kVecLanes > 8) v = lane_butterfly<8>(v);
    store(row + d, v);
  }
  for (int stride = kVecLanes; stride < block; stride *= 2) {
    for (int first = 0; first < head_dim; first += 2 * stride) {
      for (int d = first; d < first + stride; d += kVecLanes) {
        const F32 a = load<F32>(row + d), b = load<F32>(row + d + stride);
        store(row + d, a + b);
        store(row + d + stride, a - b);
      }
    }
  }
}

// The reflection of the head_dim / block numbers in each place of a block.
inline void reflect_row(float* row, int head_dim, int block) {
  const float twice = 2.0f * static_cast<float>(block) / static_cast<float>(head_dim);
  for (int j = 0; j < block; j += kVecLanes) {
    F32 sum = load<F32>(row + j);
    for (int d = j + block; d < head_dim; d += block) sum += load<F32>(row + d);
    const F32 share = sum * twice;
    for (int d = j; d < head_dim; d += block) store(row + d, load<F32>(row + d) - share);
  }
}

// row [D] = Q row.
inline void rotate_value_row(float* row, int head_dim) {
  const int block = rotation_block(head_dim);
  for (int d = 0; d < head_dim; d += kVecLanes)
    store(row + d, load<F32>(row + d) * load<F32>(kRotationSigns.of + d));
  hadamard_row(row, head_dim, block);
  if (block < head_dim) reflect_row(row, head_dim, block);
  const F32 norm = splat(rotation_norm(block));
  for (int d = 0; d < head_dim; d += kVecLanes) store(row + d, load<F32>(row + d) * norm);
}

// row [D] = Q^T row: both matrices are symmetric.
inline void unrotate_value_row(float* row, int head_dim) {
  const int block = rotation_block(head_dim);
  if (block < head_dim) reflect_row(row, head_dim, block);
  hadamard_row(row, head_dim, block);
  const F32 norm = splat(rotation_norm(block));
  for (int d = 0; d < head_dim; d += kVecLanes)
    store(row + d, load<F32>(row + d) * (load<F32>(kRotationSigns.of + d) * norm));
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
