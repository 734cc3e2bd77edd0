// The attend stage over the window: sinks, window, outliers and the new tokens themselves. They are
// few, so plain arithmetic in float serves all dtypes; partial results join those of the pages.
#pragma once

#include "kernels/attend/block.cuh"
#include "kernels/attend/logit_rules.cuh"

namespace svdq::device {

template <int kDim>
struct WindowPlan {
  Probabilities p;
  float query[kRowTile][kDim];
  float score[kRowTile][kPageTokens];
  float warp_max[kAttendWarps][kRowTile];
  float factor[kRowTile];
};

// Scores of 16 tokens by one warp, whose lanes share the channels; tokens from `count` on get none. `finish` makes a
// score of row, token and product.
template <int kDim, typename Finish>
SVDQ_DEVICE void score_rows(WindowPlan<kDim>& s, const AttendParams& p, int64_t first, int count,
                            const Finish& finish) {
  const int dim = p.keys.layout.head_dim, lane = lane_index();
  for (int t = warp_index() * kLanes; t < (warp_index() + 1) * kLanes; ++t) {
    float products[kRowTile] = {};
    for (int d = lane; t < count && d < dim; d += kWarpSize) {
      const float key = load_number(p.window.keys, p.window.dtype, first + int64_t{t} * dim + d);
      SVDQ_UNROLL
      for (int row = 0; row < kRowTile; ++row) products[row] += key * load(&s.query[row][d]);
    }
    const float sum = sum_rows(products);
    if (lane % 4 == 0) store(&s.score[lane / 4][t], finish(lane / 4, t, sum));
  }
}

// Grid: x = head and row tile, y = split of the the window, z = sequence.
template <int kDim>
SVDQ_KERNEL(kAttendThreads)
attend_window_kernel(AttendParams p, AttendWorkspace workspace) {
  WindowPlan<kDim>& s = shared_memory<WindowPlan<kDim>>();
  const BlockRows rows = block_rows(p, workspace);
  const int dim = p.keys.layout.head_dim, length = load(&p.window.lens[rows.sequence]);
  const int split = workspace.page_splits + block_y();
  const int begin = block_y() * workspace.split_window;
  const bool valid = length >= 0 && length <= p.window.rows;
  int end = begin + workspace.split_window < length ? begin + workspace.split_window : length;
  if (!valid) end = begin;

  for (int i = thread_index(); i < kRowTile * dim; i += kAttendThreads) {
    const int row = i / dim;
    store(&s.query[row][i % dim], row < rows.count ? load_query(p, rows, row, i % dim) : 0.0f);
  }
  // The window that this thread's two query rows see: the last q_len are the queries' own tokens.
  const int group = lane_index() / 4, column = lane_index() % 4 * 2;
  int visible[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t query = (rows.first + column + i) % p.queries.length;
    visible[i] = p.causal ? length - static_cast<int>(p.queries.length - 1 - query) : length;
  }
  const SlidingWindow sliding(p, rows);

  RowState state[2] = {empty_row(), empty_row()};
  WindowValues<kDim> values;
  values.reset();
  const int64_t base = rows.sequence * p.window.batch_stride + rows.head * p.window.head_stride;
  for (int first = begin; first < end; first += kPageTokens) {
    const int count = end - first < kPageTokens ? end - first : kPageTokens;
    sync_threads();
    // Cap scores and mask what lies before the sliding window as they are stored: that takes fewest registers.
    score_rows(s, p, base + int64_t{first} * dim, count, [&](int row, int token, float score) {
      if (sliding.given() && first + token < sliding.first_window_row(row, length))
        return no_score();
      return cap_score(p.rules, score);
    });
    sync_warp();
    float score[4], factor[2];
    for (int e = 0; e < 4; ++e) {
      const int token = warp_index() * kLanes + group + (e / 2) * 8;
      const bool sees = token < count && first + token < visible[e & 1];
      score[e] = sees ? load(&s.score[column + (e & 1)][token]) : no_score();
    }
    softmax_page(s, score, state, factor);
    values.add(p.window.values, p.window.dtype, base + int64_t{first} * dim, dim, s.p, {0, count},
               s.factor);
  }

  sync_threads();
  const int64_t stride = int64_t{workspace.splits()} * dim;
  values.write(
      workspace.partial_out + rows.slot(workspace.row_tiles, 0) * stride + int64_t{split} * dim,
      stride, dim);
  write_states(s, state, workspace, rows, split, valid);
}

template <int kDim>
LaunchShape attend_window_launch(const AttendParams& p, const AttendWorkspace& workspace) {
  return {p.keys.layout.num_heads * workspace.row_tiles, workspace.window_splits, p.keys.batch,
          kAttendThreads, static_cast<int>(sizeof(WindowPlan<kDim>))};
}

}  // namespace svdq::device
