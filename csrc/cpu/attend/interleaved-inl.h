// Keys reconstructed from pre-RoPE codes, as interleaved channels, and their scores in units of log2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/attend/folded_rows-inl.h"
#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Channels of a head that are reconstructed: the two channels of every listed RoPE pair next to each other, so that a
// tile of them can be rotated at once, then the channels from `first_rest` on, which do not rotate. They come in whole
// tiles of kTileRows, padded with zeros. Pairs in which a head has only its mean are listed last and not reconstructed.
struct InterleavedChannels {
  const int16_t* pairs;  // [num_pairs + num_means]
  int num_pairs;
  int num_means;
  int first_rest;  // channel
  int num_rest;
  int rotary_pairs;

  int used() const { return 2 * num_pairs + num_rest; }
  int count() const { return static_cast<int>(round_up(used(), kTileRows)); }
  // Key channel of interleaved channel c.
  int channel(int c) const {
    if (c < 2 * num_pairs) return pairs[c / 2] + c % 2 * rotary_pairs;
    return first_rest + (c < used() ? c - 2 * num_pairs : 0);
  }
};

// Rotates the pair (x, y) of every token; cosines and sines [64] are those of this pair.
inline void rotate_pair(float* x, float* y, const float* cosines, const float* sines) {
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const F32 c = load<F32>(cosines + t), s = load<F32>(sines + t);
    const F32 a = load<F32>(x + t), b = load<F32>(y + t);
    store(x + t, a * c - b * s);
    store(y + t, b * c + a * s);
  }
}

// Interleaved keys of one page [interleaved.count(), 64], rotated by `cos_sin` [rotary_pairs, 2, 64], the cosines and
// sines of every pair and token.
// The scaled basis of a head's pre-RoPE channels is folded like queries, one row per interleaved channel:
// key_c = offset_c + sum_j code_j folded_cj, so code_scores reconstructs keys. All rows read the codes, so these are
// unpacked: `bytes` [rank, 64].
inline void reconstruct_keys(const uint8_t* bytes, const Bands& bands, const FoldedRows& folded,
                             const InterleavedChannels& interleaved, const float* cos_sin,
                             float* keys) {
  static_assert(kLanes % kTileRows == 0 && kTileRows % 2 == 0, "a tile holds whole pairs");
  for (int c = 0; c < interleaved.count(); c += kTileRows) {
    code_scores<true, kTileRows>(bytes, bands, folded, c, keys + c * kPageTokens);
    for (int i = c / 2; i < std::min((c + kTileRows) / 2, interleaved.num_pairs); ++i) {
      const float* cosines = cos_sin + int64_t{interleaved.pairs[i]} * 2 * kPageTokens;
      rotate_pair(keys + 2 * i * kPageTokens, keys + (2 * i + 1) * kPageTokens, cosines,
                  cosines + kPageTokens);
    }
  }
}

// s[r][t] (kAdd: +)= query[r] . key_t over the interleaved channels of keys [interleaved.count(), 64].
template <int kRows, bool kAdd>
inline void interleaved_scores(const float* query, int head_dim,
                               const InterleavedChannels& interleaved, const float* keys,
                               float* s) {
  for (int part = 0; part < kParts; ++part) {
    F32 acc[kRows][kGroups];
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) {
        acc[r][g] = kAdd ? load<F32>(s + r * kPageTokens + tokens_at(g, part)) : F32{};
      }
    }
    for (int c = 0; c < interleaved.used(); ++c) {
      const float* channel = query + interleaved.channel(c);
      F32 q[kRows];
      for (int r = 0; r < kRows; ++r) q[r] = splat(channel[r * head_dim]);
      for (int g = 0; g < kGroups; ++g) {
        const F32 key = load<F32>(keys + c * kPageTokens + tokens_at(g, part));
        for (int r = 0; r < kRows; ++r) acc[r][g] += key * q[r];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) store(s + r * kPageTokens + tokens_at(g, part), acc[r][g]);
    }
  }
}

// Reconstructs and scores at once, for rows of a single tile: s[r][t] += query[r] . key_t over interleaved channels that
// all belong to pairs, from codes below 8 bits. Keys stay in registers.
template <int kRows>
inline void add_pair_scores(const uint8_t* bytes, const Bands& bands, const FoldedRows& folded,
                            const InterleavedChannels& interleaved, const float* cos_sin,
                            const float* query, int head_dim, float* s) {
  constexpr int kPairs = kTileRows / 2;
  for (int c = 0; c < interleaved.count(); c += kTileRows) {
    const float* pair_cos_sin[kPairs];
    float channel[kTileRows][kRows];  // of the queries
    for (int i = 0; i < kPairs; ++i) {
      // Padding of the last tile repeats a pair; its folded rows are zero.
      const int pair = interleaved.pairs[std::min(c / 2 + i, interleaved.num_pairs - 1)];
      pair_cos_sin[i] = cos_sin + int64_t{pair} * 2 * kPageTokens;
      for (int r = 0; r < kRows; ++r) {
        channel[2 * i][r] = query[r * head_dim + pair];
        channel[2 * i + 1][r] = query[r * head_dim + pair + interleaved.rotary_pairs];
      }
    }
    const float *scale = folded.scale + c, *offset = folded.offset + c;
    for (int part = 0; part < kParts; ++part) {
      I32 acc[kTileRows][kGroups];
      sum_products<true, false>(bytes, bands, folded.high + folded.at(c, 0), folded, part, acc);
#pragma GCC unroll 4  // otherwise sums would leave their registers
      for (int g = 0; g < kGroups; ++g) {
        const int t = tokens_at(g, part);
        F32 key[kTileRows];
        for (int i = 0; i < kPairs; ++i) {
          const int x = 2 * i, y = x + 1;
          const F32 cosine = load<F32>(pair_cos_sin[i] + t),
                    sine = load<F32>(pair_cos_sin[i] + kPageTokens + t);
          const F32 a = to_float(acc[x][g]) * scale[x] + offset[x];
          const F32 b = to_float(acc[y][g]) * scale[y] + offset[y];
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

// s[r][t] += query[r] . mean, rotated to every token, over the pairs that hold only the mean.
template <int kRows>
inline void add_mean_scores(const InterleavedChannels& interleaved, const float* mean,
                            const float* cos_sin, const float* query, int head_dim, float* s) {
  const int16_t* pairs = interleaved.pairs + interleaved.num_pairs;
  for (int part = 0; part < kParts; ++part) {
    F32 acc[kRows][kGroups];
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g)
        acc[r][g] = load<F32>(s + r * kPageTokens + tokens_at(g, part));
    }
    for (int i = 0; i < interleaved.num_means; ++i) {
      const int a = pairs[i], b = a + interleaved.rotary_pairs;
      const float* pair_cos_sin = cos_sin + int64_t{a} * 2 * kPageTokens;
      F32 with_cosine[kRows], with_sine[kRows];
      for (int r = 0; r < kRows; ++r) {
        const float* q = query + r * head_dim;
        with_cosine[r] = splat(q[a] * mean[a] + q[b] * mean[b]);
        with_sine[r] = splat(q[b] * mean[a] - q[a] * mean[b]);
      }
      for (int g = 0; g < kGroups; ++g) {
        const F32 cosine = load<F32>(pair_cos_sin + tokens_at(g, part));
        const F32 sine = load<F32>(pair_cos_sin + kPageTokens + tokens_at(g, part));
        for (int r = 0; r < kRows; ++r) acc[r][g] += cosine * with_cosine[r] + sine * with_sine[r];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) store(s + r * kPageTokens + tokens_at(g, part), acc[r][g]);
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
