// Slow RoPE pairs of pre-RoPE channels as polynomials of the position in a page.
//
// A key is decoded as R_t (mean + sum_j latent_j x_j), where x_j is the scaled basis row of channel j and R_t rotates
// pair i by t * inv_freq[i]. With q_i and x_ij the two channels of a pair as complex numbers, its part of the score is
// Re(conj(q_i) x_ij e^(i phi)). In a page the angle phi is that of the page's middle plus a_i x, where x runs from -1
// to 1 over the page and a_i is half the angle of the page. For slow pairs a_i is small, and e^(i a x) is nearly a
// polynomial of degree 2 in x, here by Chebyshev's T_n and Bessel's J_n:
//   e^(i a x) = J_0(a) + 2 i J_1(a) T_1(x) - 2 J_2(a) T_2(x) + error, |error| < 2 J_3(a) + ... < a^3/23.
// So all slow pairs together are three numbers a channel and page, and a score is three integer dot products a token;
// only the fast pairs of a key have to be reconstructed.
//
// The numbers of a page are sums over pairs of two numbers that depend on the query and the channel alone
// (AbsorbedQuery::rotary) times the cosine and sine of the page's middle: 16-bit products, added in 32 bits. The sums
// of pairs that are slower still (smooth) are interpolated between four pages of a chunk of 16.
//
// Per page, D = 128, 48 channels, 4 query rows, 44 slow pairs, 30 of them smooth: about 420 vector operations for the
// 14 others, 180 for the smooth ones, 300 to round, 250 a degree to score.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "csrc/core/absorb.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

inline constexpr int kDegrees = 3;
// The mean is part of every key, so its share is kept to degree 4: that costs no products with codes.
inline constexpr int kConstantDegrees = 5;
// A cosine of 1 as an integer, and the largest sum of a channel's rotary numbers: products stay below 2^31.
inline constexpr float kCosineScale = 1 << 14;
inline constexpr float kMaxRotarySum = 1 << 16;

// Weight of node k at page `page` of the chunk (Lagrange).
constexpr float node_weight(int k, int page) {
  float weight = 1.0f;
  for (int j = 0; j < kNodes; ++j) {
    if (j != k)
      weight *= static_cast<float>(page - j * kNodeStep) / static_cast<float>((k - j) * kNodeStep);
  }
  return weight;
}

struct NodeWeights {
  float of[kChunkPages][kNodes];
  constexpr NodeWeights() : of{} {
    for (int page = 0; page < kChunkPages; ++page) {
      for (int k = 0; k < kNodes; ++k) of[page][k] = node_weight(k, page);
    }
  }
};
inline constexpr NodeWeights kNodeWeights;

// T_n at the tokens of a page.
struct Chebyshev {
  alignas(kLineBytes) float of[kConstantDegrees][kPageTokens];
  constexpr Chebyshev() : of{} {
    for (int t = 0; t < kPageTokens; ++t) {
      const float x = static_cast<float>(2 * t - (kPageTokens - 1)) / (kPageTokens - 1);
      of[0][t] = 1;
      of[1][t] = x;
      for (int n = 2; n < kConstantDegrees; ++n) of[n][t] = 2 * x * of[n - 1][t] - of[n - 2][t];
    }
  }
};
inline constexpr Chebyshev kChebyshev;

// The slow pairs of a rope: those with a term of degree 2 first, then the others, then the smooth ones.
struct SlowPairs {
  int pair[kMaxHeadDim / 2];
  int curved = 0;  // number of pairs with a term of degree 2
  int quick = 0;   // number of pairs that are not smooth
  int count = 0;
  // J_0, 2 J_1, -2 J_2, -2 J_3, 2 J_4 of half the page's angle, zeros to a whole vector.
  float factor[kConstantDegrees][kMaxHeadDim / 2 + kVecLanes] = {};
  // Cosine and sine from a page's start to its middle.
  float to_middle[2][kMaxHeadDim / 2 + kVecLanes] = {};

  bool slow(float frequency) const { return frequency <= kAbsorbedFastest; }
};

inline SlowPairs slow_pairs(const Rope& rope) {
  SlowPairs slow;
  const auto take = [&](float above, float max_frequency) {
    for (int i = 0; i < rope.rotary_pairs; ++i) {
      const float frequency = rope.inv_freq[i];
      if (!(frequency > above && frequency <= max_frequency)) continue;
      const float a = frequency * (kPageTokens - 1) / 2, b = a * a;
      slow.factor[0][slow.count] = 1 - b / 4 * (1 - b / 16 * (1 - b / 36));
      slow.factor[1][slow.count] = a * (1 - b / 8 * (1 - b / 24));
      slow.factor[2][slow.count] = -b / 4 * (1 - b / 12 * (1 - b / 32));
      slow.factor[3][slow.count] = -a * b / 24 * (1 - b / 16 * (1 - b / 40));
      slow.factor[4][slow.count] = b * b / 192 * (1 - b / 20);
      slow.to_middle[0][slow.count] = std::cos(a);
      slow.to_middle[1][slow.count] = std::sin(a);
      slow.pair[slow.count++] = i;
    }
  };
  take(kLinearFastest, kAbsorbedFastest);
  slow.curved = slow.count;
  take(kSmoothFastest, kLinearFastest);
  slow.quick = slow.count;
  take(-std::numeric_limits<float>::infinity(), kSmoothFastest);
  return slow;
}

// Rotations to the middles of pages.
struct MiddleAngles {
  float* cos_sin;  // [pages, 2, pairs]: cosines, then sines
  int32_t*
      packed_cos_sin;  // [pages, kDegrees, pairs]: two 16-bit numbers that multiply AbsorbedQuery::rotary
  int pairs;           // stride: slow pairs in whole vectors

  MiddleAngles at(int64_t page) const {
    return {cos_sin + page * 2 * pairs, packed_cos_sin + page * kDegrees * pairs, pairs};
  }
};

// Sets one page from `rotation` [2, rotary_pairs], the rotation to its first position.
inline void set_middle(const SlowPairs& slow, const double* rotation, int rotary_pairs,
                       const MiddleAngles& page) {
  float start[2][kMaxHeadDim / 2 + kVecLanes] = {};
  for (int i = 0; i < slow.count; ++i) {
    start[0][i] = static_cast<float>(rotation[slow.pair[i]]);
    start[1][i] = static_cast<float>(rotation[rotary_pairs + slow.pair[i]]);
  }
  for (int i = 0; i < slow.count; i += kVecLanes) {
    const F32 a = load<F32>(slow.to_middle[0] + i), b = load<F32>(slow.to_middle[1] + i);
    const F32 c = load<F32>(start[0] + i), s = load<F32>(start[1] + i);
    const F32 cosine = c * a - s * b, sine = s * a + c * b;
    store(page.cos_sin + i, cosine);
    store(page.cos_sin + page.pairs + i, sine);
    const auto put = [&](int degree, F32 low, F32 high) {
      const F32 factor = load<F32>(slow.factor[degree] + i) * kCosineScale;
      const I32 both = (round_to_int(low * factor) & 0xffff) | round_to_int(high * factor) << 16;
      store(page.packed_cos_sin + degree * page.pairs + i, both);
    };
    put(0, cosine, sine);
    put(1, -sine, cosine);
    put(2, cosine, sine);
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
