// The rotation of values before they are coded, and what turns a rotated token into codes.
//
// A token's values of a head are spread over all channels, so that they look like normal numbers
// whatever they were: signs, then a Hadamard matrix over the largest power of two that divides head_dim, then,
// where head_dim is m times that, a reflection of the m numbers in each place. The matrix is orthogonal:
//
//   Q = (I_m - 2/m 1 1^T) x H_k / sqrt(k) . diag(signs),   head_dim = m k,   channel = i k + j.
//
// Codes have equal steps. The scale is the one that makes the code of a token unbiased along the token,
// scale = <x, x> / <x, code>, not the one of least squares: that would shrink every token, and what shrinks all tokens
// does not average out over the tokens that attention adds up, as errors in random directions do.
#pragma once

#include <cstdint>

#include "kernels/format.h"

namespace svdq {

// Sign of a channel before the Hadamard matrix: a hash, the same for all heads and layers.
SVDQ_HOST_DEVICE constexpr float rotation_sign(int channel) {
  uint32_t x = static_cast<uint32_t>(channel) * 0x9e3779b1u;
  x ^= x >> 15;
  x *= 0x2c1b3c6du;
  x ^= x >> 12;
  x *= 0x297a2d39u;
  x ^= x >> 15;
  return x & 1 ? -1.0f : 1.0f;
}

// The largest power of two that divides head_dim: k.
SVDQ_HOST_DEVICE constexpr int rotation_block(int head_dim) { return head_dim & -head_dim; }

// 1 / sqrt(k) of a power of two k.
SVDQ_HOST_DEVICE constexpr float rotation_norm(int block) {
  float norm = 1.0f;
  for (; block >= 4; block /= 4) norm *= 0.5f;
  return block == 2 ? norm * 0.707106781186547524f : norm;
}
static_assert(rotation_block(80) == 16 && rotation_norm(16) == 0.25f);

// Distance between neighbouring codes before the scale is known, in units of the root mean square of the rotated
// numbers. Near the least squared error for normal numbers, a little wider where that costs nothing, so that fewer
// numbers are clipped. Chosen by the KL of docs/evaluation.md.
SVDQ_HOST_DEVICE constexpr float value_step(int bits) {
  return bits == 2 ? 1.05f : bits == 3 ? 0.65f : 0.335f;
}

}  // namespace svdq
