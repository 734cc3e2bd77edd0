// Vectors of one target, in the target's namespace and region: nothing here can leak into code that must run on
// every processor. SVDQ_TARGET is 512, 256 or 128.
//
// A line of the packed format is 64 bytes; a vector holds 1/kParts of it. Arithmetic uses the compiler's vector
// extensions; only operations that they lack are intrinsics.
#pragma once

#if SVDQ_TARGET != 128
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "csrc/core/scalar.h"
#include "kernels/format.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

inline constexpr int kVecBytes = SVDQ_TARGET / 8;
inline constexpr int kVecLanes = kVecBytes / 4;
inline constexpr int kParts = kLineBytes / kVecBytes;
// Query rows of a tile, which share an unpacked page: as many as the accumulators leave registers for.
inline constexpr int kTileRows = SVDQ_TARGET == 512 ? 4 : 2;

typedef float F32 __attribute__((vector_size(kVecBytes)));
typedef int32_t I32 __attribute__((vector_size(kVecBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVecBytes)));

template <typename V, typename T>
inline V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <typename V, typename T>
inline void store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}
// Subtracting zero costs nothing; adding zero would be an addition, as -0 + 0 is not -0.
inline F32 splat(float x) { return x - F32{}; }
inline U32 splat_u32(uint32_t x) { return U32{} + x; }
// Four codes at any address, in every lane.
template <typename T>
inline U32 splat_quad(const T* from) {
  uint32_t x;
  __builtin_memcpy(&x, from, 4);
  return splat_u32(x);
}
inline F32 to_float(I32 v) { return __builtin_convertvector(v, F32); }

#if SVDQ_TARGET == 512

inline F32 max(F32 a, F32 b) { return (F32)_mm512_max_ps((__m512)a, (__m512)b); }
inline F32 min(F32 a, F32 b) { return (F32)_mm512_min_ps((__m512)a, (__m512)b); }
inline I32 round_to_int(F32 v) { return (I32)_mm512_cvtps_epi32((__m512)v); }
inline float reduce_max(F32 v) { return _mm512_reduce_max_ps((__m512)v); }
inline float reduce_add(F32 v) { return _mm512_reduce_add_ps((__m512)v); }
// v * 2^n for whole n.
inline F32 scale_by_power(F32 v, F32 n) { return (F32)_mm512_scalef_ps((__m512)v, (__m512)n); }
inline F32 round_even(F32 v) {
  return (F32)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 load_half(const uint16_t* from) {
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// Scales of values from their bytes (scale_as_half).
inline F32 load_scales(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (F32)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), kScaleShift));
}
// Rounds to nearest, ties to even.
inline void store_half(uint16_t* to, F32 v) {
  const __m256i bits = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}
inline F32 load_bfloat16(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
// Towards zero.
inline I32 truncate_to_int(F32 v) { return (I32)_mm512_cvttps_epi32((__m512)v); }
// Lowest byte of each lane.
inline void store_low_bytes(uint8_t* to, I32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
}
// The lanes of four vectors as bytes in order, unsigned or signed, saturated.
template <typename Byte>
inline void store_bytes(Byte* to, const I32 (&v)[4]) {
  const __m512i low = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes =
      std::is_signed_v<Byte> ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, bytes));
}
// acc + sum of the four products of unsigned bytes of a and signed bytes of b, per lane.
inline I32 dot(I32 acc, U32 a, U32 b) {
  return (I32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
// As dot, for any bytes: on other targets dot needs a's or b's bytes to be small (15 * 255).
inline I32 dot_wide(I32 acc, U32 a, U32 b) { return dot(acc, a, b); }
// Four numbers, repeated.
inline F32 splat_four(const float* from) { return (F32)_mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
// acc + both products of the signed 16-bit halves of a and b, per lane.
inline I32 dot_halves(I32 acc, I32 a, I32 b) {
  return (I32)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
// v in lanes whose bit of `bits` is set, `other` elsewhere.
inline F32 select_lanes(uint32_t bits, F32 v, F32 other) {
  return (F32)_mm512_mask_blend_ps(static_cast<__mmask16>(bits), (__m512)other, (__m512)v);
}
// Writes first + i for the lanes i with v >= bound and returns their number; overwrites up to kVecLanes numbers.
inline int store_at_least(F32 v, float bound, int32_t first, int32_t* to) {
  const __mmask16 lanes = _mm512_cmp_ps_mask((__m512)v, (__m512)splat(bound), _CMP_GE_OQ);
  const __m512i all =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                       _mm512_set1_epi32(first));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(lanes, all));
  return __builtin_popcount(lanes);
}

#else  // 256 and 128

inline int store_at_least(F32 v, float bound, int32_t first, int32_t* to) {
  int found = 0;
  for (int i = 0; i < kVecLanes; ++i) {
    to[found] = first + i;
    found += v[i] >= bound;
  }
  return found;
}

#if SVDQ_TARGET == 256
inline F32 round_even(F32 v) {
  return (F32)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline I32 round_to_int(F32 v) { return (I32)_mm256_cvtps_epi32((__m256)v); }
#else
inline F32 round_even(F32 v) {
  // Adding and subtracting 1.5 * 2^23 rounds to a whole number, ties to even, for |v| < 2^22. This target has no
  // fused multiply-add, which could skip the rounding of a product in v.
  const F32 magic = splat(12582912.0f);
  return (v + magic) - magic;
}
inline I32 round_to_int(F32 v) { return __builtin_convertvector(round_even(v), I32); }
#endif
inline F32 scale_by_power(F32 v, F32 n) {
  const I32 bits = (__builtin_convertvector(n, I32) + 127) << 23;
  return v * (F32)bits;
}
inline I32 truncate_to_int(F32 v) { return __builtin_convertvector(v, I32); }
inline void store_low_bytes(uint8_t* to, I32 v) {
  for (int i = 0; i < kVecLanes; ++i) to[i] = static_cast<uint8_t>(v[i]);
}
inline F32 select_lanes(uint32_t bits, F32 v, F32 other) {
  I32 lane_bit;
  for (int i = 0; i < kVecLanes; ++i) lane_bit[i] = 1 << i;
  return (static_cast<int32_t>(bits) & lane_bit) != 0 ? v : other;
}

#if SVDQ_TARGET == 256

inline F32 max(F32 a, F32 b) { return (F32)_mm256_max_ps((__m256)a, (__m256)b); }
inline F32 min(F32 a, F32 b) { return (F32)_mm256_min_ps((__m256)a, (__m256)b); }
template <typename Byte>
inline void store_bytes(Byte* to, const I32 (&v)[4]) {
  const __m256i low = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes =
      std::is_signed_v<Byte> ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
}
inline F32 load_half(const uint16_t* from) {
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline F32 load_scales(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (F32)_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), kScaleShift));
}
inline void store_half(uint16_t* to, F32 v) {
  const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
}
inline F32 load_bfloat16(const uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (F32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
inline I32 dot(I32 acc, U32 a, U32 b) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
  return acc + (I32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
inline F32 splat_four(const float* from) {
  return (F32)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
}
inline I32 dot_halves(I32 acc, I32 a, I32 b) {
  return acc + (I32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
inline I32 dot_wide(I32 acc, U32 a, U32 b) {
  // Multiply even and odd bytes separately, so that no 16-bit sum can saturate.
  const __m256i a_even = _mm256_and_si256((__m256i)a, _mm256_set1_epi16(0xff));
  const __m256i a_odd = _mm256_srli_epi16((__m256i)a, 8);
  const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8);
  const __m256i b_odd = _mm256_srai_epi16((__m256i)b, 8);
  return acc + (I32)_mm256_madd_epi16(a_even, b_even) + (I32)_mm256_madd_epi16(a_odd, b_odd);
}

#else  // 128: portable C++

inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline F32 min(F32 a, F32 b) { return a < b ? a : b; }
template <typename Byte>
inline void store_bytes(Byte* to, const I32 (&v)[4]) {
  for (int i = 0; i < 4 * kVecLanes; ++i) {
    const int32_t lane = v[i / kVecLanes][i % kVecLanes];
    to[i] = static_cast<Byte>(std::clamp<int32_t>(lane, std::numeric_limits<Byte>::min(),
                                                  std::numeric_limits<Byte>::max()));
  }
}
inline F32 load_half(const uint16_t* from) {
  F32 v;
  for (int i = 0; i < kVecLanes; ++i) v[i] = half_to_float(from[i]);
  return v;
}
inline F32 load_scales(const uint8_t* from) {
  U32 v;
  for (int i = 0; i < kVecLanes; ++i) v[i] = from[i];
  // As half_to_float, for bytes of at most kLargestScale.
  return (F32)(v << (kScaleShift + 13)) * bits_to_float(0x77800000u);
}
inline void store_half(uint16_t* to, F32 v) {
  for (int i = 0; i < kVecLanes; ++i) to[i] = float_to_half(v[i]);
}
inline F32 load_bfloat16(const uint16_t* from) {
  U32 v;
  for (int i = 0; i < kVecLanes; ++i) v[i] = uint32_t{from[i]} << 16;
  return (F32)v;
}
inline I32 dot(I32 acc, U32 a, U32 b) {
  for (int byte = 0; byte < kQuad; ++byte) {
    const I32 code = (I32)((a >> (8 * byte)) & 0xff);
    acc += code * ((I32)(b << (24 - 8 * byte)) >> 24);
  }
  return acc;
}
inline I32 dot_wide(I32 acc, U32 a, U32 b) { return dot(acc, a, b); }
inline F32 splat_four(const float* from) { return load<F32>(from); }
inline I32 dot_halves(I32 acc, I32 a, I32 b) {
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}

#endif

inline float reduce_max(F32 v) {
  float result = v[0];
  for (int i = 1; i < kVecLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
}
inline float reduce_add(F32 v) {
  float result = v[0];
  for (int i = 1; i < kVecLanes; ++i) result += v[i];
  return result;
}

#endif

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
