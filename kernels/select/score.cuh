// Turns scores of tokens into each query row's log-sum-exp over a sample of pages, then a weight per
// token.
#pragma once

#include "kernels/select/norms.cuh"

namespace svdq::device {

// Each row's maximum and sum over a run of the sampled pages. Grid: x = head, y = run, z = sequence.
template <int kRows>
SVDQ_KERNEL(kSelectThreads)
select_norms_kernel(SelectParams p, SelectWorkspace workspace, HeadTable heads) {
  const SequencePages sequence = sequence_pages(p, block_z());
  const int stride = static_cast<int>(select_sample_stride(sequence.pages));
  PageChunk<kRows> run(p, workspace, heads, block_x(),
                       stride / 2 + block_y() * kChunkPages * stride, stride, sequence.pages);
  run.begin();
  for (int tile = 0; tile < workspace.row_tiles; ++tile) {
    run.prepare(tile, [](int, int) { return 0.0f; });
    RowState state[kRows];
    SVDQ_UNROLL
    for (int r = 0; r < kRows; ++r) state[r] = empty_row();
    constexpr int kRuns = kChunksAtOnce<kRows>;
    const int page = run.own_page();
    for (int first = 0; first < kTokenChunks && run.known(page); first += kRuns) {
      float score[kRuns][4][kRows];
      run.score(first, score);
      SVDQ_UNROLL
      for (int t = 0; t < 4 * kRuns; ++t) {
        const int slot = run.page(page) * kPageTokens + run.first_token(first + t / 4) + t % 4;
        if (slot < p.keys.sink_tokens || slot >= sequence.length) continue;
        SVDQ_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const float x = score[t / 4][t % 4][r];
          raise_max(state[r], x);
          state[r].sum += exp2_fast(x - state[r].max);
        }
      }
    }
    SVDQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float most = warp_max(state[r].max);
      const float sum = warp_sum(state[r].sum * probability(state[r].max, most));
      if (lane_index() == 0) store(&run.states()[warp_index() * kRows + r], RowState{most, sum});
    }
    sync_threads();
    if (thread_index() < kRows) {
      RowState all = empty_row();
      for (int w = 0; w < kSelectWarps; ++w) {
        const RowState part = load(&run.states()[w * kRows + thread_index()]);
        raise_max(all, part.max);
        all.sum += part.sum * probability(part.max, all.max);
      }
      const int64_t at =
          (select_tile(workspace, run.sequence_head(), tile) * kSampleChunks + block_y()) * kRows +
          thread_index();
      store(&workspace.sample_max[at], all.max);
      store(&workspace.sample_sum[at], all.sum);
    }
    sync_threads();
  }
}

// log2 of a row's sum over the sample; 0 if the sample is empty, and what leaves nothing of a row
// that does not exist.
SVDQ_DEVICE float sample_norm(const SelectParams& p, const SelectWorkspace& workspace,
                              int64_t sequence_head, int tile, int row) {
  if (int64_t{tile} * workspace.tile_rows + row >= query_rows(p)) return poisoned_score();
  RowState all = empty_row();
  const int64_t at =
      select_tile(workspace, sequence_head, tile) * kSampleChunks * workspace.tile_rows + row;
  for (int run = 0; run < kSampleChunks; ++run) {
    const float most = load(&workspace.sample_max[at + run * workspace.tile_rows]);
    raise_max(all, most);
    all.sum +=
        load(&workspace.sample_sum[at + run * workspace.tile_rows]) * probability(most, all.max);
  }
  return all.sum > 0.0f ? all.max + log2_fast(all.sum) : 0.0f;
}

// Grid: x = head, y = run of 16 pages, z = sequence.
template <int kRows>
SVDQ_KERNEL(kSelectThreads)
select_scores_kernel(SelectParams p, SelectWorkspace workspace, HeadTable heads) {
  const SequencePages sequence = sequence_pages(p, block_z());
  PageChunk<kRows> run(p, workspace, heads, block_x(), block_y() * kChunkPages, 1, sequence.pages);
  if (!run.has(0)) return;
  run.begin();
  constexpr int kRuns = kChunksAtOnce<kRows>;
  const int page = run.own_page();
  float weight[kTokenChunks][4] = {};
  for (int tile = 0; tile < workspace.row_tiles; ++tile) {
    run.prepare(tile, [&](int tile, int row) {
      return sample_norm(p, workspace, run.sequence_head(), tile, row);
    });
    SVDQ_UNROLL
    for (int first = 0; first < kTokenChunks; first += kRuns) {
      if (!run.known(page)) break;
      float score[kRuns][4][kRows];
      run.score(first, score);
      SVDQ_UNROLL
      for (int t = 0; t < 4 * kRuns; ++t) {
        SVDQ_UNROLL
        for (int r = 0; r < kRows; ++r)
          weight[first + t / 4][t % 4] += exp2_fast(score[t / 4][t % 4][r]);
      }
    }
    sync_threads();
  }
  if (!run.has(page)) return;
  SVDQ_UNROLL
  for (int i = 0; i < kTokenChunks; ++i) {
    const int slot = run.page(page) * kPageTokens + run.first_token(i);
    Floats4 all;
    SVDQ_UNROLL
    for (int t = 0; t < 4; ++t) {
      const bool counts = slot + t >= p.keys.sink_tokens && slot + t < sequence.length;
      all.x[t] = !counts ? kNotSelected : run.known(page) ? weight[i][t] : kInvalid;
    }
    float* to = workspace.weights + run.sequence_head() * workspace.max_pages * kPageTokens + slot;
    store(reinterpret_cast<Floats4*>(to), all);
  }
}

inline LaunchShape select_norms_launch(const SelectParams& p, const SelectWorkspace& workspace) {
  return {p.keys.layout.num_heads, kSampleChunks, p.keys.batch, kSelectThreads,
          select_layout(workspace).bytes};
}

inline LaunchShape select_scores_launch(const SelectParams& p, const SelectWorkspace& workspace) {
  return {p.keys.layout.num_heads, (workspace.max_pages + kChunkPages - 1) / kChunkPages,
          p.keys.batch, kSelectThreads, select_layout(workspace).bytes};
}

}  // namespace svdq::device
