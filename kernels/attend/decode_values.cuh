// Products of probabilities and packed values for the 8 query rows of a warp, on tensor cores: the
// outputs of a page are V^T P^T, 16 channels by 8 rows a product, of values that are still rotated.
//
// Rows r and r + 8 of a product stand for channels 2 r and 2 r + 1 of a block of 16, and step s of
// the four along the tokens takes quad 4 c + s from thread c of four, so that a thread's codes are
// 8 bytes of a line, all its own. Codes of narrower units than the first stay where they lie in
// their byte, which makes them 2^(width * unit) times as large; the other operand is as much smaller.
// The high plane of 3-bit codes is a second product: its bits lie at 2^s and count 4, so the other
// operand is 2^(2 - s) times as large. What the middle code takes off is the same for all channels: one
// more product, of the same operand with ones.
#pragma once

#include "kernels/attend/accumulate.cuh"
#include "kernels/pages/code_fragments.cuh"

namespace svdq::device {

// Probabilities of a page as B operands of four steps: thread 4 n + c holds row n, tokens 0 and 2
// of quad 4 c + s in the first half of step s, tokens 1 and 3 in the second.
using PageProbabilities = uint32_t[kGroups][2];

template <int kDim>
class DecodeValues {
 public:
  SVDQ_DEVICE void reset() {
    for (int i = 0; i < kBlocks; ++i) {
      for (int e = 0; e < 4; ++e) out_[i][e] = 0.0f;
    }
    middle_[0] = middle_[1] = 0.0f;
  }

  // Starts a warp's copy of the values of a page.
  SVDQ_DEVICE static void copy(uint8_t* to, const uint8_t* from, const ValueLayout& value) {
    if (lane_index() < kPageTokens / 16)
      copy_async(to + lane_index() * 16, from + lane_index() * 16);
    for_each_plane(value, [&]<int kWidth, int>(int64_t plane) {
      copy_lines<kWidth>(to + plane, from + plane, band_bytes(kWidth, value.head_dim), lane_index(),
                         kWarpSize);
    });
  }

  // Scales of slots that do not count may be anything, NaN too: a warp's zeros.
  SVDQ_DEVICE static void clear(uint8_t* page, TokenRange tokens) {
    if (lane_index() < kTokenQuads) clear_scales(page, lane_index(), tokens);
  }

  // out = out * factor + weight * P V, factor and weight of this thread's query rows.
  SVDQ_DEVICE void add(const uint8_t* page, const ValueLayout& value, const PageProbabilities& p,
                       const float (&factor)[2], const float (&weight)[2]) {
    // Maxima rise seldom after the first pages.
    if (ballot(factor[0] != 1.0f || factor[1] != 1.0f) != 0) rescale(factor);
    with_value_bits(value.bits, [&]<int kBits>() { add_codes<kBits>(page, value, p, weight); });
  }

  // Writes rows 0 .. 7, times factors of this thread's rows, to out + row * stride.
  SVDQ_DEVICE void write(float* out, int stride, const ValueLayout& value,
                         const float (&factor)[2]) const {
    const int row = lane_index() / 4, run = lane_index() % 4;
    const float mid = mid_code(value.bits);
    SVDQ_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      if (i * kLanes >= value.head_dim) break;
      SVDQ_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float middle = mid * middle_[j];
        store(reinterpret_cast<Floats2*>(out + (2 * run + j) * stride + i * kLanes + 2 * row),
              Floats2{(out_[i][j] - middle) * factor[j], (out_[i][j + 2] - middle) * factor[j]});
      }
    }
  }

 private:
  static constexpr int kBlocks = kDim / kLanes;

  // Probabilities times scales as B operands of a page's planes, and what turns products into values.
  template <int kBits>
  struct Operand {
    static constexpr bool kHigh = kBits == 3;
    static constexpr int kWidth = low_plane_width(kBits), kUnits = 8 / kWidth;
    // Bits that lie in front of the codes of step s.
    SVDQ_HOST_DEVICE static constexpr int place(int s) { return s % kUnits * kWidth; }

    uint32_t low[kGroups][2];
    uint32_t high[kHigh ? kGroups : 1][2];
    float unit[2];
  };

  SVDQ_DEVICE void rescale(const float (&factor)[2]) {
    SVDQ_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) out_[i][e] *= factor[e & 1];
    }
    middle_[0] *= factor[0];
    middle_[1] *= factor[1];
  }

  template <int kBits>
  SVDQ_DEVICE void add_codes(const uint8_t* page, const ValueLayout& value,
                             const PageProbabilities& p, const float (&weight)[2]) {
    using Factors = Operand<kBits>;
    constexpr int kWidth = Factors::kWidth, kUnits = Factors::kUnits;
    constexpr int kLines = kGroups / kUnits;  // of a thread's 4 quads
    constexpr int kBlockBytes = band_bytes(kWidth, kLanes), kHighBytes = band_bytes(1, kLanes);
    Factors b;
    prepare(page, p, weight, b);
    add_middle(b);

    const int row = lane_index() / 4, run = lane_index() % 4;
    const uint8_t* codes = page + value.code_offset() + row % 2 * 8;
    const int first = swizzle<kWidth>(run * kLines * 4 + row / 2) * 16;
    const uint8_t* high = page + value.high_plane_offset() + run / 2 * kLineBytes + row * 8;
    SVDQ_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      if (i * kLanes >= value.head_dim) break;
      float sum[4] = {};
      SVDQ_UNROLL
      for (int line = 0; line < kLines; ++line) {
        // The next line of a run lies across the swizzle's exchange of halves of 128 bytes.
        const int at = i * kBlockBytes + (first ^ (line * kLineBytes));
        const Words2 words = load(reinterpret_cast<const Words2*>(codes + at));
        SVDQ_UNROLL
        for (int unit = 0; unit < kUnits; ++unit) {
          const int s = line * kUnits + unit;
          constexpr uint32_t kMask = (1u << kWidth) - 1;
          multiply(sum, words, kMask << Factors::place(s), b.low[s]);
        }
      }
      if constexpr (Factors::kHigh) {
        Words2 words = load(reinterpret_cast<const Words2*>(high + i * kHighBytes));
        words.word[0] >>= run % 2 * kGroups;
        words.word[1] >>= run % 2 * kGroups;
        SVDQ_UNROLL
        for (int s = 0; s < kGroups; ++s) multiply(sum, words, 1u << s, b.high[s]);
      }
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) out_[i][e] = fused(sum[e], b.unit[e & 1], out_[i][e]);
    }
  }

  // Adds the product of the bits `mask` of every byte of two lanes.
  SVDQ_DEVICE static void multiply(float (&sum)[4], const Words2& lanes, uint32_t mask,
                                   const uint32_t (&b)[2]) {
    mask *= 0x00010001u;
    const uint32_t a[4] = {lanes.word[0] & mask, lanes.word[1] & mask, lanes.word[0] >> 8 & mask,
                           lanes.word[1] >> 8 & mask};
    MmaHalf::run(sum, a, b);
  }

  // Adds up the probabilities times scales as they multiply codes.
  template <int kBits>
  SVDQ_DEVICE void add_middle(const Operand<kBits>& b) {
    float sum[4] = {};
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      const uint32_t one = 0x00010001u << Operand<kBits>::place(s);
      MmaHalf::run(sum, {one, one, one, one}, b.low[s]);
    }
    SVDQ_UNROLL
    for (int j = 0; j < 2; ++j) middle_[j] = fused(sum[j], b.unit[j], middle_[j]);
  }

  // A power of two brings the largest scale to 2^13 .. 2^14, as far as a half can be multiplied, in the larger of
  // the operands.
  template <int kBits>
  SVDQ_DEVICE static void prepare(const uint8_t* page, const PageProbabilities& p,
                                  const float (&weight)[2], Operand<kBits>& b) {
    constexpr int kLeft =
        Operand<kBits>::kHigh ? 2 : 0;  // bits by which the high plane's is larger
    uint32_t scale[kGroups][2];
    load_scales(page, scale);
    uint32_t most = half2_max(scale[0][0], scale[0][1]);
    SVDQ_UNROLL
    for (int s = 1; s < kGroups; ++s) most = half2_max(most, half2_max(scale[s][0], scale[s][1]));
    most = half2_max(most, permute_bytes(most, most, 0x1032));
    most = half2_max(most, shuffle_xor(most, 1));
    most = half2_max(most, shuffle_xor(most, 2));
    const int exponent = static_cast<int>(most >> 10 & 0x1fu);
    const int wanted = 43 - exponent;  // of 2^13 over it, biased
    const int up = (wanted < 30 ? wanted : 30) - kLeft;
    const auto times = [&](int s, int i, int power) {
      const uint32_t factor = static_cast<uint32_t>(power) * (0x00010001u << 10);
      return half2_fma(half2_fma(scale[s][i], factor, 0u), p[s][i], 0u);
    };
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      SVDQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        b.low[s][i] = times(s, i, up - Operand<kBits>::place(s));
        if constexpr (Operand<kBits>::kHigh) b.high[s][i] = times(s, i, up + kLeft - s);
      }
    }
    const float down = int_as_float(static_cast<uint32_t>(127 + 15 + 24 - up) << 23);
    b.unit[0] = down * weight[0];
    b.unit[1] = down * weight[1];
  }

  // Scales of the 16 tokens from token 16 c on as halves, ordered as PageProbabilities.
  SVDQ_DEVICE static void load_scales(const uint8_t* page, uint32_t (&to)[kGroups][2]) {
    const Words4 words = load(reinterpret_cast<const Words4*>(page) + lane_index() % 4);
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      to[s][0] = (words.word[s] & 0x00ff00ffu) << kScaleShift;
      to[s][1] = (words.word[s] >> 8 & 0x00ff00ffu) << kScaleShift;
    }
  }

  float out_[kBlocks][4];  // channels 2 r (0, 1) and 2 r + 1 (2, 3) of query rows 2 c, 2 c + 1
  float middle_[2];        // of query rows 2 c, 2 c + 1, in codes
};

}  // namespace svdq::device
