// Absorbs the slow RoPE pairs of pre-RoPE channels into few queries, page by page; the formula is in
// slow_pairs-inl.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/core/absorb.h"
#include "csrc/cpu/attend/scores-inl.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Weights of a tile of kMaxRows query rows lie quad by quad: four channels of row 0, of row 1, ...
inline constexpr int kQuadLanes = kMaxRows * kQuad;
inline constexpr int kQuadVecs = kQuadLanes / kVecLanes;
static_assert(kQuadVecs * kVecLanes == kQuadLanes);
// In whole lines of bytes.
inline int absorbed_lanes(int rank) {
  return static_cast<int>(round_up(rank / kQuad * kQuadLanes, 4 * kVecLanes));
}
// Constants of all rows and degrees, in whole vectors.
inline constexpr int kConstantLanes =
    (kConstantDegrees * kMaxRows + kVecLanes - 1) / kVecLanes * kVecLanes;

// A tile of queries absorbed into a head's pre-RoPE channels, up to the angles of a page.
struct AbsorbedQuery {
  int32_t* turn;        // [pairs, lanes]: what cosines and sines multiply, two 16-bit numbers
  float* fixed;         // [lanes]: what does not turn, in units of products
  float* unit;          // [kMaxRows]: what one unit of products is worth, in log2 units
  float* constant;      // [1 + 2 * pairs, kConstantLanes]: the same for what multiplies no code
  const uint8_t* mids;  // [lanes]: twice the middle code
  int lanes;
  int pairs;
};

// What smooth pairs and `fixed` add to weights at the nodes of a run: [kNodes, 2, lanes].
using NodeSums = float*;

// A page's weights: [kDegrees, lanes] each; per degree and row the step, and what multiplies no code.
struct AbsorbedWeights {
  int8_t* high;
  int8_t* low;
  float* raw;
  float step[kDegrees][kMaxRows];
  float constant[kConstantDegrees][kMaxRows];
};

// acc[degree][v] += the pairs begin .. end - 1 at vectors v of `turn`, for degrees below kDegree.
template <int kDegree, int kVecs>
[[gnu::always_inline]] inline void add_pairs(const AbsorbedQuery& query, const MiddleAngles& angles,
                                             int lane, int begin, int end,
                                             I32 (&acc)[kDegrees][kVecs]) {
  for (int i = begin; i < end; ++i) {
    const int32_t* turn = query.turn + int64_t{i} * query.lanes + lane;
    I32 angle[kDegree];
    for (int d = 0; d < kDegree; ++d) angle[d] = I32{} + angles.halves[d * angles.pairs + i];
    for (int v = 0; v < kVecs; ++v) {
      const I32 both = load<I32>(turn + v * kVecLanes);
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

// Sums of smooth pairs at the nodes of a run whose first page is that of `angles`.
inline void absorb_nodes(const AbsorbedQuery& query, const SlowPairs& slow,
                         const MiddleAngles& angles, NodeSums nodes) {
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

// Constants of a page, without the middle codes' share.
inline void absorb_constants(const AbsorbedQuery& query, const MiddleAngles& page,
                             AbsorbedWeights& out) {
  constexpr int kVecs = kConstantLanes / kVecLanes;
  constexpr int kChains =
      2;  // pairs added up side by side: sums of one chain would wait for each other
  F32 cosine[kChains][kVecs], sine[kChains][kVecs];
  for (int k = 0; k < kChains; ++k) {
    for (int v = 0; v < kVecs; ++v) cosine[k][v] = sine[k][v] = F32{};
  }
  const auto add = [&](int i, int k) __attribute__((always_inline)) {
    const float* at = query.constant + (1 + 2 * i) * kConstantLanes;
    for (int v = 0; v < kVecs; ++v) {
      cosine[k][v] += load<F32>(at + v * kVecLanes) * page.turns[i];
      sine[k][v] += load<F32>(at + kConstantLanes + v * kVecLanes) * page.turns[page.pairs + i];
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

// Weights of the page of `angles`, number `page` of its run; with `nodes`, smooth pairs are
// interpolated.
inline void absorb_page(const AbsorbedQuery& query, const SlowPairs& slow,
                        const MiddleAngles& angles, int page, const float* nodes, int wide_lanes,
                        AbsorbedWeights& out) {
  F32 most[kDegrees][kQuadVecs] = {};
  for (int lane = 0; lane < query.lanes; lane += kAbsorbVecs * kVecLanes) {
    I32 acc[kDegrees][kAbsorbVecs];
    clear(acc);
    add_pairs<3>(query, angles, lane, 0, slow.curved, acc);
    add_pairs<2>(query, angles, lane, slow.curved, nodes ? slow.quick : slow.count, acc);
    for (int v = 0; v < kAbsorbVecs; ++v) {
      const int at = lane + v * kVecLanes;
      F32 weight[kDegrees];
      for (int d = 0; d < kDegrees; ++d) weight[d] = to_float(acc[d][v]);
      if (nodes) {
        for (int k = 0; k < kNodes; ++k) {
          const float* node = nodes + int64_t{k} * 2 * query.lanes + at;
          const float share = kNodeWeights.of[page][k];
          weight[0] += load<F32>(node) * share;
          weight[1] += load<F32>(node + query.lanes) * share;
        }
      } else {
        weight[0] += load<F32>(query.fixed + at);
      }
      for (int d = 0; d < kDegrees; ++d) {
        F32& top = most[d][v % kQuadVecs];
        top = max(top, max(weight[d], -weight[d]));
        store(out.raw + d * query.lanes + at, weight[d]);
      }
    }
  }
  absorb_constants(query, angles, out);
  for (int d = 0; d < kDegrees; ++d) {
    // The largest weight of each row decides its step.
    I32 one, two;
    for (int i = 0; i < kVecLanes; ++i) {
      one[i] = i ^ 1;
      two[i] = i ^ 2;
    }
    F32 inverse[kQuadVecs];
    float tops[kQuadLanes];
    for (int v = 0; v < kQuadVecs; ++v) {
      F32 top = max(most[d][v], __builtin_shuffle(most[d][v], one));
      top = max(top, __builtin_shuffle(top, two));
      store(tops + v * kVecLanes, top);
      inverse[v] = splat(kMostWeight) / max(top, splat(1e-30f));
    }
    I32 middles{}, low_middles{};
    for (int lane = 0; lane < query.lanes; lane += 4 * kVecLanes) {
      const float* raw = out.raw + d * query.lanes + lane;
      int8_t* high = out.high + d * query.lanes + lane;
      I32 code[4];
      for (int v = 0; v < 4; ++v)
        code[v] = round_to_int(load<F32>(raw + v * kVecLanes) * inverse[v % kQuadVecs]);
      store_bytes(high, code);
      middles = dot_wide(middles, load<U32>(query.mids + lane), load<U32>(high));
      if (lane >= wide_lanes) continue;
      for (int v = 0; v < 4; ++v) {
        const F32 rest =
            load<F32>(raw + v * kVecLanes) * inverse[v % kQuadVecs] - to_float(code[v]);
        code[v] = round_to_int(rest * kLowSteps);
      }
      int8_t* low = out.low + d * query.lanes + lane;
      store_bytes(low, code);
      low_middles = dot_wide(low_middles, load<U32>(query.mids + lane), load<U32>(low));
    }
    float taken[kMaxRows] = {};
    const F32 both = to_float(middles) + to_float(low_middles) * (1 / kLowSteps);
    for (int i = 0; i < kVecLanes; ++i) taken[i % kMaxRows] += both[i];
    for (int r = 0; r < kMaxRows; ++r) {
      out.step[d][r] = tops[r * kQuad] / kMostWeight * query.unit[r];
      out.constant[d][r] -= taken[r] / 2 * out.step[d][r];
    }
  }
}

// s[r][64] from a page's weights and codes.
template <bool kUnpacked, int kRows>
inline void absorbed_scores(const uint8_t* lines, const Bands& bands,
                            const AbsorbedWeights& weights, int lanes, float* s) {
  for (int d = 0; d < kDegrees; ++d) {
    const QueryCodes query{weights.high + d * lanes,
                           weights.low + d * lanes,
                           weights.step[d],
                           weights.constant[d],
                           kQuad,
                           kQuadLanes};
    for_each_product<kUnpacked, kRows>(
        lines, bands, query, 0, [&](int r, int group, int part, F32 sum) {
          const int t = tokens_at(group, part);
          float* at = s + r * kPageTokens + t;
          const F32 score = sum * query.step[r] + query.offset[r];
          store(at, d == 0 ? score : load<F32>(at) + score * load<F32>(kChebyshev.of[d] + t));
        });
  }
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    for (int r = 0; r < kRows; ++r) {
      F32 score = load<F32>(s + r * kPageTokens + t);
      for (int d = kDegrees; d < kConstantDegrees; ++d)
        score += load<F32>(kChebyshev.of[d] + t) * weights.constant[d][r];
      store(s + r * kPageTokens + t, score);
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
