// The attend stage for up to 8 query rows a KV head over packed values: decoding, in one launch. Blocks along y share
// the pages of a sequence, and some more its window (window.cuh); the last that is done merges (decode_merge.cuh).
//
// A warp serves 8 query rows of a KV head and a run of pages, one page at a time and without regard
// to other warps: it copies its pages by cp.async `stages` - 1 ahead, scores them (decode_scores.cuh),
// rotates scores into halves relative to the page's own maximum, so that none is lost that is valid, and
// multiplies them with the values (decode_values.cuh). No barrier in the loop; the warps of a block
// share the queries' weights alone.
//
// Reads of packed data are 16 bytes a thread and whole lines; shared memory is read and written
// without bank conflicts.
#pragma once

#include "kernels/attend/decode_merge.cuh"
#include "kernels/attend/decode_scores.cuh"
#include "kernels/attend/window.cuh"

namespace svdq::device {

// Shared memory of a block: stages of every warp follow it.
template <typename Scores>
struct DecodePlan {
  typename Scores::Shared scores;
  WarpStates states;
  alignas(16) uint8_t stages[16];  // more follow
};

template <typename Scores>
inline constexpr int kDecodePlanBytes = static_cast<int>(sizeof(DecodePlan<Scores>)) - 16;

// Softmax of a page: what was summed before shrinks by `factor`; probabilities are relative to the
// page's maximum and count `weight` times.
SVDQ_DEVICE void softmax_decode(float (&score)[kGroups][4], RowState (&state)[2],
                                float (&factor)[2], float (&weight)[2]) {
  SVDQ_UNROLL
  for (int j = 0; j < 2; ++j) {
    float most = no_score();
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      most = score[s][j] > most ? score[s][j] : most;
      most = score[s][j + 2] > most ? score[s][j + 2] : most;
    }
    SVDQ_UNROLL
    for (int mask = 4; mask < kWarpSize; mask *= 2) {
      const float other = shuffle_xor(most, mask);
      most = other > most ? other : most;
    }
    factor[j] = raise_max(state[j], most);
    weight[j] = probability(most, state[j].max);
    const float page = most == no_score() ? 0.0f : most;
    float sum = 0.0f;
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      SVDQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        float& x = score[s][j + 2 * h];
        x = exp2_fast(x - page);
        sum += x;
      }
    }
    state[j].sum = fused(sum, weight[j], state[j].sum);
  }
}

// Score tiles that a warp transposes; they take the place of a page's keys once those are scored.
using ScoreTiles = uint32_t[2 * kGroups][kWarpSize];

// Probabilities of a page as operands: rounded to halves and transposed through shared memory.
SVDQ_DEVICE void transpose_probabilities(ScoreTiles& tiles, const float (&p)[kGroups][4],
                                         PageProbabilities& to) {
  sync_warp();  // other lanes may still read what lies there
  SVDQ_UNROLL
  for (int s = 0; s < kGroups; ++s) {
    SVDQ_UNROLL
    for (int h = 0; h < 2; ++h)
      store(&tiles[2 * s + h][lane_index()], pack_half2(p[s][2 * h], p[s][2 * h + 1]));
  }
  sync_warp();
  SVDQ_UNROLL
  for (int i = 0; i < 2; ++i) {
    uint32_t loaded[4];
    LoadMatrix<4, true>::run(loaded, &tiles[4 * i + lane_index() / 8][lane_index() % 8 * 4]);
    SVDQ_UNROLL
    for (int m = 0; m < 4; ++m) to[2 * i + m / 2][m % 2] = loaded[m];
  }
}

// A warp's share of the pages of split block_y(); its maxima, sums and outputs are left in shared memory, at first
// relative to its own maximum.
template <typename Scores>
SVDQ_DEVICE void attend_pages_of_warp(DecodePlan<Scores>& s, Scores& scores, const AttendParams& p,
                                      const AttendWorkspace& workspace, const HeadPlan& head,
                                      const BlockRows& rows, DecodeValues<Scores::kDim>& values,
                                      RowState (&state)[2]) {
  using Values = DecodeValues<Scores::kDim>;
  using Parts = typename Scores::Parts;
  const ValueLayout& value = head.value;
  uint8_t* stages = s.stages + warp_index() * workspace.stages * workspace.stage_bytes;

  // Start to copy the warp's first pages.
  const TokenSlots slots(p, rows);
  const SlidingWindow sliding(p, rows);
  const int key_bytes = decode_key_bytes(Parts::bytes(head));
  const auto copy = [&](uint8_t* to, int64_t id, TokenRange) {
    copy_decode_keys<Parts>(to, p.keys.pages + id * p.keys.layout.k_page_bytes + head.k_offset,
                            head);
    Values::copy(to + key_bytes, p.v_pages + id * p.keys.layout.v_page_bytes + head.v_offset,
                 value);
  };
  PageStream stream(
      p.keys, rows.sequence,
      page_range(p.keys, rows.sequence, block_y() * workspace.page_warps + warp_index(),
                 workspace.page_splits * workspace.page_warps, workspace.max_pages,
                 sliding.first_slot()),
      {stages, workspace.stages, workspace.stage_bytes}, copy);
  stream.require(slots.valid());

  Outliers outliers(p, rows, stream.page());
  for (; stream.has_page(); stream.advance()) {
    stream.receive([] { sync_warp(); });
    const int page = stream.page();

    // Score the page by its codes.
    float score[kGroups][4];
    scores.score(stream.bytes(), page, score);

    // Patch the scores of outliers.
    outliers.for_each(page, [&](int token, int index) {
      const Floats2 exact = outliers.score_pair(index);
      SVDQ_UNROLL
      for (int i = 0; i < 2 * kGroups; ++i) {
        if (token != decode_token(i / 2) + i % 2) continue;
        score[i / 2][i % 2 * 2] = exact.x;
        score[i / 2][i % 2 * 2 + 1] = exact.y;
      }
    });

    cap_scores(p.rules, score);

    // Mask tokens that are not valid, and clear their scales, which may be anything.
    const TokenRange tokens = stream.tokens();
    if (tokens.begin > 0 || tokens.end < kPageTokens) {
      SVDQ_UNROLL
      for (int i = 0; i < 4 * kGroups; ++i) {
        if (!tokens.has(decode_token(i / 4) + i % 4 / 2)) score[i / 4][i % 4] = no_score();
      }
      Values::clear(stream.bytes() + key_bytes, tokens);
    }
    if (slots.given()) {
      SVDQ_UNROLL
      for (int i = 0; i < 2 * kGroups; ++i) {
        if (slots.has(page, decode_token(i / 2) + i % 2)) continue;
        score[i / 2][i % 2 * 2] = score[i / 2][i % 2 * 2 + 1] = no_score();
      }
    }

    sliding.mask(
        slots, page, [](int i, int e) { return decode_token(i) + e / 2; },
        [](int e) { return lane_index() % 4 * 2 + e % 2; }, score);

    // Turn scores into probabilities.
    float factor[2], weight[2];
    softmax_decode(score, state, factor, weight);
    PageProbabilities probabilities;
    transpose_probabilities(*reinterpret_cast<ScoreTiles*>(stream.bytes()), score, probabilities);

    // Accumulate the values.
    values.add(stream.bytes() + key_bytes, value, probabilities, factor, weight);
  }
  store_states(s.states, state, stream.finish());
}

// Partial result of the pages of split block_y().
template <typename Scores>
SVDQ_DEVICE void attend_packed_pages(const AttendParams& p, const AttendWorkspace& workspace,
                                     const HeadTable& heads, const BlockRows& rows) {
  DecodePlan<Scores>& s = shared_memory<DecodePlan<Scores>>();
  const HeadPlan head = head_plan(heads, rows.head);
  const int dim = p.keys.layout.head_dim, bytes = workspace.stages * workspace.stage_bytes;
  Scores scores(s.scores, p, workspace, rows, head, kDecodeThreads);
  sync_threads();
  uint8_t* stages = s.stages + warp_index() * bytes;
  DecodeValues<Scores::kDim> values;
  values.reset();
  const bool has_pages = warp_index() < workspace.page_warps;
  if (has_pages) {
    RowState state[2] = {empty_row(), empty_row()};
    attend_pages_of_warp(s, scores, p, workspace, head, rows, values, state);
  }
  sync_threads();
  if (has_pages) {
    float factor[2];
    SVDQ_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int row = lane_index() % 4 * 2 + j;
      factor[j] = probability(load(&s.states.max[warp_index()][row]),
                              block_max(s.states, workspace.page_warps, row));
    }
    values.write(reinterpret_cast<float*>(stages), merge_stride(dim), head.value, factor);
  }
  sync_threads();
  write_block(s.states, reinterpret_cast<const float*>(s.stages),
              bytes / static_cast<int>(sizeof(float)), workspace.page_warps, workspace, rows, dim);
}

// Grid: x = head and row tile, y = the splits of the pages, then those of the window, z = sequence.
template <typename Scores>
SVDQ_KERNEL(kDecodeThreads)
attend_decode_kernel(AttendParams p, AttendWorkspace workspace, HeadTable heads) {
  const BlockRows rows = block_rows(p, workspace);
  if (block_y() < workspace.page_splits) {
    attend_packed_pages<Scores>(p, workspace, heads, rows);
  } else {
    attend_window_rows<Scores::kDim>(p, workspace, rows, block_y() - workspace.page_splits);
  }
  if (block_x() == 0 && block_y() == 0 && thread_index() == 0) store_lengths(p, block_z());
  merge_if_last(p, workspace, rows);
}

template <typename Scores>
int attend_decode_bytes(const AttendWorkspace& workspace, int head_dim) {
  const int pages =
      kDecodePlanBytes<Scores> + workspace.page_warps * workspace.stages * workspace.stage_bytes;
  const int window = static_cast<int>(sizeof(WindowPlan<Scores::kDim>));
  const int last = last_block_bytes(head_dim);
  const int most = pages > window ? pages : window;
  return most > last ? most : last;
}

template <typename Scores>
LaunchShape attend_decode_launch(const AttendParams& p, const AttendWorkspace& workspace) {
  return {p.keys.layout.num_heads * workspace.row_tiles, workspace.splits(), p.keys.batch,
          kDecodeThreads, attend_decode_bytes<Scores>(workspace, p.keys.layout.head_dim)};
}

}  // namespace svdq::device
