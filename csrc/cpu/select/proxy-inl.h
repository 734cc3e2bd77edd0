// The leading channels of a head, which say what a packed token is worth to a query (the select
// stage). For every page the queries are absorbed into these channels as if all its tokens stood in
// its middle; after that a token costs one integer dot product a quad of channels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "csrc/core/absorb.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// One band of leading channels.
struct ProxyBand {
  int width;
  int count;       // channels of the lines that are read; those past `used` get weight 0
  int used;        // leading channels in it
  int lane;        // where their weights begin
  int channel;     // row of the first in the head's basis
  bool pre;        // coded before RoPE
  int64_t bytes;   // of the lines
  int64_t offset;  // of the lines in the head's part of a key page
};

// Bands of leading channels of one head. The weights of a tile of kMaxRows query rows lie side by
// side: `lanes` a row, then the rows' constants, which multiply no code.
struct ProxyBands {
  static constexpr int kMost = 2 * kNumWidths;
  // Channels, each band rounded up to whole lines, in whole lines of floats.
  static constexpr int kMostLanes = kMaxSelectChannels + kLanes;
  static constexpr int kMostTile = kMaxRows * kMostLanes + kLanes;

  ProxyBand band[kMost];
  int bands = 0;
  int used_lanes = 0;

  int lanes() const { return static_cast<int>(round_up(used_lanes, kLanes)); }
  int tile() const { return kMaxRows * lanes() + kLanes; }
  int constants() const { return kMaxRows * lanes(); }
};

inline ProxyBands proxy_bands(const HeadPlan& head, int channels) {
  ProxyBands lead;
  int channel = 0;
  int64_t offset = 0;
  for (const bool pre : {true, false}) {
    const Bands& bands = pre ? head.pre : head.post;
    for (int w = 0; w < kNumWidths; ++w) {
      const int used = std::min(bands.count[w], channels - channel);
      if (used > 0) {
        const int count = static_cast<int>(round_up(used, band_granularity(kWidths[w])));
        lead.band[lead.bands++] = {kWidths[w],
                                   count,
                                   used,
                                   lead.used_lanes,
                                   channel,
                                   pre,
                                   int64_t{count} * kPageTokens * kWidths[w] / 8,
                                   offset};
        lead.used_lanes += count;
        channel += used;
      }
      offset += int64_t{bands.count[w]} * kPageTokens * kWidths[w] / 8;
    }
  }
  return lead;
}

// Numbers of the queries of one head from which a page's weights follow, tile by tile:
//   weight = fixed[tile][.] + sum over slow pairs i of cos_i turn[tile][i][0][.]
//                                                  + sin_i turn[tile][i][1][.],
// with the angle by which the middle of the page turns pair i. Weights are in units of their band's
// step, so that rounding makes them int8; constants are in units of log2.
struct ProxyQuery {
  float* fixed;  // [tiles, tile]
  float* turn;   // [tiles, slow pairs, 2, tile]
  float* step;   // [rows, LeadBands::kMost]
};

// RoPE pairs slow enough to count, the faster ones first.
struct ProxyPairs {
  int pair[kMaxHeadDim / 2];
  int count = 0;
  int quick = 0;  // of them, those that are not smooth over a run of pages
};

// One row's numbers of a LeadQuery.
struct ProxyRow {
  float* fixed;  // of lane 0
  float* turn;
  float* fixed_constant;
  float* turn_constant;
  int64_t stride;  // from one of the 2 * pairs vectors of `turn` to the next
};

inline ProxyRow proxy_row(const ProxyBands& lead, const ProxyQuery& query, int row, int pairs) {
  const int tile = row / kMaxRows, r = row % kMaxRows, size = lead.tile();
  float* fixed = query.fixed + int64_t{tile} * size;
  float* turn = query.turn + int64_t{tile} * pairs * 2 * size;
  const int lane = r * lead.lanes(), constant = lead.constants() + r;
  return {fixed + lane, turn + lane, fixed + constant, turn + constant, size};
}

// What a row vector x [D] (a basis row times its scale, or the mean) makes of query q [D]: its
// channels begin .. end - 1, which do not turn, are added at `fixed`; its slow pairs are set at `turn`.
inline void absorb_fixed(float* fixed, const float* q, const float* x, int begin, int end) {
  float sum = *fixed;
  for (int d = begin; d < end; ++d) sum += q[d] * x[d];
  *fixed = sum;
}
inline void absorb_turned(float* turn, int64_t stride, const ProxyPairs& slow, int half,
                          const float* q, const float* x) {
  for (int i = 0; i < slow.count; ++i) {
    const int a = slow.pair[i], b = a + half;
    turn[2 * i * stride] = q[a] * x[a] + q[b] * x[b];
    turn[(2 * i + 1) * stride] = q[b] * x[a] - q[a] * x[b];
  }
}

// Turns the numbers of one row, which are in units of log2, into units of steps that no page's
// weights can exceed 127 of, and takes from the constant what the mid codes would add.
inline void scale_proxy(const ProxyBands& lead, const ProxyQuery& query, int row, int pairs) {
  const ProxyRow own = proxy_row(lead, query, row, pairs);
  for (int i = 0; i < lead.bands; ++i) {
    const ProxyBand& band = lead.band[i];
    float largest = 0;
    for (int l = band.lane; l < band.lane + band.used; ++l) {
      float bound = std::fabs(own.fixed[l]);
      for (int k = 0; k < pairs; ++k) {
        const float* pair = own.turn + 2 * k * own.stride + l;
        bound += std::sqrt(pair[0] * pair[0] + pair[own.stride] * pair[own.stride]);
      }
      largest = std::max(largest, bound);
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const float mid = static_cast<float>((1 << band.width) - 1) / 2;
    query.step[row * ProxyBands::kMost + i] = largest / 127.0f;
    const auto scale = [&](float* x, float* constant) {
      for (int l = band.lane; l < band.lane + band.used; ++l) {
        *constant -= mid * x[l];
        x[l] *= inverse;
      }
    };
    scale(own.fixed, own.fixed_constant);
    for (int k = 0; k < 2 * pairs; ++k)
      scale(own.turn + k * own.stride, own.turn_constant + k * own.stride);
  }
}

// What one page's tokens are scored with: int8 weights by lane, the constant.
struct ProxyWeights {
  alignas(kLineBytes) int8_t codes[kMaxRows][ProxyBands::kMostLanes];
  float constant[kMaxRows];
};

// Weights of a tile before they are rounded.
struct RawWeights {
  alignas(kLineBytes) float of[ProxyBands::kMostTile];
};

// to = from + the pairs begin .. end - 1, for the page whose middle turns all pairs by `angles` [2,
// pairs]; `turn` is the tile's.
inline void absorb_pairs(const float* from, const float* turn, int tile, int pairs, int begin,
                         int end, const float* angles, RawWeights& to) {
  constexpr int kMostVecs = 6;
  for (int l = 0; l < tile; l += kMostVecs * kVecLanes) {
    with_count<kMostVecs>((tile - l) / kVecLanes, [&]<int kVecs>() {
      F32 sum[kVecs];
      for (int v = 0; v < kVecs; ++v) sum[v] = load<F32>(from + l + v * kVecLanes);
      for (int i = begin; i < end; ++i) {
        const F32 c = splat(angles[i]), s = splat(angles[pairs + i]);
        const float* pair = turn + int64_t{2} * i * tile + l;
        for (int v = 0; v < kVecs; ++v) {
          sum[v] += c * load<F32>(pair + v * kVecLanes);
          sum[v] += s * load<F32>(pair + tile + v * kVecLanes);
        }
      }
      for (int v = 0; v < kVecs; ++v) store(to.of + l + v * kVecLanes, sum[v]);
    });
  }
}

// Weights at page `page` of a run from those at its nodes.
inline void interpolate(const RawWeights (&nodes)[kNodes], int tile, int page, RawWeights& to) {
  const float* of = kNodeWeights.of[page];
  for (int l = 0; l < tile; l += kVecLanes) {
    F32 sum{};
    for (int k = 0; k < kNodes; ++k) sum += load<F32>(nodes[k].of + l) * of[k];
    store(to.of + l, sum);
  }
}

template <int kRows>
inline void round_weights(const ProxyBands& lead, const RawWeights& weights, ProxyWeights& out) {
  const int lanes = lead.lanes();
  for (int r = 0; r < kRows; ++r) {
    for (int l = 0; l < lanes; l += kVecLanes) {
      const I32 codes = round_to_int(load<F32>(weights.of + r * lanes + l));
      store_low_bytes(reinterpret_cast<uint8_t*>(out.codes[r]) + l, codes);
    }
    out.constant[r] = weights.of[lead.constants() + r];
  }
}

// s[r][64], in units of log2.
template <int kWidth, int kRows>
inline void add_proxy_band(const uint8_t* lines, const ProxyBand& band, const ProxyWeights& weights,
                           const float* step, int part, F32 (&s)[kRows][kGroups]) {
  I32 acc[kRows][kGroups];
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) acc[r][g] = I32{};
  }
  accumulate_band<kWidth, false>(lines + band.offset, band.count, weights.codes[0] + band.lane,
                                 ProxyBands::kMostLanes, kQuad, part, acc);
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) s[r][g] += to_float(acc[r][g]) * step[r * ProxyBands::kMost];
  }
}

template <int kRows>
inline void proxy_scores(const uint8_t* lines, const ProxyBands& lead, const ProxyWeights& weights,
                         const float* step, int part, F32 (&s)[kRows][kGroups]) {
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) s[r][g] = splat(weights.constant[r]);
  }
  for (int i = 0; i < lead.bands; ++i) {
    const ProxyBand& band = lead.band[i];
    if (band.width == 8) add_proxy_band<8>(lines, band, weights, step + i, part, s);
    if (band.width == 4) add_proxy_band<4>(lines, band, weights, step + i, part, s);
    if (band.width == 2) add_proxy_band<2>(lines, band, weights, step + i, part, s);
    if (band.width == 1) add_proxy_band<1>(lines, band, weights, step + i, part, s);
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
