// Packed codes to tensor-core operands.
//
// A code c < 256 in the low bits of 16 zero bits is, read as a half, the subnormal number c *
// 2^-24: tensor cores multiply subnormal halves exactly, so codes need no conversion at all, only
// to be put apart. What multiplies them is scaled by 2^24 afterwards, in float.
//
// A line's 32-bit lane holds, for each of its units, 4 codes in 4 bytes: for keys 4 channels of a
// token, for values 4 tokens of a channel. A thread of an A fragment holds 4 columns of a row, and
// columns may come in any order as long as B has the same; so bytes 0 and 2 make one register and
// bytes 1 and 3 the other, each with a shift and a mask.
#pragma once

#include "kernels/params.h"
#include "kernels/machine/device.cuh"

namespace svdq::device {

inline constexpr float kCodeUnit = 0x1p24f;  // a code as a half, times this, is the code

// Place, within a quad, of the column that element `i` of a fragment register pair holds.
SVDQ_HOST_DEVICE constexpr int quad_element(int i) { return (i & 1) * 2 + (i >> 1); }
static_assert(quad_element(0) == 0 && quad_element(1) == 2 && quad_element(2) == 1);

// Codes of unit `unit` of a lane: elements 0 and 1 (bytes 0, 2) and elements 2 and 3 (bytes 1, 3).
template <int kWidth>
SVDQ_DEVICE void unpack_quad(uint32_t lane, int unit, uint32_t& low, uint32_t& high) {
  constexpr uint32_t kMask = ((1u << kWidth) - 1) * 0x00010001u;
  low = lane >> (unit * kWidth) & kMask;
  high = lane >> (unit * kWidth + 8) & kMask;
}

// Index of 16-byte piece `i` of a band of lines in shared memory. The four threads that share rows
// of a fragment read lanes of lines 64 * width / 2 bytes apart (keys: neighbouring quads; values:
// runs of 16 tokens), which would all meet in the same banks. Exchanging pieces within 128 bytes
// puts the eight lanes of each in banks of their own. 1-bit lines hold two quads in the same lanes;
// width 0 stands for what is no line and stays in order.
template <int kWidth>
SVDQ_HOST_DEVICE constexpr int swizzle(int i) {
  return kWidth == 8   ? i ^ (i >> 3 & 6)
         : kWidth == 4 ? i ^ (i >> 2 & 6)
         : kWidth == 2 ? i ^ (i >> 2 & 2)
                       : i;
}

// Lane `lane` (0..15) of line `line` of a swizzled run.
template <int kWidth>
SVDQ_DEVICE uint32_t load_lane(const uint8_t* lines, int line, int lane SVDQ_CALL_SITE) {
  const int piece = swizzle<kWidth>(line * 4 + lane / 4);
  return load(reinterpret_cast<const uint32_t*>(lines + piece * 16) + lane % 4 SVDQ_PASS_CALL_SITE);
}

// Starts to copy `bytes` of lines of one width into shared memory, swizzled; `threads` threads take
// part, of which this is number `thread`.
template <int kWidth>
SVDQ_DEVICE void copy_lines(uint8_t* to, const uint8_t* from, int bytes, int thread,
                            int threads SVDQ_CALL_SITE) {
  for (int i = thread; i < bytes / 16; i += threads)
    copy_async(to + swizzle<kWidth>(i) * 16, from + i * 16, 16 SVDQ_PASS_CALL_SITE);
}

// Clears the scales of quad `quad` of a page of packed values, but for `tokens`, which has has(token).
template <typename Tokens>
SVDQ_DEVICE void clear_scales(uint8_t* page, int quad, const Tokens& tokens) {
  uint32_t keep = 0;
  SVDQ_UNROLL
  for (int e = 0; e < kQuad; ++e) keep |= tokens.has(quad * kQuad + e) ? 0xffu << (8 * e) : 0u;
  uint32_t* scales = reinterpret_cast<uint32_t*>(page) + quad;
  store(scales, load(scales) & keep);
}

// A operand [16 tokens, 16 channels] of keys: quads 4 step .. 4 step + 3 of a band of `quads`,
// tokens of group `group`. Quads past the band's end give zeros.
template <int kWidth>
SVDQ_DEVICE void load_key_fragment(const uint8_t* band, int quads, int step, int group,
                                   uint32_t (&a)[4]) {
  constexpr int kUnits = 8 / kWidth;
  const int quad = step * 4 + lane_index() % 4, row = lane_index() / 4;
  const int unit = quad * kGroups + group;
  for (int half = 0; half < 2; ++half) {  // rows and rows + 8
    const uint32_t lane =
        quad < quads ? load_lane<kWidth>(band, unit / kUnits, row + 8 * half) : 0u;
    unpack_quad<kWidth>(lane, unit % kUnits, a[half], a[half + 2]);
  }
}

// Calls fn.template operator()<bits>() for the bits of packed values.
template <typename Fn>
SVDQ_DEVICE void with_value_bits(int bits, const Fn& fn) {
  static_assert(kValueBits[0] == 4 && kValueBits[1] == 3 && kValueBits[2] == 2);
  if (bits == 4) {
    fn.template operator()<4>();
  } else if (bits == 3) {
    fn.template operator()<3>();
  } else {
    fn.template operator()<2>();
  }
}

// Calls fn.template operator()<width, shift>(offset) for the planes of a head's values: the width of their lines,
// the place of their bits in a code, and where they begin in the page.
template <typename Fn>
SVDQ_DEVICE void for_each_plane(const ValueLayout& value, const Fn& fn) {
  if (value.bits == 4) {
    fn.template operator()<4, 0>(value.code_offset());
  } else {
    fn.template operator()<2, 0>(value.code_offset());
    if (value.bits == 3) fn.template operator()<1, 2>(value.high_plane_offset());
  }
}

// Calls fn.template operator()<width>(count) for every width of `bands` that has channels.
template <typename Fn>
SVDQ_DEVICE void for_each_band(const Bands& bands, const Fn& fn) {
  static_assert(kWidths[0] == 8 && kWidths[1] == 4 && kWidths[2] == 2 && kWidths[3] == 1);
  if (bands.count[0]) fn.template operator()<8>(bands.count[0]);
  if (bands.count[1]) fn.template operator()<4>(bands.count[1]);
  if (bands.count[2]) fn.template operator()<2>(bands.count[2]);
  if (bands.count[3]) fn.template operator()<1>(bands.count[3]);
}

// The same for every band of a head, pre-RoPE channels first. All lanes of a warp take part.
template <typename Fn>
SVDQ_DEVICE void for_each_part(const HeadPlan& head, const Fn& fn) {
  // A loop, since code for every width twice makes the compiler spill.
  for (int part = 0; part < 2; ++part) {
    Bands bands;
    SVDQ_UNROLL
    for (int w = 0; w < kNumWidths; ++w)
      bands.count[w] = part == 0 ? head.pre.count[w] : head.post.count[w];
    for_each_band(bands, fn);
    sync_warp();  // lanes that had no line of the core begin the tail with the others
  }
}

}  // namespace svdq::device
