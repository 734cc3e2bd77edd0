// Numbers of any of the library's dtypes, one at a time.
#pragma once

#include "kernels/device.cuh"
#include "kernels/params.h"

namespace svdq::device {

SVDQ_DEVICE float load_number(const void* data, DataType dtype, int64_t index) {
  if (dtype == DataType::kFloat32) return load(static_cast<const float*>(data) + index);
  const uint16_t bits = load(static_cast<const uint16_t*>(data) + index);
  return dtype == DataType::kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

SVDQ_DEVICE void store_number(void* data, DataType dtype, int64_t index, float value) {
  if (dtype == DataType::kFloat32) {
    store(static_cast<float*>(data) + index, value);
  } else {
    store(static_cast<uint16_t*>(data) + index,
          dtype == DataType::kBFloat16 ? float_to_bfloat16(value) : float_to_half(value));
  }
}

}  // namespace svdq::device
