// The merge stage: partial results over disjoint sets of keys become one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "csrc/core/parallel.h"
#include "csrc/core/scalar.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/softmax-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Merges the splits of one query row and writes its output.
inline void finish_row(const AttendPlan& plan, int64_t row) {
  const AttendParams& p = plan.p;
  const int dim = p.keys.layout.head_dim;
  const float* maxima = plan.partial_max + row * plan.splits;
  const float* sums = plan.partial_sum + row * plan.splits;
  // A learned sink is a logit of the query head that has no value.
  const int64_t query_head = row / p.queries.length % p.queries.num_heads;
  const float sink = p.rules.sinks ? p.rules.sinks[query_head] * kLog2E : kNoScore;
  float row_max = sink;
  for (int64_t i = 0; i < plan.splits; ++i) row_max = std::max(row_max, maxima[i]);
  float out[kMaxHeadDim] = {};
  float sum = p.rules.sinks ? std::exp2(sink - row_max) : 0.0f;
  for (int64_t i = 0; i < plan.splits && row_max != kNoScore; ++i) {
    if (maxima[i] == kNoScore) continue;
    const float factor = std::exp2(maxima[i] - row_max);
    sum += factor * sums[i];
    const float* partial = plan.partial_out + (row * plan.splits + i) * dim;
    for (int d = 0; d < dim; d += kVecLanes)
      store(out + d, load<F32>(out + d) + load<F32>(partial + d) * factor);
  }
  // Rows that see no token are zeros, with the logarithm of an empty sum.
  const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
  for (int d = 0; d < dim; ++d)
    store_scalar(p.out, p.queries.dtype, row * dim + d, out[d] * inverse);
  p.lse[row] = sum > 0 ? (row_max + std::log2(sum)) * kLn2 : kNoScore;
}

// Merges two partial results of the same rows.
inline void merge(const MergeParams& p, const Executor& executor) {
  for_each_task(executor, p.rows, [&](int64_t row, int) {
    const float max_lse = std::max(p.lse_a[row], p.lse_b[row]);
    const bool empty = max_lse == kNoScore;
    const float factor_a = empty ? 0.0f : std::exp(p.lse_a[row] - max_lse);
    const float factor_b = empty ? 0.0f : std::exp(p.lse_b[row] - max_lse);
    const float inverse = empty ? 0.0f : 1.0f / (factor_a + factor_b);
    for (int64_t i = row * p.head_dim; i < (row + 1) * p.head_dim; ++i) {
      // An empty side may hold anything, NaN too, so it is not read.
      const float a = factor_a > 0 ? load_scalar(p.out_a, p.dtype, i) * factor_a : 0.0f;
      const float b = factor_b > 0 ? load_scalar(p.out_b, p.dtype, i) * factor_b : 0.0f;
      store_scalar(p.out, p.dtype, i, (a + b) * inverse);
    }
    p.lse[row] = empty ? kNoScore : max_lse + std::log(factor_a + factor_b);
  });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
