// The search for the range of a channel's codes among candidates, and the gain that makes decoded
// latents unbiased: pieces of the quantizer stage (kernels/fit/quantizer.cuh).
#pragma once

#include "kernels/machine/numbers.cuh"
#include "kernels/params.h"

namespace svdq::device {

inline constexpr int kFitShares = 64;  // of a head's runs; of a sample, its runs
inline constexpr int kMostSamples = kFitShares * kPageTokens;

struct CodeRange {
  float centre;
  float scale;  // distance between codes
};

SVDQ_DEVICE CodeRange full_range(float least, float most, float top) {
  return {(least + most) / 2, (most - least) / top};
}

SVDQ_DEVICE float warp_min(float x) { return -warp_max(-x); }

inline constexpr int kRangeThreads = 256;
inline constexpr int kRangeWarps = kRangeThreads / kWarpSize;
inline constexpr int kCoarse = 22;  // multiples of the deviation: 0.4 .. 7.5
inline constexpr int kFine = 9;     // round the best of them

static_assert(1 + kCoarse <= kWarpSize && kFine <= kWarpSize, "a lane a candidate");

struct RangePlan {
  float latent[kMostSamples];
  float part[3][kRangeWarps];
  float error[1 + kCoarse];  // of the full range and of the coarse grid
  float fine_error[kFine];
};

// Sum of the fourth powers of the errors, times `unit`, of the latents coded in `range` with the highest
// code `top`; a warp's work. Squares would give away the few latents far out, whose tokens attention
// would then misjudge; `unit` keeps the powers of any latents within the range of a float.
SVDQ_DEVICE float coding_error(const RangePlan& s, int count, const CodeRange& range, float top,
                               float unit) {
  const float inverse = range.scale > 0.0f ? 1.0f / range.scale : 0.0f, mid = top / 2;
  float error = 0.0f;
  for (int i = lane_index(); i < count; i += kWarpSize) {
    const float x = load(&s.latent[i]) - range.centre;
    const float place = x * inverse + mid, least = place > 0.0f ? place : 0.0f;
    const float code = static_cast<float>(round_to_int(least < top ? least : top));
    const float miss = (x - (code - mid) * range.scale) * unit;
    error += (miss * miss) * (miss * miss);
  }
  return warp_sum(error);
}

// The root of the factor that makes decoded latents unbiased along the latents (kernels/params.h); a warp's work.
SVDQ_DEVICE float root_gain(const RangePlan& s, int count, const CodeRange& range, float top) {
  const float inverse = range.scale > 0.0f ? 1.0f / range.scale : 0.0f, mid = top / 2;
  float square = 0.0f, product = 0.0f;
  for (int i = lane_index(); i < count; i += kWarpSize) {
    const float x = load(&s.latent[i]) - range.centre;
    const float place = x * inverse + mid, least = place > 0.0f ? place : 0.0f;
    const float code = static_cast<float>(round_to_int(least < top ? least : top));
    square += x * x;
    product += x * (code - mid) * range.scale;
  }
  square = warp_sum(square);
  product = warp_sum(product);
  float gain = product > 0.0f ? square / product : 1.0f;
  gain = gain > 1 / kLargestGain ? gain : 1 / kLargestGain;
  return square_root(gain < kLargestGain ? gain : kLargestGain);
}

// The error of candidate `lane`, as far as there are any.
SVDQ_DEVICE float candidate_error(const float* errors, int candidates) {
  return lane_index() < candidates ? load(&errors[lane_index()]) : int_as_float(0x7f800000u);
}

// The lane of the least number, of equals the first. All lanes get the same answer, NaN or not.
SVDQ_DEVICE int first_min(float x) {
  int lane = lane_index();
  SVDQ_UNROLL
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(x, mask);
    const int other_lane = shuffle_xor(lane, mask);
    if (other < x || (other == x && other_lane < lane)) x = other, lane = other_lane;
  }
  return shuffle(lane, 0);
}

// Multiple `i` of the coarse grid.
SVDQ_DEVICE float coarse_multiple(int i) {
  float multiple = 0.4f;
  for (int k = 0; k < i; ++k) multiple *= 1.15f;
  return multiple;
}
SVDQ_DEVICE float fine_multiple(float coarse, int i) {
  return coarse * (1.0f + 0.03f * static_cast<float>(i - kFine / 2));
}

// Least, most, mean and standard deviation of the latents, which are read into shared memory.
struct Spread {
  float least, most, mean, deviation;
};
SVDQ_DEVICE Spread load_latents(RangePlan& s, const float* latents, int count) {
  const float infinity = int_as_float(0x7f800000u);
  float sum = 0.0f, least = infinity, most = -infinity;
  for (int i = thread_index(); i < count; i += kRangeThreads) {
    const float x = load(&latents[i]);
    store(&s.latent[i], x);
    sum += x;
    least = x < least ? x : least;
    most = x > most ? x : most;
  }
  sum = warp_sum(sum);
  least = warp_min(least);
  most = warp_max(most);
  if (lane_index() == 0) {
    store(&s.part[0][warp_index()], sum);
    store(&s.part[1][warp_index()], least);
    store(&s.part[2][warp_index()], most);
  }
  sync_threads();
  sum = 0.0f;
  for (int warp = 0; warp < kRangeWarps; ++warp) {
    const float low = load(&s.part[1][warp]), high = load(&s.part[2][warp]);
    sum += load(&s.part[0][warp]);
    least = low < least ? low : least;
    most = high > most ? high : most;
  }
  const float mean = sum / static_cast<float>(count);
  float squares = 0.0f;
  for (int i = thread_index(); i < count; i += kRangeThreads) {
    const float x = load(&s.latent[i]) - mean;
    squares += x * x;
  }
  squares = warp_sum(squares);
  sync_threads();  // all have read the sums
  if (lane_index() == 0) store(&s.part[0][warp_index()], squares);
  sync_threads();
  squares = 0.0f;
  for (int warp = 0; warp < kRangeWarps; ++warp) squares += load(&s.part[0][warp]);
  return {least, most, mean, square_root(squares / static_cast<float>(count))};
}

}  // namespace svdq::device
