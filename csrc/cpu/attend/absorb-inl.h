// Absorbs the slow RoPE pairs of pre-RoPE channels into few queries, page by page; the formula is in
// slow_pairs-inl.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/core/absorb.h"
#include "csrc/cpu/attend/absorbed-inl.h"
#include "csrc/cpu/attend/folded_rows-inl.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// acc[degree][v] += pairs begin .. end - 1 at vectors v of `rotary`, for degrees below kDegree.
template <int kDegree, int kVecs>
[[gnu::always_inline]] inline void add_pairs(const AbsorbedQuery& query, const MiddleAngles& angles,
                                             int lane, int begin, int end,
                                             I32 (&acc)[kDegrees][kVecs]) {
  for (int i = begin; i < end; ++i) {
    const int32_t* rotary = query.rotary + int64_t{i} * query.lanes + lane;
    I32 angle[kDegree];
    for (int d = 0; d < kDegree; ++d)
      angle[d] = I32{} + angles.packed_cos_sin[d * angles.pairs + i];
    for (int v = 0; v < kVecs; ++v) {
      const I32 both = load<I32>(rotary + v * kVecLanes);
      for (int d = 0; d < kDegree; ++d) acc[d][v] = dot_halves(acc[d][v], both, angle[d]);
    }
  }
}

inline constexpr int kAbsorbVecs = SVDQ_TARGET == 512 ? 4 : 2;  // accumulators of a degree
static_assert(kAbsorbVecs % kQuadVecs == 0);

template <int kVecs>
[[gnu::always_inline]] inline void clear(I32 (&acc)[kDegrees][kVecs]) {
  for (auto& sums : acc) {
    for (I32& sum : sums) sum = I32{};
  }
}

// Sums of smooth pairs and `fixed` at the nodes of the chunk whose first page is that of `angles`: nodes [kNodes, 2,
// lanes].
inline void absorb_nodes(const AbsorbedQuery& query, const SlowPairs& slow,
                         const MiddleAngles& angles, float* nodes) {
  for (int k = 0; k < kNodes; ++k) {
    const MiddleAngles node = angles.at(k * kNodeStep);
    float* sums = nodes + int64_t{k} * 2 * query.lanes;
    for (int lane = 0; lane < query.lanes; lane += kAbsorbVecs * kVecLanes) {
      I32 acc[kDegrees][kAbsorbVecs];
      clear(acc);
      add_pairs<2>(query, node, lane, slow.quick, slow.count, acc);
      for (int v = 0; v < kAbsorbVecs; ++v) {
        const int at = lane + v * kVecLanes;
        store(sums + at, to_float(acc[0][v]) + load<F32>(query.fixed + at));
        store(sums + query.lanes + at, to_float(acc[1][v]));
      }
    }
  }
}

// Constants of a page, without the mid codes' share.
inline void absorb_constants(const AbsorbedQuery& query, const MiddleAngles& page,
                             AbsorbedPage& out) {
  constexpr int kVecs = kConstantLanes / kVecLanes;
  constexpr int kChains = 2;  // independent sums, since additions of one sum wait for each other
  F32 cosine[kChains][kVecs], sine[kChains][kVecs];
  for (int k = 0; k < kChains; ++k) {
    for (int v = 0; v < kVecs; ++v) cosine[k][v] = sine[k][v] = F32{};
  }
  const auto add = [&](int i, int k) __attribute__((always_inline)) {
    const float* at = query.constant + (1 + 2 * i) * kConstantLanes;
    for (int v = 0; v < kVecs; ++v) {
      cosine[k][v] += load<F32>(at + v * kVecLanes) * page.cos_sin[i];
      sine[k][v] += load<F32>(at + kConstantLanes + v * kVecLanes) * page.cos_sin[page.pairs + i];
    }
  };
  int i = 0;
  for (; i + kChains <= query.pairs; i += kChains) {
    for (int k = 0; k < kChains; ++k) add(i + k, k);
  }
  for (; i < query.pairs; ++i) add(i, 0);
  float sums[kConstantLanes];
  for (int v = 0; v < kVecs; ++v) {
    F32 sum = load<F32>(query.constant + v * kVecLanes);
    for (int k = 0; k < kChains; ++k) sum += cosine[k][v] + sine[k][v];
    store(sums + v * kVecLanes, sum);
  }
  std::memcpy(out.constant, sums, sizeof(out.constant));
}

// Operands for the page of `angles`, page `page` of its chunk. With `nodes`, smooth pairs are interpolated. The first
// wide_lanes lanes belong to 8-bit channels.
inline void absorb_page(const AbsorbedQuery& query, const SlowPairs& slow,
                        const MiddleAngles& angles, int page, const float* nodes, int wide_lanes,
                        AbsorbedPage& out) {
  // Sum pairs, and the nodes' share of smooth pairs.
  F32 max_abs[kDegrees][kQuadVecs] = {};
  for (int lane = 0; lane < query.lanes; lane += kAbsorbVecs * kVecLanes) {
    I32 acc[kDegrees][kAbsorbVecs];
    clear(acc);
    add_pairs<3>(query, angles, lane, 0, slow.curved, acc);
    add_pairs<2>(query, angles, lane, slow.curved, nodes ? slow.quick : slow.count, acc);
    for (int v = 0; v < kAbsorbVecs; ++v) {
      const int at = lane + v * kVecLanes;
      F32 sum[kDegrees];
      for (int d = 0; d < kDegrees; ++d) sum[d] = to_float(acc[d][v]);
      if (nodes) {
        for (int k = 0; k < kNodes; ++k) {
          const float* node = nodes + int64_t{k} * 2 * query.lanes + at;
          const float share = kNodeWeights.of[page][k];
          sum[0] += load<F32>(node) * share;
          sum[1] += load<F32>(node + query.lanes) * share;
        }
      } else {
        sum[0] += load<F32>(query.fixed + at);
      }
      for (int d = 0; d < kDegrees; ++d) {
        F32& top = max_abs[d][v % kQuadVecs];
        top = max(top, max(sum[d], -sum[d]));
        store(out.sums + d * query.lanes + at, sum[d]);
      }
    }
  }
  // Quantize every degree; the largest sum of a row determines its scale.
  absorb_constants(query, angles, out);
  for (int d = 0; d < kDegrees; ++d) {
    // Take the maximum of each row's four lanes.
    I32 one, two;
    for (int i = 0; i < kVecLanes; ++i) {
      one[i] = i ^ 1;
      two[i] = i ^ 2;
    }
    F32 inverse[kQuadVecs];
    float tops[kQuadLanes];
    for (int v = 0; v < kQuadVecs; ++v) {
      F32 top = max(max_abs[d][v], __builtin_shuffle(max_abs[d][v], one));
      top = max(top, __builtin_shuffle(top, two));
      store(tops + v * kVecLanes, top);
      inverse[v] = splat(kMaxFolded) / max(top, splat(1e-30f));
    }
    // Round to high and low terms and sum their products with the mid codes.
    I32 middles{}, low_middles{};
    for (int lane = 0; lane < query.lanes; lane += 4 * kVecLanes) {
      const float* sums = out.sums + d * query.lanes + lane;
      int8_t* high = out.high + d * query.lanes + lane;
      I32 code[4];
      for (int v = 0; v < 4; ++v)
        code[v] = round_to_int(load<F32>(sums + v * kVecLanes) * inverse[v % kQuadVecs]);
      store_bytes(high, code);
      middles = dot_wide(middles, load<U32>(query.mids + lane), load<U32>(high));
      if (lane >= wide_lanes) continue;
      for (int v = 0; v < 4; ++v) {
        const F32 rest =
            load<F32>(sums + v * kVecLanes) * inverse[v % kQuadVecs] - to_float(code[v]);
        // Channels past the 8-bit ones have no low terms, so the constant must lack them too.
        code[v] = lane + v * kVecLanes < wide_lanes ? round_to_int(rest * kLowPerHigh) : I32{};
      }
      int8_t* low = out.low + d * query.lanes + lane;
      store_bytes(low, code);
      low_middles = dot_wide(low_middles, load<U32>(query.mids + lane), load<U32>(low));
    }
    // Subtract the mid codes' share from the constants.
    float taken[kTileRows] = {};
    const F32 both = to_float(middles) + to_float(low_middles) * (1 / kLowPerHigh);
    for (int i = 0; i < kVecLanes; ++i) taken[i % kTileRows] += both[i];
    for (int r = 0; r < kTileRows; ++r) {
      out.scale[d][r] = tops[r * kQuad] / kMaxFolded * query.scale[r];
      out.constant[d][r] -= taken[r] / 2 * out.scale[d][r];
    }
  }
}

// s[r][64] from a page's operands and codes.
template <bool kUnpacked, int kRows>
inline void absorbed_scores(const uint8_t* lines, const Bands& bands, const AbsorbedPage& operands,
                            int lanes, float* s) {
  for (int d = 0; d < kDegrees; ++d) {
    const FoldedRows query{operands.high + d * lanes,
                           operands.low + d * lanes,
                           operands.scale[d],
                           operands.constant[d],
                           kQuad,
                           kQuadLanes};
    for_each_product<kUnpacked, kRows>(
        lines, bands, query, 0, [&](int r, int group, int part, F32 sum) {
          const int t = tokens_at(group, part);
          float* at = s + r * kPageTokens + t;
          const F32 score = sum * query.scale[r] + query.offset[r];
          store(at, d == 0 ? score : load<F32>(at) + score * load<F32>(kChebyshev.of[d] + t));
        });
  }
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    for (int r = 0; r < kRows; ++r) {
      F32 score = load<F32>(s + r * kPageTokens + t);
      for (int d = kDegrees; d < kConstantDegrees; ++d)
        score += load<F32>(kChebyshev.of[d] + t) * operands.constant[d][r];
      store(s + r * kPageTokens + t, score);
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
