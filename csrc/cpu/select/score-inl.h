// Scores of packed tokens from their proxy channels, page by page.
#pragma once

#include <cstdint>

#include "csrc/core/absorb.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/select/plan-inl.h"
#include "csrc/cpu/select/proxy-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Operands of one page: int8 numbers by lane, which multiply codes, and a constant per row.
struct ProxyOperands {
  alignas(kLineBytes) int8_t codes[kTileRows][ProxyBands::kMaxLanes];
  float constant[kTileRows];
};

// Operands of a tile before rounding.
struct ProxySums {
  alignas(kLineBytes) float of[ProxyBands::kMaxTile];
};

// to = from + pairs begin .. end - 1 of a tile, for the page whose middle has the cosines and sines `angles` [2,
// pairs].
inline void absorb_pairs(const float* from, const float* rotary, int tile, int pairs, int begin,
                         int end, const float* angles, ProxySums& to) {
  constexpr int kMaxVecs = 6;
  for (int l = 0; l < tile; l += kMaxVecs * kVecLanes) {
    with_count<kMaxVecs>((tile - l) / kVecLanes, [&]<int kVecs>() {
      F32 sum[kVecs];
      for (int v = 0; v < kVecs; ++v) sum[v] = load<F32>(from + l + v * kVecLanes);
      for (int i = begin; i < end; ++i) {
        const F32 c = splat(angles[i]), s = splat(angles[pairs + i]);
        const float* pair = rotary + int64_t{2} * i * tile + l;
        for (int v = 0; v < kVecs; ++v) {
          sum[v] += c * load<F32>(pair + v * kVecLanes);
          sum[v] += s * load<F32>(pair + tile + v * kVecLanes);
        }
      }
      for (int v = 0; v < kVecs; ++v) store(to.of + l + v * kVecLanes, sum[v]);
    });
  }
}

// Sums at page `page` of a chunk, interpolated between its nodes.
inline void interpolate(const ProxySums (&nodes)[kNodes], int tile, int page, ProxySums& to) {
  const float* of = kNodeWeights.of[page];
  for (int l = 0; l < tile; l += kVecLanes) {
    F32 sum{};
    for (int k = 0; k < kNodes; ++k) sum += load<F32>(nodes[k].of + l) * of[k];
    store(to.of + l, sum);
  }
}

template <int kRows>
inline void round_operands(const ProxyBands& proxy, const ProxySums& operands, ProxyOperands& out) {
  const int lanes = proxy.lanes();
  for (int r = 0; r < kRows; ++r) {
    for (int l = 0; l < lanes; l += kVecLanes) {
      const I32 codes = round_to_int(load<F32>(operands.of + r * lanes + l));
      store_low_bytes(reinterpret_cast<uint8_t*>(out.codes[r]) + l, codes);
    }
    out.constant[r] = operands.of[proxy.constants() + r];
  }
}

// Adds the products of one band to the scores s, in units of log2, of the tokens of one part.
template <int kWidth, int kRows>
inline void add_proxy_band(const uint8_t* lines, const ProxyBand& band,
                           const ProxyOperands& operands, const float* scale, int part,
                           F32 (&s)[kRows][kGroups]) {
  I32 acc[kRows][kGroups];
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) acc[r][g] = I32{};
  }
  accumulate_band<kWidth, false>(lines + band.offset, band.count, operands.codes[0] + band.lane,
                                 ProxyBands::kMaxLanes, kQuad, part, acc);
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g)
      s[r][g] += to_float(acc[r][g]) * scale[r * ProxyBands::kMaxBands];
  }
}

template <int kRows>
inline void proxy_scores(const uint8_t* lines, const ProxyBands& proxy,
                         const ProxyOperands& operands, const float* scale, int part,
                         F32 (&s)[kRows][kGroups]) {
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) s[r][g] = splat(operands.constant[r]);
  }
  for (int i = 0; i < proxy.bands; ++i) {
    const ProxyBand& band = proxy.band[i];
    if (band.width == 8) add_proxy_band<8>(lines, band, operands, scale + i, part, s);
    if (band.width == 4) add_proxy_band<4>(lines, band, operands, scale + i, part, s);
    if (band.width == 2) add_proxy_band<2>(lines, band, operands, scale + i, part, s);
    if (band.width == 1) add_proxy_band<1>(lines, band, operands, scale + i, part, s);
  }
}

// Calls fn(page, row, part, s) with the scores s of the tokens of pages first .. last - 1, which lie in one chunk, for
// rows row .. row + kRows - 1.
template <typename Fn>
inline void for_each_score(const SelectPlan& plan, const SelectHead& head, int64_t first,
                           int64_t last, const Fn& fn) {
  const ProxyQuery query = plan.proxy_query(head.sequence_head);
  const int pairs = plan.num_pairs(), size = head.proxy.tile(), quick = plan.slow.quick;
  const int64_t chunk = first / kChunkPages * kChunkPages;
  const bool smooth = last - first > kNodes && quick < pairs;
  for (int row = 0; row < plan.rows; row += kTileRows) {
    const float* fixed = query.fixed + int64_t{row / kTileRows} * size;
    const float* rotary = query.rotary + int64_t{row / kTileRows} * pairs * 2 * size;
    const float* scale = query.scale + row * ProxyBands::kMaxBands;
    ProxySums nodes[kNodes], raw;
    // Sum smooth pairs at the nodes.
    for (int k = 0; k < kNodes && smooth; ++k) {
      absorb_pairs(fixed, rotary, size, pairs, quick, pairs,
                   plan.page_angles(head.b, chunk + k * kNodeStep), nodes[k]);
    }
    for (int64_t page = first; page < last; ++page) {
      // Absorb the page's angles.
      if (smooth) interpolate(nodes, size, static_cast<int>(page - chunk), raw);
      absorb_pairs(smooth ? raw.of : fixed, rotary, size, pairs, 0, smooth ? quick : pairs,
                   plan.page_angles(head.b, page), raw);
      // Round and score.
      const uint8_t* lines = plan.lines(head.b, head.h, page);
      with_count<kTileRows>(static_cast<int>(plan.rows - row), [&]<int kRows>() {
        ProxyOperands operands;
        round_operands<kRows>(head.proxy, raw, operands);
        for (int part = 0; part < kParts; ++part) {
          F32 s[kRows][kGroups];
          proxy_scores<kRows>(lines, head.proxy, operands, scale, part, s);
          fn.template operator()<kRows>(page, row, part, s);
        }
      });
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
