// The proxy channels of a head, which estimate the score of a packed token (the select stage). For every page the
// queries are absorbed into these channels as if all its tokens stood at its middle; a token then costs one integer
// dot product a quad of channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// The part of one band that belongs to the proxy channels.
struct ProxyBand {
  int width;
  int count;       // channels of the lines that are read; the operands of those past `used` are 0
  int used;        // proxy channels in it
  int lane;        // of its first operand
  int channel;     // row of its first channel in the head's basis
  bool pre;        // coded before RoPE
  int64_t bytes;   // of the lines
  int64_t offset;  // of the lines in the head's part of a key page
};

// Bands of the proxy channels of one head. A tile of kTileRows query rows has `lanes` operands a row, then the rows'
// constants, which multiply no code.
struct ProxyBands {
  static constexpr int kMaxBands = 2 * kNumWidths;
  // Channels, each band rounded up to whole lines, in whole lines of floats.
  static constexpr int kMaxLanes = kMaxSelectChannels + kLanes;
  static constexpr int kMaxTile = kTileRows * kMaxLanes + kLanes;

  ProxyBand band[kMaxBands];
  int bands = 0;
  int used_lanes = 0;

  int lanes() const { return static_cast<int>(round_up(used_lanes, kLanes)); }
  int tile() const { return kTileRows * lanes() + kLanes; }
  int constants() const { return kTileRows * lanes(); }
};

inline ProxyBands proxy_bands(const HeadPlan& head, int channels) {
  ProxyBands proxy;
  int channel = 0;
  int64_t offset = 0;
  for (const bool pre : {true, false}) {
    const Bands& bands = pre ? head.pre : head.post;
    for (int w = 0; w < kNumWidths; ++w) {
      const int used = std::min(bands.count[w], channels - channel);
      if (used > 0) {
        const int count = static_cast<int>(round_up(used, band_granularity(kWidths[w])));
        proxy.band[proxy.bands++] = {
            kWidths[w], count, used, proxy.used_lanes, channel, pre, band_bytes(kWidths[w], count),
            offset};
        proxy.used_lanes += count;
        channel += used;
      }
      offset += band_bytes(kWidths[w], bands.count[w]);
    }
  }
  return proxy;
}

// Queries of one head, absorbed into its proxy channels up to the angles of a page, tile by tile. A page's operands are
//   fixed[tile][.] + sum over slow pairs i of cos_i rotary[tile][i][0][.] + sin_i rotary[tile][i][1][.],
// where cos_i and sin_i rotate pair i to the middle of the page. Operands are in units of their band's scale, so that
// rounding makes them int8; constants are in units of log2.
struct ProxyQuery {
  float* fixed;   // [tiles, tile]
  float* rotary;  // [tiles, slow pairs, 2, tile]
  float* scale;   // [rows, ProxyBands::kMaxBands]
};

// RoPE pairs that proxy scores include, those that are not smooth first.
struct ProxyPairs {
  int pair[kMaxHeadDim / 2];
  int count = 0;
  int quick = 0;  // number of pairs that are not smooth over a chunk of pages
};

// One row's numbers of a ProxyQuery.
struct ProxyRow {
  float* fixed;  // of lane 0
  float* rotary;
  float* fixed_constant;
  float* rotary_constant;
  int64_t stride;  // from one of the 2 * pairs vectors of `rotary` to the next
};

inline ProxyRow proxy_row(const ProxyBands& proxy, const ProxyQuery& query, int row, int pairs) {
  const int tile = row / kTileRows, r = row % kTileRows, size = proxy.tile();
  float* fixed = query.fixed + int64_t{tile} * size;
  float* rotary = query.rotary + int64_t{tile} * pairs * 2 * size;
  const int lane = r * proxy.lanes(), constant = proxy.constants() + r;
  return {fixed + lane, rotary + lane, fixed + constant, rotary + constant, size};
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
