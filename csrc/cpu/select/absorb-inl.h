// Absorbs the queries of a head into its proxy channels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/core/scalar.h"
#include "csrc/cpu/select/plan-inl.h"
#include "csrc/cpu/select/proxy-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Absorb query q [D] into x [D], a basis vector times its scale or the mean. absorb_fixed adds channels
// begin .. end - 1, which do not rotate; absorb_rotary sets the slow pairs.
inline void absorb_fixed(float* fixed, const float* q, const float* x, int begin, int end) {
  float sum = *fixed;
  for (int d = begin; d < end; ++d) sum += q[d] * x[d];
  *fixed = sum;
}
inline void absorb_rotary(float* rotary, int64_t stride, const ProxyPairs& slow, int rotary_pairs,
                          const float* q, const float* x) {
  for (int i = 0; i < slow.count; ++i) {
    const int a = slow.pair[i], b = a + rotary_pairs;
    rotary[2 * i * stride] = q[a] * x[a] + q[b] * x[b];
    rotary[(2 * i + 1) * stride] = q[b] * x[a] - q[a] * x[b];
  }
}

// Divides the numbers of one row, which are in units of log2, by a scale per band with which no page's operands exceed
// 127, and subtracts the mid codes' share from the constant.
inline void scale_proxy(const ProxyBands& proxy, const ProxyQuery& query, int row, int pairs) {
  const ProxyRow own = proxy_row(proxy, query, row, pairs);
  for (int i = 0; i < proxy.bands; ++i) {
    const ProxyBand& band = proxy.band[i];
    float largest = 0;
    for (int l = band.lane; l < band.lane + band.used; ++l) {
      float bound = std::fabs(own.fixed[l]);
      for (int k = 0; k < pairs; ++k) {
        const float* pair = own.rotary + 2 * k * own.stride + l;
        bound += std::sqrt(pair[0] * pair[0] + pair[own.stride] * pair[own.stride]);
      }
      largest = std::max(largest, bound);
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const float mid = mid_code(band.width);
    query.scale[row * ProxyBands::kMaxBands + i] = largest / 127.0f;
    const auto scale = [&](float* x, float* constant) {
      for (int l = band.lane; l < band.lane + band.used; ++l) {
        *constant -= mid * x[l];
        x[l] *= inverse;
      }
    };
    scale(own.fixed, own.fixed_constant);
    for (int k = 0; k < 2 * pairs; ++k)
      scale(own.rotary + k * own.stride, own.rotary_constant + k * own.stride);
  }
}

// Absorbs the queries of one head into its proxy channels.
inline void prepare_proxy(const SelectPlan& plan, int64_t sequence_head) {
  const SelectParams& p = plan.p;
  const int64_t b = sequence_head / p.keys.layout.num_heads,
                h = sequence_head % p.keys.layout.num_heads;
  const int dim = p.keys.layout.head_dim, rotary_pairs = p.keys.codec.rope.rotary_pairs;
  const HeadPlan& head = p.keys.layout.heads[h];
  const ProxyBands proxy = proxy_bands(head, p.channels);
  const ProxyQuery query = plan.proxy_query(sequence_head);
  const int64_t size = plan.tiles() * proxy.tile();
  std::memset(query.fixed, 0, sizeof(float) * size);
  std::memset(query.rotary, 0, sizeof(float) * size * 2 * plan.num_pairs());
  float q[kMaxHeadDim], x[kMaxHeadDim];
  const float factor = p.queries.sm_scale * kLog2E;
  for (int row = 0; row < plan.rows; ++row) {
    const ProxyRow own = proxy_row(proxy, query, row, plan.num_pairs());
    const int64_t at = (sequence_head * plan.rows + row) * dim;
    for (int d = 0; d < dim; ++d)
      q[d] = load_scalar(p.queries.data, p.queries.dtype, at + d) * factor;
    const auto absorb = [&](float* fixed, float* rotary, bool pre) {
      absorb_fixed(fixed, q, x, pre ? 2 * rotary_pairs : 0, dim);
      if (pre) absorb_rotary(rotary, own.stride, plan.slow, rotary_pairs, q, x);
    };
    // Absorb the proxy channels.
    for (int i = 0; i < proxy.bands; ++i) {
      const ProxyBand& band = proxy.band[i];
      for (int j = 0; j < band.used; ++j) {
        const int64_t channel = b * p.keys.layout.rank + head.first_channel + band.channel + j;
        for (int d = 0; d < dim; ++d)
          x[d] = bfloat16_to_float(p.keys.codec.basis[channel * dim + d]) *
                 p.keys.codec.scale[channel];
        absorb(own.fixed + band.lane + j, own.rotary + band.lane + j, band.pre);
      }
    }
    // Absorb the mean.
    std::memcpy(x, p.keys.codec.mean + sequence_head * dim, sizeof(float) * dim);
    absorb(own.fixed_constant, own.rotary_constant, p.keys.layout.rope != RopeMode::kPost);
    if (p.keys.layout.rope == RopeMode::kHybrid)
      absorb_fixed(own.fixed_constant, q, p.keys.codec.post_mean + sequence_head * dim, 0, dim);
    scale_proxy(proxy, query, row, plan.num_pairs());
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
