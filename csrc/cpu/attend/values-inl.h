// Products of probabilities and packed values: probabilities times value scales become bytes, which multiply codes.
#pragma once

#include <cstdint>

#include "csrc/cpu/attend/softmax-inl.h"
#include "csrc/cpu/lanes-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/pages/page_span-inl.h"
#include "csrc/cpu/pages/prefetch-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Scales of one group of a page, and the values of mid codes; zeros for masked tokens, whose bytes may hold anything.
struct ValueScales {
  alignas(kLineBytes) float scale[kPageTokens];
  alignas(kLineBytes) float middle[kPageTokens];
  float max_scale;
};

// Loads the scales of all groups of a page.
inline void load_value_scales(const ValueLayout& value, int groups, const uint8_t* page,
                              uint64_t mask, ValueScales* out) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(page + value.scale_offset());
  const uint16_t* zeros = reinterpret_cast<const uint16_t*>(page + value.zero_offset());
  const float middle_code = mid_code(value.bits);
  for (int g = 0; g < groups; ++g, scales += kPageTokens, zeros += kPageTokens) {
    F32 max_scale{};
    for (int t = 0; t < kPageTokens; t += kVecLanes) {
      F32 scale = load_half(scales + t), middle = load_half(zeros + t) + scale * middle_code;
      if (mask != ~uint64_t{0}) {
        scale = select_lanes(mask_lanes(mask, t), scale, F32{});
        middle = select_lanes(mask_lanes(mask, t), middle, F32{});
      }
      max_scale = max(max_scale, scale);
      store(out[g].scale + t, scale);
      store(out[g].middle + t, middle);
    }
    out[g].max_scale = reduce_max(max_scale);
  }
}

// Probabilities times value scales of one row and group as bytes, which multiply codes; a byte of 1 stands for `scale`.
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

// Updates the softmax with the scores s[row][64] and quantizes the probabilities times value scales of every group,
// out [rows, groups]; they multiply codes minus the mid code. Rounding them adds a variance of at most
// scale^2 / 4 * (code - mid)^2, where rounding the values to codes cost scaled_prob^2 / 12: a few per cent of that
// where one token has all the probability of a page, and less elsewhere.
// Numbers per row are kept in the lanes of one vector: rows would otherwise wait for each other.
template <int kRows>
inline void quantize_probs(const RowBlock& rows, const float* s, const ValueLayout& value,
                           int groups, const ValueScales* scales, Prefetcher& next,
                           ScaledProbs* out) {
  constexpr float kTop = 255.0f;
  constexpr int kVecs = kPageTokens / kVecLanes;
  const float middle_code = mid_code(value.bits);
  const int lines = next.share(kProbsShare * kRows * (groups + 1));
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
      if (block_max[r] > rows.max[r]) raise_max(rows, r, block_max[r], value.head_dim, groups);
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
  // Scale, dither and truncate for every group.
  for (int g = 0; g < groups; ++g) {
    const F32 row_scales = max_prob * scales[g].max_scale;
    const F32 inverses = row_scales > 0 ? 1.0f / row_scales : F32{};
    for (int r = 0; r < kRows; ++r) {
      const F32 inverse = splat_lane(inverses, r), scale = splat_lane(row_scales, r);
      ScaledProbs& to = out[r * groups + g];
      next.fetch(lines);
      F32 middles{};
      I32 total{};
      for (int first = 0; first < kVecs; first += 4) {
        I32 code[4];
        for (int i = 0; i < 4; ++i) {
          const int t = (first + i) * kVecLanes;
          const F32 v = p[r][first + i];
          middles += v * load<F32>(scales[g].middle + t);
          code[i] = truncate_to_int(v * load<F32>(scales[g].scale + t) * inverse +
                                    load<F32>(kDither.of + t));
          total += code[i];
        }
        store_bytes(to.code + first * kVecLanes, code);
      }
      to.scale = scale[0];
      float* at = rows.middle_sum + (r * groups + g) * kVecLanes;
      store(at, load<F32>(at) + (middles - to_float(total) * (scale * middle_code)));
    }
  }
}

// out[r][channels of kBlocks blocks] += scaled probabilities . value codes of one page; all blocks lie in one value
// group, whose mid codes are part of middle_sum.
template <int kWidth, int kRows, int kBlocks>
inline void accumulate_blocks(const uint8_t* lines, const ScaledProbs* probs, int64_t probs_stride,
                              int head_dim, Prefetcher& next, int share, float* out) {
  constexpr int kLineTiles = 8 / kWidth;
  constexpr int kBlockLines = kTokenQuads / kLineTiles;
  for (int part = 0; part < kParts; ++part) {
    I32 acc[kRows][kBlocks];
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = I32{};
    }
    for (int line = 0; line < kBlockLines; ++line) {
      U32 bits[kBlocks];
      if (part == 0) next.fetch(share);
      for (int b = 0; b < kBlocks; ++b) {
        bits[b] = load<U32>(lines + (b * kBlockLines + line) * kLineBytes + part * kVecBytes);
      }
      for (int k = 0; k < kLineTiles; ++k) {
        U32 codes[kBlocks];
        for (int b = 0; b < kBlocks; ++b) codes[b] = tile_codes<kWidth>(bits[b], k);
        for (int r = 0; r < kRows; ++r) {
          const U32 quad =
              splat_quad(probs[r * probs_stride].code + (line * kLineTiles + k) * kQuad);
          for (int b = 0; b < kBlocks; ++b) acc[r][b] = dot(acc[r][b], quad, codes[b]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) {
        float* at = out + r * head_dim + b * kLanes + part * kVecLanes;
        store(at, load<F32>(at) + to_float(acc[r][b]) * probs[r * probs_stride].scale);
      }
    }
  }
}

// out[r] += probabilities . packed values, whose codes begin at `lines`; probs is [kRows, groups].
template <int kWidth, int kRows>
inline void accumulate_packed(const ValueLayout& value, int groups, const uint8_t* lines,
                              const ScaledProbs* probs, Prefetcher& next, float* out) {
  constexpr int kBlockBytes = kTokenQuads * kWidth / 8 * kLineBytes;
  constexpr int kMaxBlocks = 4;
  const int group_blocks = value.group_size / kLanes;
  const int rounds = static_cast<int>(ceil_div(group_blocks, kMaxBlocks));
  const int share = next.share(groups * rounds * (kTokenQuads * kWidth / 8));
  for (int group = 0; group < groups; ++group) {
    for (int first = 0; first < group_blocks; first += kMaxBlocks) {
      const int block = group * group_blocks + first;
      with_count<kMaxBlocks>(group_blocks - first, [&]<int kBlocks>() {
        accumulate_blocks<kWidth, kRows, kBlocks>(lines + int64_t{block} * kBlockBytes,
                                                  probs + group, groups, value.head_dim, next,
                                                  share, out + block * kLanes);
      });
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
