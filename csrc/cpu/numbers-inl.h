// Exponentials, and numbers of any dtype as vectors.
#pragma once

#include <cstdint>

#include "csrc/cpu/simd-inl.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// 2^v for v <= 0 or small; relative error below 4e-7; below 2^-126 the result stays 2^-126.
inline F32 exp2(F32 v) {
  v = max(v, splat(-126.0f));
  const F32 whole = round_even(v);
  const F32 x = v - whole;  // |x| <= 1/2
  // The minimax polynomial of degree 5, relative error 8e-8, except for its constant, which makes 2^0 exact.
  F32 sum = splat(1.327647217e-3f);
  sum = sum * x + 9.675541331e-3f;
  sum = sum * x + 5.550713273e-2f;
  sum = sum * x + 2.402211972e-1f;
  sum = sum * x + 6.931469671e-1f;
  sum = sum * x + 1.0f;
  return scale_by_power(sum, whole);
}

// Hyperbolic tangent, relative error below 1e-6.
inline F32 tanh(F32 v) {
  const F32 size = max(v, -v);
  // Near zero an odd polynomial (that of Cephes): a difference of exponentials would cancel.
  const F32 square = v * v;
  F32 sum = splat(-5.70498872745e-3f);
  sum = sum * square + 2.06390887954e-2f;
  sum = sum * square - 5.37397155531e-2f;
  sum = sum * square + 1.33314422036e-1f;
  sum = sum * square - 3.33332819422e-1f;
  const F32 near_zero = sum * square * v + v;
  const F32 power = exp2(size * (-2 * kLog2E));  // e^(-2 |v|)
  const F32 far = (1.0f - power) / (1.0f + power);
  const F32 signed_far = v < 0.0f ? -far : far;
  return size >= 0.625f ? signed_far : near_zero;  // a NaN stays one
}

inline F32 load_as_float(const void* data, DataType dtype, int64_t index) {
  if (dtype == DataType::kFloat32) return load<F32>(static_cast<const float*>(data) + index);
  const uint16_t* from = static_cast<const uint16_t*>(data) + index;
  return dtype == DataType::kBFloat16 ? load_bfloat16(from) : load_half(from);
}

// The same for a dtype known at compile time, so that loops over a row have no branch.
template <DataType kType>
inline F32 load_number(const void* data, int64_t index) {
  if constexpr (kType == DataType::kFloat32) {
    return load<F32>(static_cast<const float*>(data) + index);
  } else if constexpr (kType == DataType::kBFloat16) {
    return load_bfloat16(static_cast<const uint16_t*>(data) + index);
  } else {
    return load_half(static_cast<const uint16_t*>(data) + index);
  }
}

// Calls fn.template operator()<dtype>().
template <typename Fn>
inline void with_dtype(DataType dtype, const Fn& fn) {
  switch (dtype) {
    case DataType::kFloat32:
      return fn.template operator()<DataType::kFloat32>();
    case DataType::kBFloat16:
      return fn.template operator()<DataType::kBFloat16>();
    case DataType::kFloat16:
      return fn.template operator()<DataType::kFloat16>();
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
