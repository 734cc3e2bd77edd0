// Online softmax over blocks of 64 tokens, and the products of probabilities and values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "csrc/cpu/attend/scores-inl.h"
#include "csrc/cpu/fit/quantizer-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// State of a block of query rows: the online softmax, in log2 units, and the output so far. Probabilities
// are relative to `max`.
struct RowBlock {
  float* max;         // [rows]
  float* sum;         // [rows, kVecLanes]: by lane
  float* middle_sum;  // [rows, v_groups, kVecLanes]: what all channels of a group get alike
  float* out;         // [rows, D]: the rest
};

// Bits of `mask` of the tokens of a vector, t and on.
inline uint32_t mask_lanes(uint64_t mask, int t) {
  return static_cast<uint32_t>(mask >> t) & static_cast<uint32_t>((uint64_t{1} << kVecLanes) - 1);
}

inline constexpr float kNoScore = -std::numeric_limits<float>::infinity();

inline void reset_rows(const RowBlock& rows, int count, int head_dim, int v_groups) {
  std::fill_n(rows.max, count, kNoScore);
  std::memset(rows.sum, 0, sizeof(float) * count * kVecLanes);
  std::memset(rows.middle_sum, 0, sizeof(float) * count * v_groups * kVecLanes);
  std::memset(rows.out, 0, sizeof(float) * count * head_dim);
}

inline void rescale_row(const RowBlock& rows, int r, float factor, int head_dim, int v_groups) {
  store(rows.sum + r * kVecLanes, load<F32>(rows.sum + r * kVecLanes) * factor);
  for (int g = 0; g < v_groups; ++g) {
    float* at = rows.middle_sum + (r * v_groups + g) * kVecLanes;
    store(at, load<F32>(at) * factor);
  }
  for (int d = 0; d < head_dim; d += kVecLanes)
    store(rows.out + r * head_dim + d, load<F32>(rows.out + r * head_dim + d) * factor);
}

// Raises the maximum of row r to that of a block, which is larger.
inline void raise_max(const RowBlock& rows, int r, float block_max, int head_dim, int v_groups) {
  if (rows.max[r] != kNoScore)
    rescale_row(rows, r, std::exp2(rows.max[r] - block_max), head_dim, v_groups);
  rows.max[r] = block_max;
}

// Turns the scores s[64] of row r into probabilities p[64]; those of tokens outside `mask` become 0.
// Returns false if no token is in it.
inline bool softmax_row(const RowBlock& rows, int r, const float* s, uint64_t mask, int head_dim,
                        int v_groups, float* p) {
  F32 most = splat(kNoScore);
  for (int t = 0; t < kPageTokens; t += kVecLanes)
    most = max(most, select_lanes(mask_lanes(mask, t), load<F32>(s + t), most));
  const float block_max = reduce_max(most);
  if (block_max == kNoScore) return false;
  if (block_max > rows.max[r]) raise_max(rows, r, block_max, head_dim, v_groups);
  F32 sum = load<F32>(rows.sum + r * kVecLanes);
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const F32 v = select_lanes(mask_lanes(mask, t), exp2(load<F32>(s + t) - rows.max[r]), F32{});
    sum += v;
    store(p + t, v);
  }
  store(rows.sum + r * kVecLanes, sum);
  return true;
}

// Scales of one group and page, and what their tokens' values are where a code is in the middle;
// masked tokens, whose bytes may be anything, as zeros.
struct ValueScales {
  alignas(kLineBytes) float scale[kPageTokens];
  alignas(kLineBytes) float middle[kPageTokens];
  float largest;  // scale
};

// Of all groups of a page.
inline void load_value_scales(const ValueLayout& value, int groups, const uint8_t* page,
                              uint64_t mask, ValueScales* out) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(page + value.scale_offset());
  const uint16_t* zeros = reinterpret_cast<const uint16_t*>(page + value.zero_offset());
  const float middle_code = mid_code(value.bits);
  for (int g = 0; g < groups; ++g, scales += kPageTokens, zeros += kPageTokens) {
    F32 largest{};
    for (int t = 0; t < kPageTokens; t += kVecLanes) {
      F32 scale = load_half(scales + t), middle = load_half(zeros + t) + scale * middle_code;
      if (mask != ~uint64_t{0}) {
        scale = select_lanes(mask_lanes(mask, t), scale, F32{});
        middle = select_lanes(mask_lanes(mask, t), middle, F32{});
      }
      largest = max(largest, scale);
      store(out[g].scale + t, scale);
      store(out[g].middle + t, middle);
    }
    out[g].largest = reduce_max(largest);
  }
}

// Probabilities times value scales of one row and group as bytes that dot multiplies with the codes;
// `step` turns the integer sum back.
struct WeightCodes {
  alignas(kLineBytes) uint8_t code[kPageTokens];
  float step;
};

// What is added before a weight is cut to a whole number: every fraction from 1/128 on, so that over
// a page small weights are lost as often as they are raised to a step, and nothing on average.
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

// One head's keys and values in a page of the sequence.
struct PageBytes {
  const uint8_t* keys;
  const uint8_t* values;
};

// Asks for a line in the second cache: what is asked for far ahead would fill the first.
inline void prefetch_line(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

// Lines that will be needed soon, asked for a few at a time all along a page: those of the next page in
// the nearest cache and of the one after that in the second, keys and then values. Pages lie too far
// apart for the processor to guess them, and more lines at once than it has miss buffers would make it
// wait; one that is on its way to the second cache already occupies a buffer of the first for a moment
// alone.
struct Prefetcher {
  struct Range {
    uintptr_t at, end;
    uintptr_t after;  // what is to be added for the page after the next
  };
  Range now, then;

  static Range range(const uint8_t* next, const uint8_t* after, int64_t bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(next);
    return {at, at + bytes, reinterpret_cast<uintptr_t>(after) - at};
  }
  Prefetcher(const PageBytes& next, const PageBytes& after, int64_t key_bytes, int64_t value_bytes)
      : now(range(next.keys, after.keys, key_bytes)),
        then(range(next.values, after.values, value_bytes)) {}

  // (One number is all that changes with a line: two would be stored as a vector.)
  [[gnu::always_inline]] void fetch(int lines) {
    for (; lines > 0; --lines) {
      if (now.at >= now.end) {
        if (then.at >= then.end) return;
        now = then;
        then.at = then.end;
      }
      __builtin_prefetch(reinterpret_cast<const void*>(now.at));
      prefetch_line(reinterpret_cast<const uint8_t*>(now.at + now.after));
      now.at += kLineBytes;
    }
  }
  // What is to be fetched at each of `times` occasions so that nothing is left.
  int share(int times) const {
    const int left = static_cast<int>((now.end - now.at + then.end - then.at) / kLineBytes);
    return (left + times - 1) / times;
  }
};

// One part in so many of what is left to fetch goes out while weights are made.
inline constexpr int kWeighShare = 3;

// Makes the scores s[row][64] of tokens outside `mask` lower than any other: their probabilities are
// next to nothing then, and the scales of their values 0.
template <int kRows>
inline void mask_scores(uint64_t mask, float* s) {
  const F32 lowest = splat(std::numeric_limits<float>::lowest());
  for (int r = 0; r < kRows; ++r) {
    for (float* at = s + r * kPageTokens; at < s + (r + 1) * kPageTokens; at += kVecLanes) {
      const int t = static_cast<int>(at - s) % kPageTokens;
      store(at, select_lanes(mask_lanes(mask, t), load<F32>(at), lowest));
    }
  }
}

// Turns the scores s[row][64] into the weights of every group, [rows, groups]; what they multiply are
// codes less the middle one. Rounding them adds a variance of at most step^2 / 4 times (code -
// mid)^2, where rounding the values to codes cost weight^2 step^2 / 12: a few per cent of that where
// one token has all the weight of a page, and less elsewhere.
// What is one number a row is kept in the lanes of a vector: rows would wait for one another else.
template <int kRows>
inline void weigh_rows(const RowBlock& rows, const float* s, const ValueLayout& value, int groups,
                       const ValueScales* scales, Prefetcher& next, WeightCodes* out) {
  constexpr float kTop = 255.0f;
  constexpr int kVecs = kPageTokens / kVecLanes;
  const float middle_code = mid_code(value.bits);
  const int lines = next.share(kWeighShare * kRows * (groups + 1));
  F32 most[kRows];
  for (int r = 0; r < kRows; ++r) {
    const float* at = s + r * kPageTokens;
    most[r] = load<F32>(at);
    for (int v = 1; v < kVecs; ++v) most[r] = max(most[r], load<F32>(at + v * kVecLanes));
  }
  const F32 block_max = row_maxima(most);
  F32 top = load_first<kRows>(rows.max);
  if (any_above<kRows>(block_max, top)) {
    for (int r = 0; r < kRows; ++r) {
      if (block_max[r] > rows.max[r]) raise_max(rows, r, block_max[r], value.head_dim, groups);
    }
    top = max(block_max, top);
  }
  const F32 largest = exp2(block_max - top) * (1 / kTop);

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
  for (int g = 0; g < groups; ++g) {
    const F32 steps = largest * scales[g].largest;
    const F32 inverses = steps > 0 ? 1.0f / steps : F32{};
    for (int r = 0; r < kRows; ++r) {
      const F32 inverse = splat_lane(inverses, r), step = splat_lane(steps, r);
      WeightCodes& to = out[r * groups + g];
      next.fetch(lines);
      F32 middles{};
      I32 total{};
      for (int first = 0; first < kVecs; first += 4) {
        I32 code[4];
        for (int i = 0; i < 4; ++i) {
          const int t = (first + i) * kVecLanes;
          const F32 v = p[r][first + i];
          middles += v * load<F32>(scales[g].middle + t);
          code[i] =
              cut_to_int(v * load<F32>(scales[g].scale + t) * inverse + load<F32>(kDither.of + t));
          total += code[i];
        }
        store_bytes(to.code + first * kVecLanes, code);
      }
      to.step = step[0];
      float* at = rows.middle_sum + (r * groups + g) * kVecLanes;
      store(at, load<F32>(at) + (middles - to_float(total) * (step * middle_code)));
    }
  }
}

// out[r][channels of kBlocks blocks] += weights . (value codes - mid) of one page; all blocks lie in one
// value group.
template <int kWidth, int kRows, int kBlocks>
inline void accumulate_blocks(const uint8_t* lines, const WeightCodes* weights,
                              int64_t weight_stride, int head_dim, Prefetcher& next, int share,
                              float* out) {
  constexpr int kUnits = 8 / kWidth;
  constexpr int kBlockLines = kTokenQuads / kUnits;
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
      for (int k = 0; k < kUnits; ++k) {
        U32 codes[kBlocks];
        for (int b = 0; b < kBlocks; ++b) codes[b] = unit_codes<kWidth>(bits[b], k);
        for (int r = 0; r < kRows; ++r) {
          const U32 quad =
              splat_quad(weights[r * weight_stride].code + (line * kUnits + k) * kQuad);
          for (int b = 0; b < kBlocks; ++b) acc[r][b] = dot(acc[r][b], quad, codes[b]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) {
        float* at = out + r * head_dim + b * kLanes + part * kVecLanes;
        store(at, load<F32>(at) + to_float(acc[r][b]) * weights[r * weight_stride].step);
      }
    }
  }
}

// out[r] += probabilities . packed values, whose codes begin at `lines`; weights are [kRows, groups].
template <int kWidth, int kRows>
inline void accumulate_packed(const ValueLayout& value, int groups, const uint8_t* lines,
                              const WeightCodes* weights, Prefetcher& next, float* out) {
  constexpr int kBlockBytes = kTokenQuads * kWidth / 8 * kLineBytes;
  constexpr int kMostBlocks = 4;
  const int group_blocks = value.group_size / kLanes;
  const int rounds = (group_blocks + kMostBlocks - 1) / kMostBlocks;
  const int share = next.share(groups * rounds * (kTokenQuads * kWidth / 8));
  for (int group = 0; group < groups; ++group) {
    for (int first = 0; first < group_blocks; first += kMostBlocks) {
      const int block = group * group_blocks + first;
      with_count<kMostBlocks>(group_blocks - first, [&]<int kBlocks>() {
        accumulate_blocks<kWidth, kRows, kBlocks>(lines + int64_t{block} * kBlockBytes,
                                                  weights + group, groups, value.head_dim, next,
                                                  share, out + block * kLanes);
      });
    }
  }
}

// out[r] += probabilities . exact values in rows; tokens outside the mask are not read.
template <int kRows>
inline void accumulate_window(const float (*probabilities)[kPageTokens], const void* values,
                              DataType dtype, int64_t first, uint64_t mask, int head_dim,
                              float* out) {
  constexpr int kChunk = 2;  // vectors of a row held while its tokens go by
  for (int d = 0; d < head_dim; d += kChunk * kVecLanes) {
    const int vecs = std::min(kChunk, (head_dim - d) / kVecLanes);
    F32 acc[kRows][kChunk];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < vecs; ++v) acc[r][v] = load<F32>(out + r * head_dim + d + v * kVecLanes);
    }
    for (uint64_t rest = mask; rest; rest &= rest - 1) {
      const int t = __builtin_ctzll(rest);
      for (int v = 0; v < vecs; ++v) {
        const F32 value =
            load_as_float(values, dtype, first + int64_t{t} * head_dim + d + v * kVecLanes);
        for (int r = 0; r < kRows; ++r) acc[r][v] += value * probabilities[r][t];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < vecs; ++v) store(out + r * head_dim + d + v * kVecLanes, acc[r][v]);
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
