// Products of probabilities and packed values for the 8 query rows of a warp, on tensor cores: the
// outputs of a page are V^T P^T, 16 channels by 8 rows a product.
//
// Rows r and r + 8 of a product stand for channels 2 r and 2 r + 1 of a block of 16, and step s of
// the four along the tokens takes quad 4 c + s from thread c of four, so that a thread's codes are
// 8 bytes of a line, all its own. Codes of narrower units than the first stay where they lie in
// their byte, which makes them 2^(bits * unit) times as large; the other operand is as much smaller.
#pragma once

#include "kernels/attend/accumulate.cuh"

namespace svdq::device {

// Probabilities of a page as B operands of four steps: thread 4 n + c holds row n, tokens 0 and 2
// of quad 4 c + s in the first half of step s, tokens 1 and 3 in the second.
using PageProbabilities = uint32_t[kGroups][2];

template <int kDim, int kBits>
class DecodeValues {
 public:
  SVDQ_DEVICE void reset() {
    for (int i = 0; i < kBlocks; ++i) {
      for (int e = 0; e < 4; ++e) out_[i][e] = 0.0f;
    }
    for (int i = 0; i < kZeroTiles; ++i) {
      for (int e = 0; e < 4; ++e) zero_[i][e] = 0.0f;
    }
  }

  // Starts a warp's copy of the values of a page: scales and zero points, 64 a row, then codes.
  SVDQ_DEVICE static void copy(uint8_t* to, const uint8_t* from, const ValueLayout& value) {
    const int head = static_cast<int>(value.code_offset());
    for (int i = lane_index(); i < head / 16; i += kWarpSize)
      copy_async(to + swizzle_rows(i) * 16, from + i * 16);
    copy_lines<kBits>(to + head, from + head, static_cast<int>(value.page_bytes()) - head,
                      lane_index(), kWarpSize);
  }

  // Scales and zero points of slots that do not count may be anything, NaN too: a warp's zeros.
  SVDQ_DEVICE static void clear(uint8_t* page, const ValueLayout& value, TokenRange tokens) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(page);
    for (int i = lane_index(); i < value.groups() * kPageTokens; i += kWarpSize) {
      const int token = (swizzle_rows(i / 4) * 4 + i % 4) * 2 % kPageTokens;
      const uint32_t keep =
          (tokens.has(token) ? 0xffffu : 0u) | (tokens.has(token + 1) ? 0xffff0000u : 0u);
      store(&pairs[i], load(&pairs[i]) & keep);
    }
  }

  // out = out * factor + weight * P V, factor and weight of this thread's query rows.
  SVDQ_DEVICE void add(const uint8_t* page, const ValueLayout& value, const PageProbabilities& p,
                       const float (&factor)[2], const float (&weight)[2]) {
    // Maxima rise seldom after the first pages.
    if (ballot(factor[0] != 1.0f || factor[1] != 1.0f) != 0) rescale(factor);
    add_zeros(page, value, p, weight);

    const int lane = lane_index(), row = lane / 4, run = lane % 4;
    const uint8_t* codes = page + value.code_offset() + row % 2 * 8;
    const int first = swizzle<kBits>(run * kLines * 4 + row / 2) * 16;
    const int blocks_of_group = value.group_size / kLanes;
    uint32_t b[kGroups][2];
    float unit[2];
    int group = -1, left = 0;
    SVDQ_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      if (i * kLanes >= value.head_dim) break;
      if (left == 0) {
        left = blocks_of_group;
        prepare(page, ++group, p, weight, b, unit);
      }
      --left;
      float sum[4] = {};
      SVDQ_UNROLL
      for (int line = 0; line < kLines; ++line) {
        // The next line of a run lies across the swizzle's exchange of halves of 128 bytes.
        const int at = i * kBlockBytes + (first ^ (line * kLineBytes));
        const Words2 even = load(reinterpret_cast<const Words2*>(codes + at));
        const uint32_t odd[2] = {even.word[0] >> 8, even.word[1] >> 8};
        SVDQ_UNROLL
        for (int unit_of = 0; unit_of < kUnits; ++unit_of) {
          const uint32_t mask = ((1u << kBits) - 1) * 0x00010001u << unit_of * kBits;
          const uint32_t a[4] = {even.word[0] & mask, even.word[1] & mask, odd[0] & mask,
                                 odd[1] & mask};
          MmaHalf::run(sum, a, b[line * kUnits + unit_of]);
        }
      }
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) out_[i][e] = fused(sum[e], unit[e & 1], out_[i][e]);
    }
  }

  // Writes rows 0 .. 7 to out + row * stride.
  SVDQ_DEVICE void write(float* out, int64_t stride, const ValueLayout& value) const {
    const int row = lane_index() / 4, run = lane_index() % 4;
    const int blocks_of_group = value.group_size / kLanes;
    SVDQ_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      if (i * kLanes >= value.head_dim) break;
      const int group = i / blocks_of_group;
      SVDQ_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float zero = zero_of(group, j);
        store(reinterpret_cast<Floats2*>(out + (2 * run + j) * stride + i * kLanes + 2 * row),
              Floats2{out_[i][j] + zero, out_[i][j + 2] + zero});
      }
    }
  }

 private:
  static constexpr int kUnits = 8 / kBits;
  static constexpr int kLines = 4 / kUnits;  // of a thread's 4 quads
  static constexpr int kBlocks = kDim / kLanes;
  static constexpr int kBlockBytes = kTokenQuads / kUnits * kLineBytes;
  static constexpr int kZeroTiles = (kBlocks + 15) / 16;  // of 16 groups

  SVDQ_DEVICE void rescale(const float (&factor)[2]) {
    SVDQ_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) out_[i][e] *= factor[e & 1];
    }
    SVDQ_UNROLL
    for (int i = 0; i < kZeroTiles; ++i) {
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) zero_[i][e] *= factor[e & 1];
    }
  }

  // Index of 16-byte piece `i` of the rows of scales and zero points in shared memory: neighbouring rows, which
  // threads read at once, exchange which half of 32 bytes comes first.
  SVDQ_DEVICE static int swizzle_rows(int i) { return i ^ (i >> 3 & 1); }

  // Halves of 16 tokens from token 16 c on of a row, ordered as PageProbabilities.
  SVDQ_DEVICE static void load_token_quads(const uint8_t* page, int row,
                                           uint32_t (&to)[kGroups][2]) {
    const int first = swizzle_rows(row * 8 + lane_index() % 4 * 2);
    SVDQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Words4 words = load(reinterpret_cast<const Words4*>(page) + (first ^ i));
      SVDQ_UNROLL
      for (int s = 0; s < 2; ++s) {
        const uint32_t low = words.word[2 * s], high = words.word[2 * s + 1];
        to[2 * i + s][0] = permute_bytes(low, high, 0x5410);
        to[2 * i + s][1] = permute_bytes(low, high, 0x7632);
      }
    }
  }

  // Adds up probabilities times zero points of all groups: rows of a product stand for groups.
  SVDQ_DEVICE void add_zeros(const uint8_t* page, const ValueLayout& value,
                             const PageProbabilities& p, const float (&weight)[2]) {
    SVDQ_UNROLL
    for (int i = 0; i < kZeroTiles; ++i) {
      uint32_t a[kGroups][4] = {};
      SVDQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int group = i * 16 + half * 8 + lane_index() / 4;
        if (i * 16 + half * 8 >= kBlocks || group >= value.groups()) continue;
        uint32_t zero[kGroups][2];
        load_token_quads(page, value.groups() + group, zero);
        SVDQ_UNROLL
        for (int s = 0; s < kGroups; ++s) {
          a[s][half] = zero[s][0];
          a[s][half + 2] = zero[s][1];
        }
      }
      float sum[4] = {};
      SVDQ_UNROLL
      for (int s = 0; s < kGroups; ++s) MmaHalf::run(sum, a[s], p[s]);
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) zero_[i][e] = fused(sum[e], weight[e & 1], zero_[i][e]);
    }
  }

  // Sum for query row 2 c + j and a group: lane 4 (group % 8) + c has it.
  SVDQ_DEVICE float zero_of(int group, int j) const {
    float found = 0.0f;
    SVDQ_UNROLL
    for (int i = 0; i < 2 * kZeroTiles; ++i) {
      const float other = shuffle(zero_[i / 2][i % 2 * 2 + j], group % 8 * 4 + lane_index() % 4);
      if (group / 8 == i) found = other;
    }
    return found;
  }

  // Probabilities times scales of a group, and what rotates products into values: a power of two that
  // brings the largest scale to 2^13 .. 2^14, as far as a half can be multiplied.
  SVDQ_DEVICE static void prepare(const uint8_t* page, int group, const PageProbabilities& p,
                                  const float (&weight)[2], uint32_t (&b)[kGroups][2],
                                  float (&unit)[2]) {
    load_token_quads(page, group, b);
    uint32_t most = half2_max(b[0][0], b[0][1]);
    SVDQ_UNROLL
    for (int s = 1; s < kGroups; ++s) most = half2_max(most, half2_max(b[s][0], b[s][1]));
    most = half2_max(most, permute_bytes(most, most, 0x1032));
    most = half2_max(most, shuffle_xor(most, 1));
    most = half2_max(most, shuffle_xor(most, 2));
    const int exponent = static_cast<int>(most >> 10 & 0x1fu);
    const int up = 43 - exponent < 30 ? 43 - exponent : 30;  // of 2^13 over it, biased
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      const uint32_t times = static_cast<uint32_t>(up - s % kUnits * kBits) * (0x00010001u << 10);
      SVDQ_UNROLL
      for (int i = 0; i < 2; ++i) b[s][i] = half2_fma(half2_fma(b[s][i], times, 0u), p[s][i], 0u);
    }
    const float down = int_as_float(static_cast<uint32_t>(127 + 15 + 24 - up) << 23);
    unit[0] = down * weight[0];
    unit[1] = down * weight[1];
  }

  float out_[kBlocks][4];      // channels 2 r (0, 1) and 2 r + 1 (2, 3) of query rows 2 c, 2 c + 1
  float zero_[kZeroTiles][4];  // groups r (0, 1) and r + 8 (2, 3) likewise
};

}  // namespace svdq::device
