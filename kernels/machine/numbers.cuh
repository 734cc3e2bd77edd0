// Numbers of any of the library's dtypes, one or eight at a time.
#pragma once

#include "kernels/machine/device.cuh"
#include "kernels/params.h"

namespace svdq::device {

// Calls fn.template operator()<dtype>(): for loops whose loads are to be in flight together, which a branch on the dtype
// around each of them would prevent.
template <typename Fn>
SVDQ_DEVICE void with_dtype(DataType dtype, const Fn& fn) {
  if (dtype == DataType::kFloat32) {
    fn.template operator()<DataType::kFloat32>();
  } else if (dtype == DataType::kBFloat16) {
    fn.template operator()<DataType::kBFloat16>();
  } else {
    fn.template operator()<DataType::kFloat16>();
  }
}

template <DataType kType>
SVDQ_DEVICE float widened(uint16_t bits) {
  return kType == DataType::kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

template <DataType kType>
SVDQ_DEVICE float load_number_as(const void* data, int64_t index) {
  if constexpr (kType == DataType::kFloat32)
    return load(static_cast<const float*>(data) + index);
  else
    return widened<kType>(load(static_cast<const uint16_t*>(data) + index));
}

SVDQ_DEVICE float load_number(const void* data, DataType dtype, int64_t index) {
  if (dtype == DataType::kFloat32) return load_number_as<DataType::kFloat32>(data, index);
  return dtype == DataType::kBFloat16 ? load_number_as<DataType::kBFloat16>(data, index)
                                      : load_number_as<DataType::kFloat16>(data, index);
}

// Numbers index .. index + 3, which start at a multiple of their size.
template <DataType kType>
SVDQ_DEVICE Floats4 load_four_as(const void* data, int64_t index) {
  if constexpr (kType == DataType::kFloat32) {
    return load(reinterpret_cast<const Floats4*>(static_cast<const float*>(data) + index));
  } else {
    const Words2 words =
        load(reinterpret_cast<const Words2*>(static_cast<const uint16_t*>(data) + index));
    Floats4 four;
    SVDQ_UNROLL
    for (int i = 0; i < 4; ++i)
      four.x[i] = widened<kType>(static_cast<uint16_t>(words.word[i / 2] >> i % 2 * 16));
    return four;
  }
}

// The nearest number of a dtype.
SVDQ_DEVICE float rounded_to(DataType dtype, float x) {
  if (dtype == DataType::kFloat32) return x;
  return dtype == DataType::kBFloat16 ? bfloat16_to_float(float_to_bfloat16(x))
                                      : half_to_float(float_to_half(x));
}

SVDQ_DEVICE void store_number(void* data, DataType dtype, int64_t index, float value) {
  if (dtype == DataType::kFloat32) {
    store(static_cast<float*>(data) + index, value);
  } else {
    store(static_cast<uint16_t*>(data) + index,
          dtype == DataType::kBFloat16 ? float_to_bfloat16(value) : float_to_half(value));
  }
}

struct Floats8 {
  float x[8];
};

// True if every multiple of 8 channels of every row starts at a multiple of 16 bytes. Sources may
// have any stride, so kernels read number by number where this is false.
inline bool aligned_rows(const TokenSource& source) {
  const int64_t vector = source.dtype == DataType::kFloat32 ? 4 : 8;  // numbers of 16 bytes
  return reinterpret_cast<uintptr_t>(source.data) % 16 == 0 && source.head_stride % vector == 0 &&
         source.token_stride % vector == 0;
}

// Numbers index .. index + 7, in 16-byte loads if `aligned`.
SVDQ_DEVICE Floats8 load_eight(const void* data, DataType dtype, int64_t index, bool aligned) {
  Floats8 eight;
  if (!aligned) {
    SVDQ_UNROLL
    for (int i = 0; i < 8; ++i) eight.x[i] = load_number(data, dtype, index + i);
  } else if (dtype == DataType::kFloat32) {
    const Floats4* from = reinterpret_cast<const Floats4*>(static_cast<const float*>(data) + index);
    const Floats4 low = load(from), high = load(from + 1);
    SVDQ_UNROLL
    for (int i = 0; i < 4; ++i) eight.x[i] = low.x[i], eight.x[i + 4] = high.x[i];
  } else {
    const Words4 words =
        load(reinterpret_cast<const Words4*>(static_cast<const uint16_t*>(data) + index));
    SVDQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = static_cast<uint16_t>(words.word[i / 2] >> i % 2 * 16);
      eight.x[i] = dtype == DataType::kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
    }
  }
  return eight;
}

// Sum and maximum over the lanes of a warp; every lane gets it.
SVDQ_DEVICE float warp_sum(float x) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

SVDQ_DEVICE float warp_max(float x) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace svdq::device
