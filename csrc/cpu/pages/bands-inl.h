// Bands of key codes: their lines, unpacked or multiplied as they are.
#pragma once

#include <cstdint>

#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Calls fn<width>(count, index) for every width that has channels, widest first.
template <typename Fn>
inline void for_each_band(const Bands& bands, const Fn& fn) {
  static_assert(kWidths[0] == 8 && kWidths[1] == 4 && kWidths[2] == 2 && kWidths[3] == 1);
  if (bands.count[0]) fn.template operator()<8>(bands.count[0], 0);
  if (bands.count[1]) fn.template operator()<4>(bands.count[1], 1);
  if (bands.count[2]) fn.template operator()<2>(bands.count[2], 2);
  if (bands.count[3]) fn.template operator()<1>(bands.count[3], 3);
}

// Codes of code tile k of a line.
template <int kWidth>
inline U32 tile_codes(U32 line, int k) {
  constexpr uint32_t kMask = ((1u << kWidth) - 1) * 0x01010101u;
  return kWidth == 8 ? line : (line >> (k * kWidth)) & kMask;
}

// First of a vector's tokens in a page.
inline int tokens_at(int group, int part) { return group * kLanes + part * kVecLanes; }

// Unpacks the codes of one band to a byte each; code tiles stay in order.
template <int kWidth>
inline void unpack_band(const uint8_t* lines, int count, uint8_t* bytes) {
  constexpr int kLineTiles = 8 / kWidth;
  for (int line = 0; line < count * kGroups / kQuad / kLineTiles; ++line) {
    for (int part = 0; part < kParts; ++part) {
      const U32 bits = load<U32>(lines + line * kLineBytes + part * kVecBytes);
      for (int k = 0; k < kLineTiles; ++k) {
        store(bytes + (line * kLineTiles + k) * kLineBytes + part * kVecBytes,
              tile_codes<kWidth>(bits, k));
      }
    }
  }
}

// Unpacks the codes of all bands to a byte each, [rank, 64].
inline void unpack_bands(const uint8_t* lines, const Bands& bands, uint8_t* bytes) {
  for_each_band(bands, [&]<int kWidth>(int count, int) {
    unpack_band<kWidth>(lines, count, bytes);
    lines += band_bytes(kWidth, count);
    bytes += count * kPageTokens;
  });
}

template <int kWidth>
inline I32 dot_codes(I32 acc, U32 codes, U32 folded) {
  return kWidth == 8 ? dot_wide(acc, codes, folded) : dot(acc, codes, folded);
}

// acc[row][group] += codes . folded rows over one band, for the lanes of one part. kUnpacked: codes have a byte each.
template <int kWidth, bool kUnpacked, int kRows>
[[gnu::always_inline]] inline void accumulate_band(const uint8_t* lines, int count,
                                                   const int8_t* folded, int64_t row_stride,
                                                   int64_t quad_stride, int part,
                                                   I32 (&acc)[kRows][kGroups]) {
  constexpr int kLineTiles = kUnpacked ? 1 : 8 / kWidth;  // code tiles in a line
  constexpr int kStepTiles =
      kLineTiles > kGroups ? kLineTiles : kGroups;  // in whole lines and quads
  const uint8_t* line = lines + part * kVecBytes;
  for (int quad = 0; quad < count / kQuad; quad += kStepTiles / kGroups) {
    for (int l = 0; l < kStepTiles / kLineTiles; ++l, line += kLineBytes) {
      const U32 bits = load<U32>(line);
      for (int k = 0; k < kLineTiles; ++k) {
        const int tile = l * kLineTiles + k;
        const U32 codes = kUnpacked ? bits : tile_codes<kWidth>(bits, k);
        for (int r = 0; r < kRows; ++r) {
          const U32 w = splat_quad(folded + r * row_stride + (quad + tile / kGroups) * quad_stride);
          acc[r][tile % kGroups] = dot_codes<kWidth>(acc[r][tile % kGroups], codes, w);
        }
      }
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
