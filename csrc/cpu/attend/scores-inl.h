// Scores of one block of 64 tokens, in units of log2: codes absorbed into the query (tail
// channels), keys reconstructed from codes and rotated (pre-RoPE channels), and exact keys. All write
// s[row][64]; those of post-RoPE channels may be added to those of pre-RoPE channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Rows of weights, quantized to be multiplied with the codes of one head: a weight is
// step * (high + low / kLowSteps), where only 8-bit codes, which are up to 17 times larger than 4-bit
// ones, have low terms.
struct QueryCodes {
  const int8_t* high;  // of row r, quad q at r * row_stride + q * quad_stride
  const int8_t* low;
  const float* step;    // [rows]
  const float* offset;  // [rows]: what multiplies no code, less the mid codes' share
  int64_t row_stride, quad_stride;

  int64_t at(int row, int quad) const { return row * row_stride + quad * quad_stride; }
};

inline constexpr float kLowSteps = 254.0f;
inline constexpr float kMostWeight = 127.0f;

// Codes of unit k of a line.
template <int kWidth>
inline U32 unit_codes(U32 line, int k) {
  constexpr uint32_t kMask = ((1u << kWidth) - 1) * 0x01010101u;
  return kWidth == 8 ? line : (line >> (k * kWidth)) & kMask;
}

template <int kWidth>
inline I32 dot_codes(I32 acc, U32 codes, U32 weights) {
  return kWidth == 8 ? dot_wide(acc, codes, weights) : dot(acc, codes, weights);
}

// Bytes of the lines of one band: as stored, or unpacked to a byte a code.
template <int kWidth, bool kUnpacked>
inline int64_t band_bytes(int count) {
  return int64_t{count} * kPageTokens * (kUnpacked ? 8 : kWidth) / 8;
}

// acc[row][group] += codes . weights over one band, for the lanes of one part.
template <int kWidth, bool kUnpacked, int kRows>
[[gnu::always_inline]] inline void accumulate_band(const uint8_t* lines, int count,
                                                   const int8_t* weights, int64_t row_stride,
                                                   int64_t quad_stride, int part,
                                                   I32 (&acc)[kRows][kGroups]) {
  constexpr int kUnits = kUnpacked ? 1 : 8 / kWidth;               // units in a line
  constexpr int kStepUnits = kUnits > kGroups ? kUnits : kGroups;  // whole lines and whole quads
  const uint8_t* line = lines + part * kVecBytes;
  for (int quad = 0; quad < count / kQuad; quad += kStepUnits / kGroups) {
    for (int l = 0; l < kStepUnits / kUnits; ++l, line += kLineBytes) {
      const U32 bits = load<U32>(line);
      for (int k = 0; k < kUnits; ++k) {
        const int unit = l * kUnits + k;
        const U32 codes = kUnpacked ? bits : unit_codes<kWidth>(bits, k);
        for (int r = 0; r < kRows; ++r) {
          const U32 w =
              splat_quad(weights + r * row_stride + (quad + unit / kGroups) * quad_stride);
          acc[r][unit % kGroups] = dot_codes<kWidth>(acc[r][unit % kGroups], codes, w);
        }
      }
    }
  }
}

// acc[row][group] = codes . weights over the channels of `bands`, or of their 8-bit channels alone.
template <bool kUnpacked, bool kWideOnly, int kRows>
[[gnu::always_inline]] inline void sum_products(const uint8_t* lines, const Bands& bands,
                                                const int8_t* weights, const QueryCodes& query,
                                                int part, I32 (&acc)[kRows][kGroups]) {
  const int64_t rows = query.row_stride, quads = query.quad_stride;
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) acc[r][g] = I32{};
  }
  // One width after the other, without calls between, so that sums stay in registers.
  const auto add = [&]<int kWidth>(int count) __attribute__((always_inline)) {
    accumulate_band<kWidth, kUnpacked>(lines, count, weights, rows, quads, part, acc);
    weights += count / kQuad * quads;
    lines += band_bytes<kWidth, kUnpacked>(count);
  };
  if (bands.count[0]) add.template operator()<8>(bands.count[0]);
  if constexpr (kWideOnly) return;
  if constexpr (kUnpacked) {
    // A byte a code, whatever its width.
    add.template operator()<4>(bands.rank() - bands.count[0]);
  } else {
    if (bands.count[1]) add.template operator()<4>(bands.count[1]);
    if (bands.count[2]) add.template operator()<2>(bands.count[2]);
    if (bands.count[3]) add.template operator()<1>(bands.count[3]);
  }
}

// Calls put(r, group, part, sum) with sum = the vector of codes . weights, in steps, over the
// channels of `bands`, for rows row .. row + kRows - 1.
template <bool kUnpacked, int kRows, typename Put>
[[gnu::always_inline]] inline void for_each_product(const uint8_t* lines, const Bands& bands,
                                                    const QueryCodes& query, int row,
                                                    const Put& put) {
  for (int part = 0; part < kParts; ++part) {
    I32 acc[kRows][kGroups];
    if (bands.count[0] == 0) {
      sum_products<kUnpacked, false>(lines, bands, query.high + query.at(row, 0), query, part, acc);
      for (int r = 0; r < kRows; ++r) {
        for (int g = 0; g < kGroups; ++g) put(r, g, part, to_float(acc[r][g]));
      }
      continue;
    }
    // Low terms wait in memory: registers hold one set of sums.
    float low[kRows][kGroups][kVecLanes];
    sum_products<kUnpacked, true>(lines, bands, query.low + query.at(row, 0), query, part, acc);
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) store(low[r][g], to_float(acc[r][g]) * (1 / kLowSteps));
    }
    sum_products<kUnpacked, false>(lines, bands, query.high + query.at(row, 0), query, part, acc);
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) put(r, g, part, to_float(acc[r][g]) + load<F32>(low[r][g]));
    }
  }
}

// Numbers of a vector of tokens among [64].
inline int tokens_at(int group, int part) { return group * kLanes + part * kVecLanes; }

// s[r] (kAdd: +)= offset + sum over the channels of `bands`, for rows row .. row + kRows - 1.
template <bool kUnpacked, int kRows, bool kAdd = false>
inline void code_scores(const uint8_t* lines, const Bands& bands, const QueryCodes& query, int row,
                        float* s) {
  for_each_product<kUnpacked, kRows>(
      lines, bands, query, row, [&](int r, int group, int part, F32 sum) {
        float* at = s + r * kPageTokens + tokens_at(group, part);
        const F32 score = sum * query.step[row + r] + query.offset[row + r];
        store(at, kAdd ? load<F32>(at) + score : score);
      });
}

// Spreads the codes of one band to a byte each; units stay in order.
template <int kWidth>
inline void unpack_band(const uint8_t* lines, int count, uint8_t* bytes) {
  constexpr int kUnits = 8 / kWidth;
  for (int line = 0; line < count * kGroups / kQuad / kUnits; ++line) {
    for (int part = 0; part < kParts; ++part) {
      const U32 bits = load<U32>(lines + line * kLineBytes + part * kVecBytes);
      for (int k = 0; k < kUnits; ++k) {
        store(bytes + (line * kUnits + k) * kLineBytes + part * kVecBytes,
              unit_codes<kWidth>(bits, k));
      }
    }
  }
}

// Which channels of a head are reconstructed, as columns: the two channels of every listed RoPE pair
// side by side, so that a tile of columns can be rotated as soon as it is made, then those from
// `first_rest` on, which do not turn. Columns come in whole tiles of kMaxRows; what fills the last one
// is zero. Pairs in which a head has nothing but its mean are listed behind the others.
struct Columns {
  const int16_t* pairs;  // [num_pairs + num_means]
  int num_pairs;
  int num_means;
  int first_rest;  // channel
  int num_rest;
  int half;

  int used() const { return 2 * num_pairs + num_rest; }
  int count() const { return static_cast<int>(round_up(used(), kMaxRows)); }
  // Channel of column c.
  int channel(int c) const {
    if (c < 2 * num_pairs) return pairs[c / 2] + c % 2 * half;
    return first_rest + (c < used() ? c - 2 * num_pairs : 0);
  }
};

// Turns the pair (x, y) of every token forward by its offset in the page; cosines and sines are
// [64] of this pair.
inline void rotate_pair(float* x, float* y, const float* cosines, const float* sines) {
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const F32 c = load<F32>(cosines + t), s = load<F32>(sines + t);
    const F32 a = load<F32>(x + t), b = load<F32>(y + t);
    store(x + t, a * c - b * s);
    store(y + t, b * c + a * s);
  }
}

// Codes of a head's pre-RoPE channels, a byte each: [rank, 64].
inline void unpack_codes(const uint8_t* lines, const Bands& bands, uint8_t* bytes) {
  for_each_band(bands, [&]<int kWidth>(int count, int) {
    unpack_band<kWidth>(lines, count, bytes);
    lines += band_bytes<kWidth, false>(count);
    bytes += band_bytes<kWidth, true>(count);
  });
}

// Keys of one page as columns [columns.count(), 64], rotated by `turns` [half, 2, 64], the cosines and
// sines of every pair and token.
// The scaled basis of a head's pre-RoPE channels is quantized like a query with one row per column:
// key_c = offset_c + sum_j code_j W_cj, so reconstructing keys is scoring by another name. All rows
// read the codes, so these are unpacked: `bytes` [rank, 64].
inline void reconstruct_keys(const uint8_t* bytes, const Bands& bands, const QueryCodes& weights,
                             const Columns& columns, const float* turns, float* keys) {
  static_assert(kLanes % kMaxRows == 0 && kMaxRows % 2 == 0, "a tile of columns holds whole pairs");
  for (int c = 0; c < columns.count(); c += kMaxRows) {
    code_scores<true, kMaxRows>(bytes, bands, weights, c, keys + c * kPageTokens);
    for (int i = c / 2; i < std::min((c + kMaxRows) / 2, columns.num_pairs); ++i) {
      const float* cosines = turns + int64_t{columns.pairs[i]} * 2 * kPageTokens;
      rotate_pair(keys + 2 * i * kPageTokens, keys + (2 * i + 1) * kPageTokens, cosines,
                  cosines + kPageTokens);
    }
  }
}

// s[r][t] (kAdd: +)= query[r] . key_t over the columns of keys [columns.count(), 64].
template <int kRows, bool kAdd>
inline void column_scores(const float* query, int head_dim, const Columns& columns,
                          const float* keys, float* s) {
  for (int part = 0; part < kParts; ++part) {
    F32 acc[kRows][kGroups];
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) {
        acc[r][g] = kAdd ? load<F32>(s + r * kPageTokens + tokens_at(g, part)) : F32{};
      }
    }
    for (int c = 0; c < columns.used(); ++c) {
      const float* channel = query + columns.channel(c);
      F32 weight[kRows];
      for (int r = 0; r < kRows; ++r) weight[r] = splat(channel[r * head_dim]);
      for (int g = 0; g < kGroups; ++g) {
        const F32 key = load<F32>(keys + c * kPageTokens + tokens_at(g, part));
        for (int r = 0; r < kRows; ++r) acc[r][g] += key * weight[r];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) store(s + r * kPageTokens + tokens_at(g, part), acc[r][g]);
    }
  }
}

// The two stages above in one for rows that share a single tile: s[r][t] += query[r] . key_t over columns
// that are all of pairs and whose codes are all narrow. Columns stay in registers.
template <int kRows>
inline void add_pair_scores(const uint8_t* bytes, const Bands& bands, const QueryCodes& weights,
                            const Columns& columns, const float* turns, const float* query,
                            int head_dim, float* s) {
  constexpr int kPairs = kMaxRows / 2;
  for (int c = 0; c < columns.count(); c += kMaxRows) {
    const float* turn[kPairs];
    float channel[kMaxRows][kRows];  // of the queries
    for (int i = 0; i < kPairs; ++i) {
      // What fills up the last tile has weights of zero.
      const int pair = columns.pairs[std::min(c / 2 + i, columns.num_pairs - 1)];
      turn[i] = turns + int64_t{pair} * 2 * kPageTokens;
      for (int r = 0; r < kRows; ++r) {
        channel[2 * i][r] = query[r * head_dim + pair];
        channel[2 * i + 1][r] = query[r * head_dim + pair + columns.half];
      }
    }
    const float *step = weights.step + c, *offset = weights.offset + c;
    for (int part = 0; part < kParts; ++part) {
      I32 acc[kMaxRows][kGroups];
      sum_products<true, false>(bytes, bands, weights.high + weights.at(c, 0), weights, part, acc);
#pragma GCC unroll 4  // or sums would have to leave their registers
      for (int g = 0; g < kGroups; ++g) {
        const int t = tokens_at(g, part);
        F32 key[kMaxRows];
        for (int i = 0; i < kPairs; ++i) {
          const int x = 2 * i, y = x + 1;
          const F32 cosine = load<F32>(turn[i] + t), sine = load<F32>(turn[i] + kPageTokens + t);
          const F32 a = to_float(acc[x][g]) * step[x] + offset[x];
          const F32 b = to_float(acc[y][g]) * step[y] + offset[y];
          key[x] = a * cosine - b * sine;
          key[y] = b * cosine + a * sine;
        }
        for (int r = 0; r < kRows; ++r) {
          float* at = s + r * kPageTokens + t;
          F32 even = load<F32>(at), odd{};
          for (int i = 0; i < kPairs; ++i) {
            even += key[2 * i] * channel[2 * i][r];
            odd += key[2 * i + 1] * channel[2 * i + 1][r];
          }
          store(at, even + odd);
        }
      }
    }
  }
}

// s[r][t] += query[r] . mean, turned to every token, over the pairs that hold nothing else.
template <int kRows>
inline void add_mean_scores(const Columns& columns, const float* mean, const float* turns,
                            const float* query, int head_dim, float* s) {
  const int16_t* pairs = columns.pairs + columns.num_pairs;
  for (int part = 0; part < kParts; ++part) {
    F32 acc[kRows][kGroups];
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g)
        acc[r][g] = load<F32>(s + r * kPageTokens + tokens_at(g, part));
    }
    for (int i = 0; i < columns.num_means; ++i) {
      const int a = pairs[i], b = a + columns.half;
      const float* turn = turns + int64_t{a} * 2 * kPageTokens;
      F32 with_cosine[kRows], with_sine[kRows];
      for (int r = 0; r < kRows; ++r) {
        const float* q = query + r * head_dim;
        with_cosine[r] = splat(q[a] * mean[a] + q[b] * mean[b]);
        with_sine[r] = splat(q[b] * mean[a] - q[a] * mean[b]);
      }
      for (int g = 0; g < kGroups; ++g) {
        const F32 cosine = load<F32>(turn + tokens_at(g, part));
        const F32 sine = load<F32>(turn + kPageTokens + tokens_at(g, part));
        for (int r = 0; r < kRows; ++r) acc[r][g] += cosine * with_cosine[r] + sine * with_sine[r];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) store(s + r * kPageTokens + tokens_at(g, part), acc[r][g]);
    }
  }
}

// s[r][0] = query[r] . key for one exact key, whose numbers begin at `at`.
template <int kRows>
inline void exact_score(const float* query, int head_dim, const void* keys, DataType dtype,
                        int64_t at, float* s) {
  F32 acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = F32{};
  for (int d = 0; d < head_dim; d += kVecLanes) {
    const F32 key = load_as_float(keys, dtype, at + d);
    for (int r = 0; r < kRows; ++r) acc[r] += key * load<F32>(query + r * head_dim + d);
  }
  for (int r = 0; r < kRows; ++r) s[r * kPageTokens] = reduce_add(acc[r]);
}

// s[r][t] = query[r] . key_t for `count` exact keys in rows; other tokens get 0 (and are masked by
// the caller).
template <int kRows>
inline void exact_scores(const float* query, int head_dim, const void* keys, DataType dtype,
                         int64_t first, int count, float* s) {
  for (int t = 0; t < count; ++t)
    exact_score<kRows>(query, head_dim, keys, dtype, first + int64_t{t} * head_dim, s + t);
  for (int r = 0; r < kRows; ++r) {
    for (int t = count; t < kPageTokens; ++t) s[r * kPageTokens + t] = 0;
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
