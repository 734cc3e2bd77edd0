// The rotation of values (kernels/rotation.h): before they are packed, and back once they are attended.
#pragma once

#include <algorithm>
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

// Vectors that a pass of butterflies holds in registers.
inline constexpr int kPassVecs = 8;

// Butterflies between kVecs vectors that lie `stride` numbers apart, for strides of 1, 2, .. kVecs / 2 of them. The first
// pass begins with a block of whole vectors. `load_at(d)` gives the numbers at d, `finish` changes those that are stored.
template <int kVecs, bool kFirst, typename Load, typename Finish>
inline void butterfly_pass(float* row, int head_dim, int stride, const Load& load_at,
                           const Finish& finish) {
  for (int first = 0; first < head_dim; first += kVecs * stride) {
    for (int d = first; d < first + stride; d += kVecLanes) {
      F32 v[kVecs];
      for (int i = 0; i < kVecs; ++i) {
        v[i] = load_at(d + i * stride);
        if constexpr (!kFirst) continue;
        v[i] = lane_butterfly<1>(v[i]);
        v[i] = lane_butterfly<2>(v[i]);
        if constexpr (kVecLanes > 4) v[i] = lane_butterfly<4>(v[i]);
        if constexpr (kVecLanes > 8) v[i] = lane_butterfly<8>(v[i]);
      }
      for (int half = 1; half < kVecs; half *= 2) {
        for (int i = 0; i < kVecs; ++i) {
          if (i & half) continue;
          const F32 a = v[i], b = v[i + half];
          v[i] = a + b;
          v[i + half] = a - b;
        }
      }
      for (int i = 0; i < kVecs; ++i) store(row + d + i * stride, finish(v[i], d + i * stride));
    }
  }
}

// Calls fn<n>() for n vectors, a power of two, at most kPassVecs.
template <typename Fn>
inline void with_vecs(int vecs, const Fn& fn) {
  static_assert(kPassVecs == 8);
  if (vecs == 1) fn.template operator()<1>();
  if (vecs == 2) fn.template operator()<2>();
  if (vecs == 4) fn.template operator()<4>();
  if (vecs >= 8) fn.template operator()<8>();
}

// The Hadamard matrix, not normalised, of each block of `block` numbers; strides ascend. block >= kLanes. `load_at`
// gives the numbers, `finish` changes the results.
template <typename Load, typename Finish>
inline void hadamard_row(float* row, int head_dim, int block, const Load& load_at,
                         const Finish& finish) {
  const auto again = [&](int d) { return load<F32>(row + d); };
  const auto leave = [&](F32 v, int) { return v; };
  const int unit = std::min(block, kPassVecs * kVecLanes);
  with_vecs(unit / kVecLanes, [&]<int kVecs>() {
    if (unit == block) {
      butterfly_pass<kVecs, true>(row, head_dim, kVecLanes, load_at, finish);
    } else {
      butterfly_pass<kVecs, true>(row, head_dim, kVecLanes, load_at, leave);
    }
  });
  for (int stride = unit; stride < block; stride *= kPassVecs) {
    with_vecs(block / stride, [&]<int kVecs>() {
      if (stride * kVecs == block) {
        butterfly_pass<kVecs, false>(row, head_dim, stride, again, finish);
      } else {
        butterfly_pass<kVecs, false>(row, head_dim, stride, again, leave);
      }
    });
  }
}

// The reflection of the head_dim / block numbers in each place of a block, times `norm`.
inline void reflect_row(float* row, int head_dim, int block, float norm) {
  const float twice = 2.0f * static_cast<float>(block) / static_cast<float>(head_dim);
  for (int j = 0; j < block; j += kVecLanes) {
    F32 sum = load<F32>(row + j);
    for (int d = j + block; d < head_dim; d += block) sum += load<F32>(row + d);
    const F32 share = sum * twice;
    for (int d = j; d < head_dim; d += block) store(row + d, (load<F32>(row + d) - share) * norm);
  }
}

// row [D] = Q of the numbers that load_at(d) gives, a vector from d on.
template <typename Load>
inline void rotate_values(float* row, int head_dim, const Load& load_at) {
  const int block = rotation_block(head_dim);
  const float norm = rotation_norm(block);
  const auto signed_at = [&](int d) { return load_at(d) * load<F32>(kRotationSigns.of + d); };
  if (block < head_dim) {
    hadamard_row(row, head_dim, block, signed_at, [&](F32 v, int) { return v; });
    reflect_row(row, head_dim, block, norm);
  } else {
    hadamard_row(row, head_dim, block, signed_at, [&](F32 v, int) { return v * norm; });
  }
}

// row [D] = Q^T row: both matrices are symmetric.
inline void unrotate_value_row(float* row, int head_dim) {
  const int block = rotation_block(head_dim);
  if (block < head_dim) reflect_row(row, head_dim, block, 1.0f);
  const F32 norm = splat(rotation_norm(block));
  hadamard_row(
      row, head_dim, block, [&](int d) { return load<F32>(row + d); },
      [&](F32 v, int d) { return v * (load<F32>(kRotationSigns.of + d) * norm); });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
