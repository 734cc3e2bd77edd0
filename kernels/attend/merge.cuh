// The merge stage: partial results over disjoint sets of keys become one, in a fixed order.
#pragma once

#include "kernels/attend/plan.cuh"
#include "kernels/machine/value_rotation.cuh"

namespace svdq::device {

inline constexpr int kMergeThreads = 128;

struct MergePlan {
  float rotated[kMaxHeadDim];  // sum over the splits of pages
};

// Logit of the learned sink of query row `row` of a KV head, in units of log2; -inf for none.
SVDQ_DEVICE float learned_sink(const AttendParams& p, int kv_head, int64_t row) {
  if (!p.rules.sinks) return no_score();
  const int group = p.queries.num_heads / p.keys.layout.num_heads;
  const int head = kv_head * group + static_cast<int>(row / p.queries.length);
  const float sink = load(&p.rules.sinks[head]) * kLog2E;
  return sink - sink == 0.0f ? sink : not_a_number();
}

// Merges the splits of one query row of attend. Grid: x = query row of a KV head, y = KV head,
// z = sequence. A split without keys has maximum -inf and its output is not read. Outputs of packed values are rotated,
// those of the window are not: pages are summed first, and their sum is rotated back. A learned sink is one more logit
// of the query head, without a value; one that is not finite makes the row NaN.
SVDQ_KERNEL(kMergeThreads) merge_splits_kernel(AttendParams p, AttendWorkspace workspace) {
  const int64_t sequence_head = int64_t{block_z()} * p.keys.layout.num_heads + block_y();
  const int64_t row = sequence_head * query_rows(p) + block_x();
  const int64_t slot = sequence_head * workspace.row_tiles * kRowTile + block_x();
  const int splits = workspace.splits(), dim = p.keys.layout.head_dim;
  const float* maxima = workspace.partial_max + slot * splits;
  const float* sums = workspace.partial_sum + slot * splits;

  if (block_x() == 0 && block_y() == 0 && thread_index() == 0) store_lengths(p, block_z());
  const float sink = learned_sink(p, block_y(), block_x());
  RowState state = {sink, 0.0f};
  for (int i = 0; i < splits; ++i) {
    const float max = load(&maxima[i]);
    if (max > state.max) state.max = max;
  }
  state.sum = probability(sink, state.max);
  for (int i = 0; i < splits; ++i) {
    const float weight = probability(load(&maxima[i]), state.max);
    if (weight != 0.0f) state.sum += weight * load(&sums[i]);
  }
  const float inverse = state.sum > 0.0f ? 1.0f / state.sum : 0.0f;
  const auto sum_of = [&](int first, int last, int d) {
    float out = 0.0f;
    for (int i = first; i < last; ++i) {
      const float weight = probability(load(&maxima[i]), state.max);
      if (weight != 0.0f)
        out += weight * load(&workspace.partial_out[(slot * splits + i) * dim + d]);
    }
    return out;
  };
  const int rotated_splits = p.keys.layout.packs_values() ? workspace.page_splits : 0;
  float* rotated = nullptr;
  if (rotated_splits > 0) {
    rotated = shared_memory<MergePlan>().rotated;
    for (int d = thread_index(); d < dim; d += kMergeThreads)
      store(&rotated[d], sum_of(0, rotated_splits, d));
    sync_threads();
    unrotate_row(rotated, dim, kMergeThreads);
  }
  for (int d = thread_index(); d < dim; d += kMergeThreads) {
    const float pages = rotated ? unrotated(rotated, dim, d) : 0.0f;
    const float out = sum_of(rotated_splits, splits, d) + pages;
    store_number(p.out, p.queries.dtype, row * dim + d, out * inverse);
  }
  if (thread_index() == 0) store(&p.lse[row], log_sum(state));
}

inline LaunchShape merge_splits_launch(const AttendParams& p, const AttendWorkspace&) {
  const int bytes = p.keys.layout.packs_values() ? static_cast<int>(sizeof(MergePlan)) : 0;
  return {static_cast<int>(query_rows(p)), p.keys.layout.num_heads, p.keys.batch, kMergeThreads,
          bytes};
}

// The operator: two partial results of the same rows. Grid: x = row.
SVDQ_KERNEL(kMergeThreads) merge_kernel(MergeParams p) {
  const int64_t row = block_x();
  const float a = load(&p.lse_a[row]) * kLog2E, b = load(&p.lse_b[row]) * kLog2E;
  const float most = a > b ? a : b;
  const float weight_a = probability(a, most), weight_b = probability(b, most);
  const RowState state{most, weight_a + weight_b};
  const float inverse = state.sum > 0.0f ? 1.0f / state.sum : 0.0f;
  for (int64_t d = thread_index(); d < p.head_dim; d += kMergeThreads) {
    const int64_t i = row * p.head_dim + d;
    // An empty side may hold anything; it must not turn into NaN times zero.
    const float from_a = weight_a > 0.0f ? load_number(p.out_a, p.dtype, i) * weight_a : 0.0f;
    const float from_b = weight_b > 0.0f ? load_number(p.out_b, p.dtype, i) * weight_b : 0.0f;
    store_number(p.out, p.dtype, i, (from_a + from_b) * inverse);
  }
  if (thread_index() == 0) store(&p.lse[row], log_sum(state));
}

inline LaunchShape merge_launch(const MergeParams& p) {
  return {static_cast<int>(p.rows), 1, 1, kMergeThreads, 0};
}

}  // namespace svdq::device
