// Scalar conversions between number formats, the same on every target.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/params.h"

namespace svdq {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bfloat16_to_float(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }

// Rounds to nearest, ties to even; the value must not be NaN.
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // Moving the exponent field into a float's leaves it 112 too small; the multiplication repairs
  // it, subnormals too.
  return bits_to_float(float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000u)) |
                       sign);
}

// Rounds to nearest, ties to even; too large becomes infinity; the value must not be NaN.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest >= 0x477ff000u) return sign | 0x7c00;
  if (rest < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13));
}

inline float load_scalar(const void* data, DataType dtype, int64_t index) {
  if (dtype == DataType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DataType::kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

inline void store_scalar(void* data, DataType dtype, int64_t index, float value) {
  if (dtype == DataType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        dtype == DataType::kBFloat16 ? float_to_bfloat16(value) : float_to_half(value);
  }
}

}  // namespace svdq
