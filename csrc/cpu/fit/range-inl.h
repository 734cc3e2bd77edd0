// The range of a channel's codes: the centre and scale of least error for a sample of latents.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

struct Range {
  float centre;
  float scale;        // distance between codes
  float gain = 1.0f;  // of decoded latents: it makes them unbiased
};

// Selects all lanes of a vector.
struct AllLanes {};
inline F32 select_lanes(AllLanes, F32 v, F32) { return v; }

// Calls fn(vector, lanes) for n latents, whose memory ends on a whole vector; `lanes` selects the latents in it.
template <typename Fn>
inline void for_each_vector(const float* latent, int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kVecLanes <= n; i += kVecLanes) fn(load<F32>(latent + i), AllLanes{});
  if (i < n) fn(load<F32>(latent + i), (1u << (n - i)) - 1);
}

// Sum of (error * inverse_span)^4 of n latents coded in `range` with the highest code `max_code`. Squares would
// sacrifice the few latents far from the mean, whose tokens attention would then misjudge; the factor keeps the powers
// of any latents within the range of a float.
inline float coding_error(const float* latent, int64_t n, Range range, float max_code,
                          float inverse_span) {
  const F32 inverse = splat(range.scale > 0 ? 1.0f / range.scale : 0.0f);
  const F32 mid = splat(max_code / 2);
  F32 error{};
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    const F32 x = v - range.centre;
    const F32 code = min(max(round_even(x * inverse + mid), F32{}), splat(max_code));
    const F32 miss = select_lanes(lanes, x - (code - mid) * range.scale, F32{});
    const F32 square = (miss * inverse_span) * (miss * inverse_span);
    error += square * square;
  });
  return reduce_add(error);
}

// Factor of decoded latents that makes them unbiased along the latents: with x = latent - centre and its decoded value
// y, <x, x> / <x, y>. Least errors shrink latents on average, and what shrinks all of them does not average out.
inline float unbiased_gain(const float* latent, int64_t n, Range range, float max_code) {
  const F32 inverse = splat(range.scale > 0 ? 1.0f / range.scale : 0.0f);
  const F32 mid = splat(max_code / 2);
  F32 squares{}, products{};
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    const F32 x = select_lanes(lanes, v - range.centre, F32{});
    const F32 code = min(max(round_even(x * inverse + mid), F32{}), splat(max_code));
    squares += x * x;
    products += x * (code - mid) * range.scale;
  });
  const float square = reduce_add(squares), product = reduce_add(products);
  const float gain = product > 0 ? square / product : 1.0f;
  return std::min(std::max(gain, 1 / kLargestGain), kLargestGain);
}

// The range of smallest error among the full range from minimum to maximum and multiples of the standard deviation
// about the mean, on a coarse grid and then a fine one. NaN if a latent is not finite.
inline Range search_range(const float* latent, int64_t n, int width) {
  const float max_code = static_cast<float>((1 << width) - 1);
  F32 sum{}, nothing{}, low = splat(latent[0]), high = low;
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    sum += select_lanes(lanes, v, F32{});
    nothing += select_lanes(lanes, v, F32{}) * 0.0f;
    low = min(low, select_lanes(lanes, v, low));
    high = max(high, select_lanes(lanes, v, high));
  });
  const float none = reduce_add(nothing);
  if (none != 0.0f) return {none, none};
  const float mean = reduce_add(sum) / static_cast<float>(n);
  const float min_latent = -reduce_max(-low), max_latent = reduce_max(high);
  F32 squares{};
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    const F32 x = select_lanes(lanes, v - mean, F32{});
    squares += x * x;
  });
  const float deviation = std::sqrt(reduce_add(squares) / static_cast<float>(n));

  Range best{(min_latent + max_latent) / 2, (max_latent - min_latent) / max_code};
  const float inverse_span = max_latent > min_latent ? 1.0f / (max_latent - min_latent) : 0.0f;
  float best_error = coding_error(latent, n, best, max_code, inverse_span);
  const auto attempt = [&](float multiple) {
    const Range range{mean, 2 * multiple * deviation / max_code};
    const float error = coding_error(latent, n, range, max_code, inverse_span);
    const bool better = error < best_error;
    if (better) best = range, best_error = error;
    return better;
  };
  float centre_multiple = 0;
  float multiple = 0.4f;
  for (int i = 0; i < 22; ++i, multiple *= 1.15f) {  // 0.4 .. 7.5 standard deviations
    if (attempt(multiple)) centre_multiple = multiple;
  }
  for (int i = -4; i <= 4 && centre_multiple > 0; ++i)
    attempt(centre_multiple * (1 + 0.03f * static_cast<float>(i)));
  if (width <= kUnbiasedWidth) best.gain = unbiased_gain(latent, n, best, max_code);
  return best;
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
