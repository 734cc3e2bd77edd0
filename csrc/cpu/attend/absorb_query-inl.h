// Absorbs a tile of queries into a head's pre-RoPE channels, up to the angles of a page; absorb-inl.h does the rest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/cpu/attend/absorbed-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/pre_basis-inl.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// A tile of queries by channel, in the order of a quad's lanes: [D, kQuadLanes].
inline void spread_queries(const float* query, int dim, int rows, float* spread) {
  for (int d = 0; d < dim; ++d) {
    for (int lane = 0; lane < kQuadLanes; ++lane)
      spread[d * kQuadLanes + lane] = lane / kQuad < rows ? query[lane / kQuad * dim + d] : 0.0f;
  }
}

// Products of query channel query_channel and basis channel key_channel, for lanes `lane` and on.
inline F32 spread_product(const float* spread, const PreBasis& pre, int query_channel,
                          int key_channel, int lane) {
  return load<F32>(spread + query_channel * kQuadLanes + lane % kQuadLanes) *
         splat_four(pre.row(key_channel) + lane / kQuadLanes * kQuad);
}

// Absorbs a tile of up to kTileRows queries [rows, D].
inline void absorb_tile(const SlowPairs& slow, const Rope& rope, const float* query, int rows,
                        int dim, const PreBasis& pre, const float* mean, const AbsorbedQuery& out) {
  const int rotary_pairs = rope.rotary_pairs;
  float spread[kMaxHeadDim * kQuadLanes];
  spread_queries(query, dim, rows, spread);
  const auto rotary_products = [&](int i, int lane, F32& with_cosine, F32& with_sine) {
    const int a = slow.pair[i], b = a + rotary_pairs;
    with_cosine = spread_product(spread, pre, a, a, lane) + spread_product(spread, pre, b, b, lane);
    with_sine = spread_product(spread, pre, b, a, lane) - spread_product(spread, pre, a, b, lane);
  };
  // Find scales with which no number exceeds 16 bits and no sum of products 32 bits. A row has four lanes of a vector,
  // and takes the largest of them.
  F32 max_abs[kQuadVecs] = {}, sums[kQuadVecs] = {};
  for (int lane = 0; lane < out.lanes; lane += kVecLanes) {
    F32 sum{}, c, s;
    F32& top = max_abs[lane % kQuadLanes / kVecLanes];
    for (int i = 0; i < slow.count; ++i) {
      rotary_products(i, lane, c, s);
      c = max(c, -c);
      s = max(s, -s);
      top = max(top, max(c, s));
      sum += c + s;
    }
    F32& largest = sums[lane % kQuadLanes / kVecLanes];
    largest = max(largest, sum);
  }
  float inverse[kQuadLanes];
  for (int r = 0; r < kTileRows; ++r) {
    float top = 0, sum = 0;
    for (int j = 0; j < kQuad; ++j) {
      const int lane = r * kQuad + j;
      top = std::max(top, max_abs[lane / kVecLanes][lane % kVecLanes]);
      sum = std::max(sum, sums[lane / kVecLanes][lane % kVecLanes]);
    }
    const float largest = std::max(top / 32767.0f, sum / kMaxRotarySum);
    const float scale = largest > 0 ? largest : 1.0f;
    out.scale[r] = scale / kCosineScale;
    for (int j = 0; j < kQuad; ++j) inverse[r * kQuad + j] = 1.0f / scale;
  }
  // Round the factors of cosines and sines.
  for (int lane = 0; lane < out.lanes; lane += kVecLanes) {
    const F32 inverse_scale = load<F32>(inverse + lane % kQuadLanes);
    F32 c, s;
    for (int i = 0; i < slow.count; ++i) {
      rotary_products(i, lane, c, s);
      const I32 low = round_to_int(c * inverse_scale) & 0xffff,
                high = round_to_int(s * inverse_scale) << 16;
      store(out.rotary + int64_t{i} * out.lanes + lane, low | high);
    }
    F32 fixed{};
    for (int d = 2 * rotary_pairs; d < dim; ++d) fixed += spread_product(spread, pre, d, d, lane);
    store(out.fixed + lane, fixed * inverse_scale * kCosineScale);
  }

  // Absorb the mean.
  std::memset(out.constant, 0, sizeof(float) * (1 + 2 * slow.count) * kConstantLanes);
  for (int r = 0; r < rows; ++r) {
    const float* q = query + r * dim;
    for (int d = 2 * rotary_pairs; d < dim; ++d) out.constant[r] += q[d] * mean[d];
    for (int i = 0; i < slow.count; ++i) {
      const int a = slow.pair[i], b = a + rotary_pairs;
      const float c = q[a] * mean[a] + q[b] * mean[b], s = q[b] * mean[a] - q[a] * mean[b];
      float* with_cosine = out.constant + (1 + 2 * i) * kConstantLanes + r;
      float* with_sine = with_cosine + kConstantLanes;
      // Odd degrees use the imaginary part.
      for (int d = 0; d < kConstantDegrees; ++d) {
        with_cosine[d * kTileRows] = (d % 2 ? s : c) * slow.factor[d][i];
        with_sine[d * kTileRows] = (d % 2 ? -c : s) * slow.factor[d][i];
      }
    }
  }
}

// Twice the mid codes of every head's pre-RoPE channels, in the order of a tile's operands.
inline void prepare_mids(const AttendPlan& plan) {
  for (int h = 0; h < plan.p.keys.layout.num_heads; ++h) {
    const Bands& pre = plan.head(h).pre;
    uint8_t* mids = plan.mids + int64_t{h} * plan.lanes;
    for (int lane = 0; lane < plan.lanes; ++lane) {
      const int width = pre.width(lane / kQuadLanes * kQuad);
      mids[lane] = static_cast<uint8_t>(2 * mid_code(width));
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
