// Products of probabilities and packed values: probabilities times value scales become bytes, which multiply codes.
#pragma once

#include <cstdint>

#include "csrc/cpu/attend/softmax-inl.h"
#include "csrc/cpu/lanes-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/rotation-inl.h"
#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/pages/page_span-inl.h"
#include "csrc/cpu/pages/prefetch-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Scales of a head's tokens in a page; zeros for masked tokens, whose bytes may hold anything.
struct ValueScales {
  alignas(kLineBytes) float scale[kPageTokens];
  float max_scale;
};

inline void load_value_scales(const uint8_t* page, uint64_t mask, ValueScales& out) {
  F32 max_scale{};
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    F32 scale = load_scales(page + t);
    if (mask != ~uint64_t{0}) scale = select_lanes(mask_lanes(mask, t), scale, F32{});
    max_scale = max(max_scale, scale);
    store(out.scale + t, scale);
  }
  out.max_scale = reduce_max(max_scale);
}

// Probabilities times value scales of one row as bytes, which multiply codes; a byte of 1 stands for `scale`.
struct ScaledProbs {
  alignas(kLineBytes) uint8_t code[kPageTokens];
  float scale;
};

// Fractions that are added before truncation, every multiple of 1/64 plus 1/128 once a page: rounding is unbiased on
// average over a page, for small numbers too.
struct Dither {
  alignas(kLineBytes) float of[kPageTokens];
  constexpr Dither() : of{} {
    for (int t = 0; t < kPageTokens; ++t) {
      int reversed = 0;
      for (int bit = 0; bit < 6; ++bit) reversed |= (t >> bit & 1) << (5 - bit);
      of[t] = (static_cast<float>(reversed) + 0.5f) / kPageTokens;
    }
  }
};
inline constexpr Dither kDither;

// The share of the lines left to prefetch, one in so many, that goes out while probabilities are quantized.
inline constexpr int kProbsShare = 3;

// Updates the softmax with the scores s[row][64] and quantizes the probabilities times value scales;
// they multiply codes minus the mid code. Rounding them adds a variance of at most
// scale^2 / 4 * (code - mid)^2, where rounding the values to codes cost scaled_prob^2 / 12: a few per cent of that
// where one token has all the probability of a page, and less elsewhere.
// Numbers per row are kept in the lanes of one vector: rows would otherwise wait for each other.
template <int kRows>
inline void quantize_probs(const RowBlock& rows, const float* s, const ValueLayout& value,
                           const ValueScales& scales, Prefetcher& next, ScaledProbs* out) {
  constexpr float kTop = 255.0f;
  constexpr int kVecs = kPageTokens / kVecLanes;
  const float middle_code = mid_code(value.bits);
  const int lines = next.share(kProbsShare * kRows * 2);
  // Find the maxima of the rows' scores.
  F32 max_scores[kRows];
  for (int r = 0; r < kRows; ++r) {
    const float* at = s + r * kPageTokens;
    max_scores[r] = load<F32>(at);
    for (int v = 1; v < kVecs; ++v)
      max_scores[r] = max(max_scores[r], load<F32>(at + v * kVecLanes));
  }
  // Raise the state's maxima where the page's are larger.
  const F32 block_max = row_maxima(max_scores);
  F32 top = load_first<kRows>(rows.max);
  if (any_above<kRows>(block_max, top)) {
    for (int r = 0; r < kRows; ++r) {
      if (block_max[r] > rows.max[r]) raise_max(rows, r, block_max[r], value.head_dim);
    }
    top = max(block_max, top);
  }
  const F32 max_prob = exp2(block_max - top) * (1 / kTop);

  // Exponentiate and sum.
  F32 p[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    next.fetch(lines);
    const F32 row_top = splat_lane(top, r);
    F32 sum = load<F32>(rows.sum + r * kVecLanes);
    for (int v = 0; v < kVecs; ++v) {
      p[r][v] = exp2(load<F32>(s + r * kPageTokens + v * kVecLanes) - row_top);
      sum += p[r][v];
    }
    store(rows.sum + r * kVecLanes, sum);
  }
  // Scale, dither and truncate.
  const F32 row_scales = max_prob * scales.max_scale;
  const F32 inverses = row_scales > 0 ? 1.0f / row_scales : F32{};
  for (int r = 0; r < kRows; ++r) {
    const F32 inverse = splat_lane(inverses, r);
    ScaledProbs& to = out[r];
    next.fetch(lines);
    I32 total{};
    for (int first = 0; first < kVecs; first += 4) {
      I32 code[4];
      for (int i = 0; i < 4; ++i) {
        const int t = (first + i) * kVecLanes;
        code[i] = truncate_to_int(p[r][first + i] * load<F32>(scales.scale + t) * inverse +
                                  load<F32>(kDither.of + t));
        total += code[i];
      }
      store_bytes(to.code + first * kVecLanes, code);
    }
    to.scale = row_scales[r];
    float* at = rows.middle_sum + r * kVecLanes;
    store(at, load<F32>(at) - to_float(total) * (splat_lane(row_scales, r) * middle_code));
  }
}

// Codes of `kBits` bits of a page's values, one line of their first plane at a time: 8 / width tiles, each of 4 tokens
// of 16 channels.
template <int kBits>
struct ValueLine {
  static constexpr int kWidth = low_plane_width(kBits);
  static constexpr int kTiles = 8 / kWidth;
  U32 low;
  U32 high;  // bits of tile k from bit k on; of 3-bit codes

  // Line `line` of block `block` of 16 channels.
  static ValueLine at(const uint8_t* low, const uint8_t* high, int block, int line, int part) {
    constexpr int kLines = kTokenQuads / kTiles, kHighTiles = 8;
    ValueLine loaded;
    loaded.low = load<U32>(low + (block * kLines + line) * kLineBytes + part * kVecBytes);
    if constexpr (kBits == 3) {
      const int tile = line * kTiles;
      const int64_t high_line = block * (kTokenQuads / kHighTiles) + tile / kHighTiles;
      loaded.high =
          load<U32>(high + high_line * kLineBytes + part * kVecBytes) >> tile % kHighTiles;
    }
    return loaded;
  }

  U32 codes(int k) const {
    const U32 bits = tile_codes<kWidth>(low, k);
    if constexpr (kBits != 3) return bits;
    constexpr uint32_t kFours = 0x04040404u;
    return bits | ((k < 2 ? high << (2 - k) : high >> (k - 2)) & kFours);
  }
};

// out[r][channels of kBlocks blocks from `block` on] += scaled probabilities . value codes of one page; mid codes are
// part of middle_sum.
template <int kBits, int kRows, int kBlocks>
inline void accumulate_blocks(const uint8_t* low, const uint8_t* high, int block,
                              const ScaledProbs* probs, int head_dim, Prefetcher& next, int share,
                              float* out) {
  using Line = ValueLine<kBits>;
  for (int part = 0; part < kParts; ++part) {
    I32 acc[kRows][kBlocks];
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = I32{};
    }
    for (int line = 0; line < kTokenQuads / Line::kTiles; ++line) {
      Line bits[kBlocks];
      if (part == 0) next.fetch(share);
      for (int b = 0; b < kBlocks; ++b) bits[b] = Line::at(low, high, block + b, line, part);
      for (int k = 0; k < Line::kTiles; ++k) {
        U32 codes[kBlocks];
        for (int b = 0; b < kBlocks; ++b) codes[b] = bits[b].codes(k);
        for (int r = 0; r < kRows; ++r) {
          const U32 quad = splat_quad(probs[r].code + (line * Line::kTiles + k) * kQuad);
          for (int b = 0; b < kBlocks; ++b) acc[r][b] = dot(acc[r][b], quad, codes[b]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) {
        float* at = out + r * head_dim + (block + b) * kLanes + part * kVecLanes;
        store(at, load<F32>(at) + to_float(acc[r][b]) * probs[r].scale);
      }
    }
  }
}

// out[r] += probabilities . rotated values of the page of one head.
template <int kBits, int kRows>
inline void accumulate_codes(const ValueLayout& value, const uint8_t* page,
                             const ScaledProbs* probs, Prefetcher& next, float* out) {
  // As many blocks at once as the accumulators leave registers for.
  constexpr int kMaxBlocks = kBits == 3 && SVDQ_TARGET != 512 ? 2 : 4;
  const uint8_t* low = page + value.code_offset();
  const uint8_t* high = page + value.high_plane_offset();
  const int blocks = value.head_dim / kLanes;
  const int rounds = static_cast<int>(ceil_div(blocks, kMaxBlocks));
  const int share = next.share(rounds * (kTokenQuads / ValueLine<kBits>::kTiles));
  for (int block = 0; block < blocks; block += kMaxBlocks) {
    with_count<kMaxBlocks>(blocks - block, [&]<int kBlocks>() {
      accumulate_blocks<kBits, kRows, kBlocks>(low, high, block, probs, value.head_dim, next, share,
                                               out);
    });
  }
}

template <int kRows>
inline void accumulate_packed(const ValueLayout& value, const uint8_t* page,
                              const ScaledProbs* probs, Prefetcher& next, float* out) {
  if (value.bits == 4) accumulate_codes<4, kRows>(value, page, probs, next, out);
  if (value.bits == 3) accumulate_codes<3, kRows>(value, page, probs, next, out);
  if (value.bits == 2) accumulate_codes<2, kRows>(value, page, probs, next, out);
}

// Ends the accumulation of packed values: adds the mid codes' part to the rows' outputs and rotates them back. Values
// that follow are added as they are.
inline void finish_packed(const RowBlock& rows, int64_t count, int head_dim) {
  for (int64_t r = 0; r < count; ++r) {
    float *out = rows.out + r * head_dim, *middles = rows.middle_sum + r * kVecLanes;
    const F32 middle = splat(reduce_add(load<F32>(middles)));
    for (int d = 0; d < head_dim; d += kVecLanes) store(out + d, load<F32>(out + d) + middle);
    unrotate_value_row(out, head_dim);
    store(middles, F32{});
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
