// Operations across the lanes of vectors: broadcasts, maxima of rows, transposition.
#pragma once

#include <cstdint>

#include "csrc/cpu/simd-inl.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// v[lane] in every lane.
inline F32 splat_lane(F32 v, int lane) { return __builtin_shuffle(v, I32{} + lane); }

// One number for each of kRows rows, in the first lanes of a vector; the other lanes may hold anything.
template <int kRows>
inline F32 load_first(const float* from) {
#if SVDQ_TARGET == 512
  return (F32)_mm512_maskz_loadu_ps((1 << kRows) - 1, from);
#else
  F32 v{};
  for (int r = 0; r < kRows; ++r) v[r] = from[r];
  return v;
#endif
}
template <int kRows>
inline bool any_above(F32 a, F32 b) {
#if SVDQ_TARGET == 512
  const __mmask16 above = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
  return (above & ((1 << kRows) - 1)) != 0;
#else
  bool above = false;
  for (int r = 0; r < kRows; ++r) above |= a[r] > b[r];
  return above;
#endif
}

// Lane indices that take groups of kSize lanes from two vectors, alternately: the even groups of each (kOdd = 0) or
// the odd ones.
template <int kSize, int kOdd>
struct LaneGroups {
  alignas(kVecBytes) int32_t lane[kVecLanes];
  constexpr LaneGroups() : lane{} {
    for (int i = 0; i < kVecLanes; ++i) {
      lane[i] =
          i / (2 * kSize) * (2 * kSize) + i % kSize + i / kSize % 2 * kVecLanes + kOdd * kSize;
    }
  }
};
template <int kSize, int kOdd>
inline constexpr LaneGroups<kSize, kOdd> kLaneGroups;

// The larger numbers of each even group of kSize lanes and the odd one after it, from a and b alternately.
template <int kSize>
inline F32 merge_maxima(F32 a, F32 b) {
  return max(__builtin_shuffle(a, b, load<I32>(kLaneGroups<kSize, 0>.lane)),
             __builtin_shuffle(a, b, load<I32>(kLaneGroups<kSize, 1>.lane)));
}

// The largest number of each of up to four vectors: lane i is that of vector i.
template <int kRows>
inline F32 row_maxima(const F32 (&v)[kRows]) {
  static_assert(kRows >= 1 && kRows <= 4 && kVecLanes % 4 == 0);
  constexpr int kLast = kRows - 1;
  F32 all = merge_maxima<1>(v[0], v[kRows > 1 ? 1 : 0]);
  all = merge_maxima<2>(all, kRows > 2 ? merge_maxima<1>(v[kRows > 2 ? 2 : 0], v[kLast]) : all);
  if constexpr (kVecLanes > 4) all = merge_maxima<4>(all, all);
  if constexpr (kVecLanes > 8) all = merge_maxima<8>(all, all);
  return all;
}

// Transposes the square v: every pass interleaves the first half of the vectors with the second.
inline void transpose(F32 (&v)[kVecLanes]) {
  constexpr int kHalf = kVecLanes / 2;
  I32 low, high;
  for (int i = 0; i < kVecLanes; ++i) {
    low[i] = i / 2 + i % 2 * kVecLanes;
    high[i] = low[i] + kHalf;
  }
  for (int pass = 1; pass < kVecLanes; pass *= 2) {
    F32 mixed[kVecLanes];
    for (int i = 0; i < kHalf; ++i) {
      mixed[2 * i] = __builtin_shuffle(v[i], v[i + kHalf], low);
      mixed[2 * i + 1] = __builtin_shuffle(v[i], v[i + kHalf], high);
    }
    for (int i = 0; i < kVecLanes; ++i) v[i] = mixed[i];
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
