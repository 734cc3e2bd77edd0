// The packed format, version 3. This header is the only place that knows where a code, a scale or
// a page lies; CPU kernels, CUDA kernels, bindings, tests and Python read it from here.
//
// A page holds 64 consecutive tokens ("slots") of one sequence, for all KV heads of one layer. Keys
// and values live in two pools of pages, [num_pages, k_page_bytes] and [num_pages, v_page_bytes]; a
// page table maps the n-th 64 tokens of a sequence to a row of the pools. Slot s of a sequence
// holds the token at position s + first_position.
//
//   key page   | head 0: pre: 8-bit band | 4-bit | 2-bit | 1-bit | post: 8-bit ... | head 1: ... |
//   value page | head 0: 64 scales, codes        | head 1: ... |    (2-, 3- and 4-bit values)
//              | head 0: 64 x head_dim numbers   | head 1: ... |    (16- and 32-bit values)
//
// Codes are stored in lines of 64 bytes ("quad layout"): 16 lanes of 4 bytes. One unit is 16 lanes
// x 4 codes of one width; a width below 8 puts 8 / width units into a line, unit k in the bits
// k * width and up.
//
//   keys    unit u = quad * 4 + group    lane = token of the 16-token group, byte = channel
//   values  unit u = block * 16 + quad   lane = channel of the 16-channel block, byte = token
//
//   byte       0     1     2     3   |  4     5     6     7   | ... 63
//   keys      t0c0  t0c1  t0c2  t0c3 | t1c0  t1c1  t1c2  t1c3 | ... t15c3   (a quad, a group)
//   values    c0t0  c0t1  c0t2  c0t3 | c1t0  c1t1  c1t2  c1t3 | ... c15t3   (a block, a quad)
//
// So one 32-bit lane holds what an integer dot product of four (vpdpbusd, dp4a) or a thread of an
// m16n8k16 fragment consumes, and narrower widths unpack with a shift and a mask, never a shuffle.
// A band of 8-, 4- or 2-bit channels is a multiple of 4 channels and a band of 1-bit channels a
// multiple of 8, so every band ends on a line: b bits a channel take 64 * b / 8 bytes a channel and
// page, without padding.
//
// A head's bands are those of its pre-RoPE channels, coded before RoPE, then those of its post-RoPE channels,
// coded after it; where both occur (hybrid) the post-RoPE channels code the rest that the pre-RoPE channels leave. With
// mid(b) = (2^b - 1) / 2 and R_t the rotation to position t, a key is decoded as
//
//   k_t = R_t (mean + sum_pre (code_j - mid(width_j)) * scale_j * basis_j)
//         + post_mean + sum_post (code_j - mid(width_j)) * scale_j * basis_j,
//
// where one of the two lines is absent for "pre" (the second) and "post" (the first; its mean is
// then that of the post-RoPE part).
//
// A token's values of a head are rotated by a fixed orthogonal matrix Q before they are coded
// (kernels/rotation.h), and have one scale, a byte: with codes of `bits` bits
//
//   v_t = Q^T ((code_t - mid(bits)) * scale_t).
//
// 3-bit codes are in two planes of lines, their low two bits first, then their high bit.
//
// What is said here is how "plain" codes lie in pages. The layout names the coding of keys and of
// values (KeyCoding, ValueCoding): another arrangement of bytes is another coding with a number of its own, and
// pages of the older ones stay as they are.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SVDQ_HOST_DEVICE __host__ __device__
#else
#define SVDQ_HOST_DEVICE
#endif

namespace svdq {

inline constexpr int kFormatVersion = 3;
inline constexpr int kPageTokens = 64;
inline constexpr int kLineBytes = 64;
inline constexpr int kLanes = 16;                        // 32-bit lanes of a line
inline constexpr int kQuad = 4;                          // codes of a lane
inline constexpr int kGroups = kPageTokens / kLanes;     // token groups of a page (keys)
inline constexpr int kTokenQuads = kPageTokens / kQuad;  // token quads of a page (values)
inline constexpr int kNumWidths = 4;
inline constexpr int kWidths[kNumWidths] = {8, 4, 2, 1};  // band order inside a page
inline constexpr int kMaxHeadDim = 512;
inline constexpr int kNoSlot = INT32_MAX;  // in lists of slots: no token

// kWidths[w], also in device code, which cannot index an array of the host.
SVDQ_HOST_DEVICE constexpr int band_width(int w) { return 8 >> w; }
static_assert(band_width(0) == kWidths[0] && band_width(1) == kWidths[1] &&
              band_width(2) == kWidths[2] && band_width(3) == kWidths[3]);

static_assert(kLanes * kQuad == kLineBytes, "a line is 16 lanes of 4 codes");

// Number of channels that a band of this width must be a multiple of, so that it ends on a line.
SVDQ_HOST_DEVICE constexpr int band_granularity(int width) { return width == 1 ? 8 : 4; }
static_assert(8 * kPageTokens * 1 / 8 == kLineBytes, "eight 1-bit channels fill one line");
static_assert(4 * kPageTokens * 2 / 8 == kLineBytes, "four 2-bit channels fill one line");

// The space in which the keys of a layer are coded. The numbers are part of the format.
enum class RopeMode : int {
  kPre = 0,   // un-rotated keys: pre-RoPE channels, rotated back while attending (the paper)
  kPost = 1,  // rotated keys: post-RoPE channels, folded into the query
  // pre-RoPE channels, then what they leave of the rotated key as post-RoPE channels; each may be none.
  // Without pre-RoPE channels the un-rotated mean alone is rotated: "rotated mean".
  kHybrid = 2,
};

// Bytes of the codes of `count` channels of one width in a page.
template <typename Int>
SVDQ_HOST_DEVICE constexpr Int band_bytes(int width, Int count) {
  return count * width * kPageTokens / 8;
}

// Pages that so many tokens take from the start of a page on.
template <typename Int>
SVDQ_HOST_DEVICE constexpr Int page_count(Int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

// Channels of one head by width, widest first. pre-RoPE channels live before RoPE, post-RoPE channels after.
struct Bands {
  int count[kNumWidths];

  SVDQ_HOST_DEVICE constexpr int rank() const { return count[0] + count[1] + count[2] + count[3]; }
  // Width of channel j of these, 0 past the last one.
  SVDQ_HOST_DEVICE constexpr int width(int j) const {
    for (int w = 0; w < kNumWidths; ++w) {
      if (j < count[w]) return band_width(w);
      j -= count[w];
    }
    return 0;
  }
  SVDQ_HOST_DEVICE constexpr int bits() const {
    return count[0] * 8 + count[1] * 4 + count[2] * 2 + count[3];
  }
  SVDQ_HOST_DEVICE constexpr int page_bytes() const { return bits() * kPageTokens / 8; }
};
static_assert(Bands{{0, 4, 8, 8}}.page_bytes() == 320, "4*4 + 8*2 + 8*1 bits = 5 bytes a token");

// Position of a code: a byte and a shift inside it.
struct CodeAddress {
  int64_t byte;
  int shift;
};

// Address of code tile `unit`, lane `lane`, element `element` (0..3) in a band of one width.
SVDQ_HOST_DEVICE constexpr CodeAddress code_tile_address(int width, int unit, int lane,
                                                         int element) {
  const int units_per_line = 8 / width;
  return {int64_t{unit / units_per_line} * kLineBytes + lane * kQuad + element,
          unit % units_per_line * width};
}

// The middle of the codes of a width; scale times what a code is above or below it is what it says.
SVDQ_HOST_DEVICE constexpr float mid_code(int width) {
  return static_cast<float>((1 << width) - 1) / 2;
}

// Key code of channel `channel` of a band (counted inside the band) and slot `token` of the page.
SVDQ_HOST_DEVICE constexpr CodeAddress key_code_address(int width, int channel, int token) {
  return code_tile_address(width, channel / kQuad * kGroups + token / kLanes, token % kLanes,
                           channel % kQuad);
}

// Value code of channel `channel` of a head and slot `token` of the page (0..63).
SVDQ_HOST_DEVICE constexpr CodeAddress value_code_address(int width, int channel, int token) {
  return code_tile_address(width, channel / kLanes * kTokenQuads + token / kQuad, channel % kLanes,
                           token % kQuad);
}

static_assert(key_code_address(4, 5, 17).byte == 128 + 1 * 4 + 1 &&
              key_code_address(4, 5, 17).shift == 4);
static_assert(key_code_address(1, 7, 63).byte == 15 * 4 + 3 &&
              key_code_address(1, 7, 63).shift == 7);
static_assert(value_code_address(4, 17, 6).byte == 8 * 64 + 1 * 4 + 2 &&
              value_code_address(4, 17, 6).shift == 4);

SVDQ_HOST_DEVICE constexpr int get_code(const uint8_t* codes, CodeAddress at, int width) {
  return (codes[at.byte] >> at.shift) & ((1 << width) - 1);
}

SVDQ_HOST_DEVICE constexpr void put_code(uint8_t* codes, CodeAddress at, int width, int code) {
  const int mask = ((1 << width) - 1) << at.shift;
  codes[at.byte] = static_cast<uint8_t>((codes[at.byte] & ~mask) | (code << at.shift));
}

// How keys and values became bytes. The numbers are part of the format.
enum class KeyCoding : int { kPlain = 0 };
enum class ValueCoding : int {
  kNumbers = 0,  // as they are, 16 or 32 bits
  kPlain = 1,    // rotated, equal steps, a scale a token: 2, 3 or 4 bits
};

inline constexpr int kValueBits[] = {4, 3, 2};  // of packed values

// Bits of a value's code in the first plane of lines; the others are in the second.
SVDQ_HOST_DEVICE constexpr int low_plane_width(int bits) { return bits == 3 ? 2 : bits; }

// Offsets inside the value page of one head. Packed values have 64 scales and then their codes;
// exact ones are [64, head_dim] in the model's dtype.
struct ValueLayout {
  int bits;  // 2, 3, 4: packed; 16, 32: exact
  int head_dim;

  SVDQ_HOST_DEVICE constexpr bool packed() const { return bits <= 4; }
  SVDQ_HOST_DEVICE constexpr int scale_bytes() const { return packed() ? kPageTokens : 0; }
  SVDQ_HOST_DEVICE constexpr int64_t code_offset() const { return scale_bytes(); }
  // The second plane of 3-bit codes.
  SVDQ_HOST_DEVICE constexpr int64_t high_plane_offset() const {
    return code_offset() + band_bytes(low_plane_width(bits), int64_t{head_dim});
  }
  SVDQ_HOST_DEVICE constexpr int64_t page_bytes() const {
    return code_offset() + band_bytes(bits, int64_t{head_dim});
  }
};
static_assert(ValueLayout{4, 128}.page_bytes() == 64 + 128 * 64 / 2);
static_assert(ValueLayout{3, 64}.high_plane_offset() == 64 + 64 * 64 / 4);
static_assert(ValueLayout{16, 128}.page_bytes() == 64 * 128 * 2);

// Code of channel `channel` and slot `token` in the value page of one head.
SVDQ_HOST_DEVICE constexpr int get_value_code(const uint8_t* page, ValueLayout value, int channel,
                                              int token) {
  const int low = low_plane_width(value.bits), high = value.bits - low;
  const int code =
      get_code(page + value.code_offset(), value_code_address(low, channel, token), low);
  if (high == 0) return code;
  const CodeAddress at = value_code_address(high, channel, token);
  return code | get_code(page + value.high_plane_offset(), at, high) << low;
}

// The scale of a token's values is an IEEE half without its sign and its last seven bits: five bits of exponent and
// three of mantissa, 2^-17 to 61440, and 0.
inline constexpr int kScaleShift = 7;
inline constexpr int kLargestScale = 0xf7;  // below it lie no infinities

SVDQ_HOST_DEVICE constexpr uint16_t scale_as_half(int byte) {
  return static_cast<uint16_t>(byte << kScaleShift);
}
// Byte of a scale that is not negative, rounded to half before: to nearest, ties to even.
SVDQ_HOST_DEVICE constexpr int scale_byte(uint16_t half) {
  const int rounded = (half + 63 + (half >> kScaleShift & 1)) >> kScaleShift;
  return rounded < kLargestScale ? rounded : kLargestScale;
}
static_assert(scale_byte(0x3c00) == 0x78 && scale_as_half(0x78) == 0x3c00, "1 is exact");

// The integers that describe a layer's pages wherever they are passed or saved ("layout"):
// [version, num_kv_heads, head_dim, rope_mode, key coding, value coding,
//  then per head: pre-RoPE counts of kWidths, post-RoPE counts of kWidths, bits of a value].
inline constexpr int kLayoutHeader = 6;
inline constexpr int kLayoutPerHead = 2 * kNumWidths + 1;

}  // namespace svdq
