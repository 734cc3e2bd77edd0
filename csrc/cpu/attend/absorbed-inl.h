// Queries absorbed into the slow RoPE pairs of pre-RoPE channels: the operands, and their memory.
#pragma once

#include <cstdint>

#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Operands of a tile of kTileRows query rows lie quad by quad: four channels of row 0, of row 1, ...
inline constexpr int kQuadLanes = kTileRows * kQuad;
inline constexpr int kQuadVecs = kQuadLanes / kVecLanes;
static_assert(kQuadVecs * kVecLanes == kQuadLanes);
// Lanes of a head's operands, in whole lines of bytes.
inline int absorbed_lanes(int rank) {
  return static_cast<int>(round_up(rank / kQuad * kQuadLanes, 4 * kVecLanes));
}
// Constants of all rows and degrees, in whole vectors.
inline constexpr int kConstantLanes = round_up(kConstantDegrees * kTileRows, kVecLanes);

// A tile of queries absorbed into a head's pre-RoPE channels, before the angles of a page.
struct AbsorbedQuery {
  int32_t* rotary;  // [pairs, lanes]: two 16-bit numbers, factors of the cosine and the sine
  float* fixed;     // [lanes]: the share of channels that do not rotate, in units of `scale`
  float* scale;     // [kTileRows]: the value of a product of 1, in units of log2
  float* constant;  // [1 + 2 * pairs, kConstantLanes]: the mean's share, which multiplies no code
  const uint8_t* mids;  // [lanes]: twice the mid code
  int lanes;
  int pairs;
};

// Operands that multiply a page's codes: [kDegrees, lanes] each, with a scale and a constant per degree and row.
struct AbsorbedPage {
  int8_t* high;
  int8_t* low;
  float* sums;
  float scale[kDegrees][kTileRows];
  float constant[kConstantDegrees][kTileRows];
};

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
