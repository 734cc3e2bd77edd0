// What the CPU backends leave out where they absorb pre-RoPE channels into few queries
// (csrc/cpu/attend/absorb-inl.h): which RoPE pairs, and to what precision. A pair's part of a score is that
// of the query's and the key's two numbers, |q_i| |k_i| at most; errors below are shares of it.
#pragma once

#include <cstdint>

#include "kernels/format.h"

namespace svdq {

// Query rows of a KV head up to which absorbing is less work than reconstructing keys.
inline constexpr int64_t kAbsorbRows = 16;
// Frequency up to which a pair is absorbed: in a page it turns by at most half a radian either way
// from the middle, a. Parts of degree 3 and up in the offset are left out, at most 2 J_3(a) + ... <
// a^3 / 23, 5.4e-3 of the fastest pair's part.
inline constexpr float kAbsorbedFastest = 1.0f / kPageTokens;
// Frequency up to which the part of degree 2 is left out too: 2 J_2(a) < a^2 / 4, at most 3.9e-3.
inline constexpr float kLinearFastest = 1.0f / (4 * kPageTokens);
// Frequency up to which a pair is interpolated between pages of a run: a page turns it by 1/16 at most,
// so a cubic through four pages, five apart, is off by 5^4 / 24 of that to the fourth: 4e-4 at most.
inline constexpr float kSmoothFastest = 1.0f / (16 * kPageTokens);

// Pages of a run, and of them those that smooth pairs are interpolated between (nodes).
inline constexpr int kRunPages = 16;
inline constexpr int kNodes = 4;
inline constexpr int kNodeStep = 5;
static_assert(kRunPages == (kNodes - 1) * kNodeStep + 1);

// Bound on what is left out of a pair of this frequency. Of the mean, which is held to degree 4, no more
// is left out than absorbed_mean_error, 2 J_5(a) + ...
constexpr double absorbed_error(double frequency) {
  const double a = frequency * (kPageTokens - 1) / 2, turn = frequency * kPageTokens * kNodeStep;
  double error = a * a * a / 23;
  if (frequency <= kLinearFastest) error += a * a / 4;
  if (frequency <= kSmoothFastest) error += turn * turn * turn * turn / 24;
  return error;
}
constexpr double absorbed_mean_error(double frequency) {
  const double a = frequency * (kPageTokens - 1) / 2;
  return a * a * a * a * a / 1900;
}

}  // namespace svdq
