// The attend stage for more than 8 query rows a KV head, as in speculation and chunked prefill: the
// counterparts of attend_pages_kernel and attend_window_kernel with up to 64 rows a block
// (kernels/attend/tile_rows.cuh). The window take this path where they and the queries share a dtype of 16
// bits; others keep plain arithmetic. Tokens that causality hides from all rows of a block are
// neither read nor multiplied.
//
// Copies are 16 bytes a thread; shared memory is read and written without bank conflicts, ldmatrix
// included. Up to 255 registers a thread and no spills: 8 warps an SM.
#pragma once

#include "kernels/machine/fragments.cuh"
#include "kernels/attend/block.cuh"
#include "kernels/attend/logit_rules.cuh"
#include "kernels/attend/tile_scores.cuh"
#include "kernels/attend/tile_values.cuh"

namespace svdq::device {

// Grid: x = head and block of rows, y = split, z = sequence; shared memory: TileMemory.
template <typename Scores, typename Values>
SVDQ_KERNEL(kTileThreads<Scores::kDim>)
attend_page_tiles_kernel(AttendParams p, AttendWorkspace workspace, HeadTable heads) {
  constexpr int kDim = Scores::kDim;
  uint8_t* shared = shared_memory<TileMemory>().bytes;
  const BlockRows rows = block_rows(p, workspace, workspace.page_tiles);
  const WarpShare share = warp_share<kDim>();
  const HeadPlan head = head_plan(heads, rows.head);
  using Parts = typename Scores::Parts;
  const ValueLayout& value = head.value;
  const int split = block_y(), threads = tile_threads<kDim>(workspace.page_tiles);
  const TokenSlots slots(p, rows);
  const SlidingWindow sliding(p, rows);

  // Start to copy the first pages.
  const int key_bytes = Parts::bytes(head);
  const auto copy = [&](uint8_t* to, int64_t id, TokenRange tokens) {
    copy_keys<Parts>(to, p.keys.pages + id * p.keys.layout.k_page_bytes + head.k_offset, head,
                     threads);
    Values::copy(to + key_bytes, p.v_pages + id * p.keys.layout.v_page_bytes + head.v_offset, value,
                 tokens, threads);
  };
  uint8_t* stages = shared + query_operand_bytes(workspace.page_tiles, workspace.query_steps) +
                    Scores::kSharedBytes;
  PageStream stream(p.keys, rows.sequence,
                    page_range(p.keys, rows.sequence, split, workspace.page_splits,
                               workspace.max_pages, sliding.first_slot()),
                    {stages, workspace.stages, workspace.stage_bytes}, copy);
  stream.require(!Scores::kGathered || slots.valid());

  Scores scores(shared, p, workspace, rows, head, share);  // barriers before its use follow
  Outliers outliers(p, rows, stream.page());
  RowState state[2] = {empty_row(), empty_row()};
  Values values;
  values.reset();
  for (; stream.has_page(); stream.advance()) {
    stream.receive([] { sync_threads(); });
    const int page = stream.page();

    // Clear the scales of tokens that are not valid, which may be anything.
    const TokenRange tokens = stream.tokens();
    const bool whole = tokens.whole();
    if (!whole) {
      Values::clear(stream.bytes() + key_bytes, tokens);
      sync_threads();
    }

    // Score the page by its codes.
    float score[2 * kGroups][4], factor[2];
    scores.score(stream.bytes(), page, score);

    // Patch the scores of outliers.
    outliers.for_each(page, [&](int token, int index) {
      SVDQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = share.pair * kWarpRows + lane_index() / 4 + half * 8;
        const float exact = outliers.score(index, row);
        SVDQ_UNROLL
        for (int i = 0; i < 4 * kGroups; ++i) {
          const int e = half * 2 + i % 2;
          if (token == score_token(i / 2, e)) score[i / 2][e] = exact;
        }
      }
    });

    cap_scores(p.rules, score);

    // Mask tokens that are not valid.
    if (!whole) {
      SVDQ_UNROLL
      for (int i = 0; i < 8 * kGroups; ++i) {
        if (!tokens.has(score_token(i / 4, i % 4))) score[i / 4][i % 4] = no_score();
      }
    }
    if constexpr (Scores::kGathered) {
      SVDQ_UNROLL
      for (int i = 0; i < 8 * kGroups; ++i) {
        if (!slots.has(page, score_token(i / 4, i % 4))) score[i / 4][i % 4] = no_score();
      }
    }

    sliding.mask(
        slots, page, [](int i, int e) { return score_token(i, e); },
        [&](int e) { return share.pair * kWarpRows + lane_index() / 4 + e / 2 * 8; }, score);

    // Turn scores into probabilities.
    softmax_tiles(score, state, factor);

    // Accumulate the values.
    values.add(stream.bytes() + key_bytes, value, score, factor, share.part);
  }
  const bool valid = stream.finish();

  const int dim = p.keys.layout.head_dim;
  values.write(tile_output(workspace, rows, share, split, dim), int64_t{workspace.splits()} * dim,
               dim, share.part);
  write_tile_states(state, workspace, rows, share, split, valid);
}

// Rows of a stage of the exact kernel: two stages of keys and values, and the queries of a block,
// fit into 96 KiB.
template <int kDim>
inline constexpr int kWindowTokens = kDim <= 64    ? 64
                                     : kDim <= 256 ? 32
                                                   : 16;

template <int kDim>
inline constexpr int kWindowStageBytes = 2 * kWindowTokens<kDim> * TokenMatrix<kDim>::kRowBytes;

// The window that any row of the block sees. The last q_len rows are the queries' own tokens.
SVDQ_DEVICE int visible_rows(const AttendParams& p, const BlockRows& rows, int length) {
  if (!p.causal) return length;
  const int64_t first = rows.first % p.queries.length;
  const int64_t latest =
      first + rows.count > p.queries.length ? p.queries.length - 1 : first + rows.count - 1;
  return length - static_cast<int>(p.queries.length - 1 - latest);
}

// Queries and the window have dtype kType. Grid: x = head and block of rows, y = split of the exact
// rows, z = sequence; shared memory: TileMemory.
template <int kDim, DataType kType>
SVDQ_KERNEL(kTileThreads<kDim>)
attend_window_tiles_kernel(AttendParams p, AttendWorkspace workspace) {
  using Matrix = TokenMatrix<kDim>;
  constexpr int kTokens = kWindowTokens<kDim>, kTiles = kTokens / 8;
  uint8_t* shared = shared_memory<TileMemory>().bytes;
  const BlockRows rows = block_rows(p, workspace, workspace.window_tiles);
  const WarpShare share = warp_share<kDim>();
  const int dim = p.keys.layout.head_dim, length = window_length(p, rows.sequence);
  const int threads = tile_threads<kDim>(workspace.window_tiles), steps = dim / 16;
  const int begin = block_y() * workspace.split_window, split = workspace.page_splits + block_y();
  const bool valid = length >= 0 && length <= p.window.rows;
  const int seen = visible_rows(p, rows, length);
  int end = begin + workspace.split_window < seen ? begin + workspace.split_window : seen;
  if (!valid) end = begin;

  const int64_t base = rows.sequence * p.window.batch_stride + rows.head * p.window.head_stride;
  uint8_t* stages = shared + query_operand_bytes(workspace.window_tiles, steps);
  const auto stage = [&](int first) {
    return stages + (first - begin) / kTokens % 2 * kWindowStageBytes<kDim>;
  };
  const auto fetch = [&](int first) {
    const auto counts = [&](int token) { return first + token < end; };
    const int64_t at = base + int64_t{first} * dim;
    uint8_t* to = stage(first);
    if (first < end) {
      Matrix::copy(to, static_cast<const uint16_t*>(p.window.keys) + at, kTokens, dim, threads,
                   counts);
      Matrix::copy(to + kWindowStageBytes<kDim> / 2,
                   static_cast<const uint16_t*>(p.window.values) + at, kTokens, dim, threads,
                   counts);
    }
    commit_copies();
  };
  fetch(begin);

  // The queries as they are; rows that do not exist are zero.
  Words4* query = reinterpret_cast<Words4*>(shared);
  const uint16_t* from = static_cast<const uint16_t*>(p.queries.data) +
                         (rows.sequence_head * query_rows(p) + rows.first) * dim;
  for (int i = thread_index(); i < workspace.window_tiles / 2 * steps * kWarpSize; i += threads) {
    const int pair = i / (steps * kWarpSize), step = i / kWarpSize % steps;
    Words4 a;
    SVDQ_UNROLL
    for (int w = 0; w < 4; ++w) {
      const Coord at = FragmentA16::coord(lane_index(), 2 * w);
      const int row = pair * kWarpRows + at.row;
      const uint16_t* numbers = from + int64_t{row} * dim + step * 16 + at.col;
      a.word[w] = row < rows.count ? load(reinterpret_cast<const uint32_t*>(numbers)) : 0;
    }
    store(&query[i], a);
  }
  query += share.pair * steps * kWarpSize;

  // The window that this thread's two query rows see.
  const auto row_of = [&](int i) { return share.pair * kWarpRows + lane_index() / 4 + i * 8; };
  int visible[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t query = (rows.first + row_of(i)) % p.queries.length;
    visible[i] = p.causal ? length - static_cast<int>(p.queries.length - 1 - query) : length;
    if (visible[i] > end) visible[i] = end;
  }
  const SlidingWindow sliding(p, rows);
  const float unit = p.queries.sm_scale * kLog2E;
  RowState state[2] = {empty_row(), empty_row()};
  WindowTileValues<kDim, kType> values;
  values.reset();
  for (int first = begin; first < end; first += kTokens) {
    wait_copies<0>();
    sync_threads();
    fetch(first + kTokens);
    float score[kTiles][4] = {}, factor[2];
    Matrix::template add_scores<typename Numbers16<kType>::Mma>(stage(first), query, steps, score);
    SVDQ_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) score[i / 4][i % 4] *= unit;
    cap_scores(p.rules, score);
    SVDQ_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int token = first + score_token(i / 4, i % 4);
      if (token >= visible[i % 4 / 2]) score[i / 4][i % 4] = no_score();
    }
    if (sliding.given()) {
      SVDQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int first_row = sliding.first_window_row(row_of(half), length);
        SVDQ_UNROLL
        for (int i = 0; i < 2 * kTiles; ++i) {
          const int e = half * 2 + i % 2;
          if (first + score_token(i / 2, e) < first_row) score[i / 2][e] = no_score();
        }
      }
    }
    softmax_tiles(score, state, factor);
    values.add(stage(first) + kWindowStageBytes<kDim> / 2, ValueLayout{16, dim}, score, factor,
               share.part);
  }

  values.write(tile_output(workspace, rows, share, split, dim), int64_t{workspace.splits()} * dim,
               dim, share.part);
  write_tile_states(state, workspace, rows, share, split, valid);
}

// Bytes of shared memory of a block except for its stages.
template <typename Scores>
constexpr int page_tiles_fixed_bytes(int tiles, int query_steps) {
  return query_operand_bytes(tiles, query_steps) + Scores::kSharedBytes;
}

template <typename Scores>
LaunchShape attend_page_tiles_launch(const AttendParams& p, const AttendWorkspace& workspace) {
  return {p.keys.layout.num_heads * (workspace.row_tiles / workspace.page_tiles),
          workspace.page_splits, p.keys.batch, tile_threads<Scores::kDim>(workspace.page_tiles),
          page_tiles_fixed_bytes<Scores>(workspace.page_tiles, workspace.query_steps) +
              workspace.stages * workspace.stage_bytes};
}

template <int kDim>
LaunchShape attend_window_tiles_launch(const AttendParams& p, const AttendWorkspace& workspace) {
  return {p.keys.layout.num_heads * (workspace.row_tiles / workspace.window_tiles),
          workspace.window_splits, p.keys.batch, tile_threads<kDim>(workspace.window_tiles),
          query_operand_bytes(workspace.window_tiles, p.keys.layout.head_dim / 16) +
              2 * kWindowStageBytes<kDim>};
}

}  // namespace svdq::device
