// The RoPE pairs that the CPU backends absorb into few queries (csrc/cpu/attend/slow_pairs-inl.h), and the
// precision that they keep. A pair's part of a score is |q_i| |k_i| at most, of the two numbers of query and
// key; errors below are shares of it.
#pragma once

#include <cstdint>

#include "kernels/format.h"

namespace svdq {

// Above this number of query rows a KV head, reconstructing keys is less work than absorbing.
inline constexpr int64_t kAbsorbRows = 16;
// Frequency up to which a pair is absorbed: in a page it rotates by at most half a radian either way
// from the middle, a. Parts of degree 3 and up in the offset are left out, at most 2 J_3(a) + ... <
// a^3 / 23, 5.4e-3 of the fastest pair's part.
inline constexpr float kAbsorbedFastest = 1.0f / kPageTokens;
// Frequency up to which the part of degree 2 is left out too: 2 J_2(a) < a^2 / 4, at most 3.9e-3.
inline constexpr float kLinearFastest = 1.0f / (4 * kPageTokens);
// Frequency up to which a pair is interpolated between pages of a chunk: a page rotates it by 1/16 at most,
// so a cubic through four pages, five apart, is off by 5^4 / 24 of that to the fourth: 4e-4 at most.
inline constexpr float kSmoothFastest = 1.0f / (16 * kPageTokens);

// Pages of a chunk; smooth pairs are interpolated between some of them (nodes).
inline constexpr int kChunkPages = 16;
inline constexpr int kNodes = 4;
inline constexpr int kNodeStep = 5;
static_assert(kChunkPages == (kNodes - 1) * kNodeStep + 1);

// Bounds on the parts that are left out of a pair of this frequency, and of the mean, which is held to
// degree 4: 2 J_5(a) + ...
constexpr double absorbed_error(double frequency) {
  const double a = frequency * (kPageTokens - 1) / 2, angle = frequency * kPageTokens * kNodeStep;
  double error = a * a * a / 23;
  if (frequency <= kLinearFastest) error += a * a / 4;
  if (frequency <= kSmoothFastest) error += angle * angle * angle * angle / 24;
  return error;
}
constexpr double absorbed_mean_error(double frequency) {
  const double a = frequency * (kPageTokens - 1) / 2;
  return a * a * a * a * a / 1900;
}

}  // namespace svdq
