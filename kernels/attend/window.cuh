// The attend stage over the window: sinks, window, outliers and the new tokens themselves. They are
// few, so plain arithmetic in float serves all dtypes; partial results join those of the pages.
#pragma once

#include "kernels/attend/block.cuh"
#include "kernels/attend/dot_rows.cuh"
#include "kernels/attend/logit_rules.cuh"

namespace svdq::device {

template <int kDim>
struct WindowPlan {
  Probabilities p;
  QueryRows<kDim> query;
  float score[kRowTile][kPageTokens + 4];  // rows apart in the banks
  float warp_max[kAttendWarps][kRowTile];
  float factor[kRowTile];
};

// Scores of 16 tokens by one warp; tokens from `count` on get none. `finish` makes a score of row, token and product.
template <int kDim, typename Finish>
SVDQ_DEVICE void score_rows(WindowPlan<kDim>& s, const AttendParams& p, int64_t first, int count,
                            const Finish& finish) {
  const int dim = p.keys.layout.head_dim, lane = lane_index(), begin = warp_index() * kLanes;
  const int left = count - begin, own = left < kLanes ? left : kLanes;
  const Window& window = p.window;
  const bool aligned = aligned_quads(window.keys, window.dtype) && window.batch_stride % 4 == 0 &&
                       window.head_stride % 4 == 0;
  with_quads(window.keys, window.dtype, aligned, [&](const auto& load_quad) {
    dot_rows<4>(
        s.query, dim, own,
        [&](int i, int d) { return load_quad(first + int64_t{begin + i} * dim + d); },
        [&](int i, float product) {
          if (lane % 4 == 0)
            store(&s.score[lane / 4][begin + i], finish(lane / 4, begin + i, product));
        });
  });
  for (int t = own > 0 ? own : 0; t < kLanes; ++t) {
    if (lane % 4 == 0) store(&s.score[lane / 4][begin + t], no_score());
  }
}

// Attends to split `own` of the window. All kAttendThreads of the block take part.
template <int kDim>
SVDQ_DEVICE void attend_window_rows(const AttendParams& p, const AttendWorkspace& workspace,
                                    const BlockRows& rows, int own) {
  WindowPlan<kDim>& s = shared_memory<WindowPlan<kDim>>();
  const int dim = p.keys.layout.head_dim, length = window_length(p, rows.sequence);
  const int split = workspace.page_splits + own;
  const int begin = own * workspace.split_window;
  const bool valid = length >= 0 && length <= p.window.rows;
  int end = begin + workspace.split_window < length ? begin + workspace.split_window : length;
  if (!valid) end = begin;

  load_queries(s.query, p, rows);
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
      const float own = load(&s.score[column + (e & 1)][token]);
      score[e] = sees ? own : no_score();
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

// Grid: x = head and row tile, y = split of the window, z = sequence.
template <int kDim>
SVDQ_KERNEL(kAttendThreads)
attend_window_kernel(AttendParams p, AttendWorkspace workspace) {
  attend_window_rows<kDim>(p, workspace, block_rows(p, workspace), block_y());
}

template <int kDim>
LaunchShape attend_window_launch(const AttendParams& p, const AttendWorkspace& workspace) {
  return {p.keys.layout.num_heads * workspace.row_tiles, workspace.window_splits, p.keys.batch,
          kAttendThreads, static_cast<int>(sizeof(WindowPlan<kDim>))};
}

}  // namespace svdq::device
