// The attend stage over packed pages with exact values, for up to 8 query rows a block; where values
// are packed, attend_decode.cuh does it, and for more query rows attend_tiles.cuh.
//
// A block serves 8 query rows of a KV head and a run of pages, one page at a time. Warp w gets the
// scores of the 16 tokens of group w: after RoPE codes [16 tokens, channels] times folded queries
// [channels, 8 rows] on tensor cores, before RoPE from reconstructed keys (scores.cuh). The four
// warps agree on each row's maximum, leave their probabilities in shared memory, and multiply them
// with the values in plain arithmetic, a quarter of the channels each. Keys arrive by cp.async
// `stages` - 1 ahead. Reads of codes are 16 bytes a thread, whole lines; shared memory is read and
// written without bank conflicts.
#pragma once

#include "kernels/attend/accumulate.cuh"
#include "kernels/attend/logit_rules.cuh"
#include "kernels/attend/outliers.cuh"
#include "kernels/attend/scores.cuh"
#include "kernels/pages/page_stream.cuh"

namespace svdq::device {

// Shared memory of a block; the stages follow it.
template <typename Scores>
struct PagesPlan {
  Probabilities p;
  typename Scores::Shared scores;
  float warp_max[kAttendWarps][kRowTile];  // at the end, sums
  float factor[kRowTile];                  // of the outputs so far
  alignas(16) uint8_t stages[16];          // more follow
};

template <typename Scores>
inline constexpr int kPagesPlanBytes = static_cast<int>(sizeof(PagesPlan<Scores>)) - 16;

// Starts to copy the key lines of a page of one head.
template <typename Parts>
SVDQ_DEVICE void copy_keys(uint8_t* to, const uint8_t* keys, const HeadPlan& head, int threads) {
  Parts::for_each(head, [&]<int kWidth>(int count) {
    const int bytes = band_bytes(kWidth, count);
    copy_lines<kWidth>(to, keys, bytes, thread_index(), threads);
    to += bytes;
    keys += bytes;
  });
}

// Softmax of the scores of a page, spread over the threads as scorers leave them. Leaves
// probabilities in shared memory and gives the factor of what was summed before.
template <typename Plan>
SVDQ_DEVICE void softmax_page(Plan& s, const float (&score)[4], RowState (&state)[2],
                              float (&factor)[2]) {
  const int group = lane_index() / 4, column = lane_index() % 4 * 2, warp = warp_index();
  for (int i = 0; i < 2; ++i) {
    float most = score[i] > score[i + 2] ? score[i] : score[i + 2];
    for (int mask = 4; mask < kWarpSize; mask *= 2) {
      const float other = shuffle_xor(most, mask);
      most = other > most ? other : most;
    }
    if (group == 0) store(&s.warp_max[warp][column + i], most);
  }
  sync_threads();
  for (int i = 0; i < 2; ++i) {
    float most = no_score();
    for (int w = 0; w < kAttendWarps; ++w) {
      const float other = load(&s.warp_max[w][column + i]);
      most = other > most ? other : most;
    }
    factor[i] = raise_max(state[i], most);
    if (warp == 0 && group == 0) store(&s.factor[column + i], factor[i]);
  }
  for (int half = 0; half < 2; ++half) {
    const float first = probability(score[2 * half], state[0].max);
    const float second = probability(score[2 * half + 1], state[1].max);
    state[0].sum += first;
    state[1].sum += second;
    float* to = &s.p.of[warp][(group + 8 * half) * kRowTile + column];
    store(reinterpret_cast<Floats2*>(to), Floats2{first, second});
  }
  sync_threads();
}

// Writes a block's maxima and sums, which its threads hold in parts; with `readable` false what
// makes the rows' results NaN, since a kernel has no other way to say that its input is wrong.
template <typename Plan>
SVDQ_DEVICE void write_states(Plan& s, const RowState (&state)[2], const AttendWorkspace& workspace,
                              const BlockRows& rows, int split, bool valid) {
  const int column = lane_index() % 4 * 2;
  for (int i = 0; i < 2; ++i) {
    float sum = state[i].sum;
    for (int mask = 4; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() < 4) store(&s.warp_max[warp_index()][column + i], sum);
  }
  sync_threads();
  if (warp_index() != 0 || lane_index() >= 4) return;
  for (int i = 0; i < 2; ++i) {
    float sum = 0.0f;
    for (int w = 0; w < kAttendWarps; ++w) sum += load(&s.warp_max[w][column + i]);
    const int64_t at = rows.slot(workspace.row_tiles, column + i) * workspace.splits() + split;
    store(&workspace.partial_max[at], valid ? state[i].max : poisoned_score());
    store(&workspace.partial_sum[at], sum);
  }
}

// Grid: x = head and row tile, y = split, z = sequence.
template <typename Scores>
SVDQ_KERNEL(kAttendThreads)
attend_pages_kernel(AttendParams p, AttendWorkspace workspace, HeadTable heads) {
  PagesPlan<Scores>& s = shared_memory<PagesPlan<Scores>>();
  const BlockRows rows = block_rows(p, workspace);
  const HeadPlan head = head_plan(heads, rows.head);
  const int dim = p.keys.layout.head_dim, split = block_y();
  const TokenSlots slots(p, rows);
  const SlidingWindow sliding(p, rows);

  // Start to copy the keys of the first pages.
  const auto copy = [&](uint8_t* to, int64_t id, TokenRange) {
    copy_keys<typename Scores::Parts>(
        to, p.keys.pages + id * p.keys.layout.k_page_bytes + head.k_offset, head, kAttendThreads);
  };
  PageStream stream(p.keys, rows.sequence,
                    page_range(p.keys, rows.sequence, split, workspace.page_splits,
                               workspace.max_pages, sliding.first_slot()),
                    {s.stages, workspace.stages, workspace.stage_bytes}, copy);
  stream.require(slots.valid());

  Scores scores(s.scores, p, workspace, rows, head);  // barriers before its use follow
  Outliers outliers(p, rows, stream.page());
  RowState state[2] = {empty_row(), empty_row()};
  WindowValues<Scores::kDim> values;
  values.reset();
  for (; stream.has_page(); stream.advance()) {
    stream.receive([] { sync_threads(); });
    const int page = stream.page();

    // Score the page by its codes.
    float scored[1][4];
    auto& score = scored[0];
    scores.score(stream.bytes(), page, score);

    // Patch the scores of outliers.
    outliers.for_each(page, [&](int token, int index) {
      if (token / kLanes != warp_index()) return;
      const Floats2 exact = outliers.score_pair(index);
      SVDQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (token % kLanes != lane_index() / 4 + half * 8) continue;
        score[2 * half] = exact.x;
        score[2 * half + 1] = exact.y;
      }
    });

    cap_scores(p.rules, scored);

    // Mask tokens that are not valid.
    const TokenRange tokens = stream.tokens();
    SVDQ_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int token = warp_index() * kLanes + lane_index() / 4 + e / 2 * 8;
      if (!tokens.has(token) || (slots.given() && !slots.has(page, token))) score[e] = no_score();
    }

    sliding.mask(
        slots, page,
        [](int, int e) { return warp_index() * kLanes + lane_index() / 4 + e / 2 * 8; },
        [](int e) { return lane_index() % 4 * 2 + e % 2; }, scored);

    // Turn scores into probabilities.
    float factor[2];
    softmax_page(s, score, state, factor);

    // Accumulate the values.
    const uint8_t* from = p.v_pages + stream.page_id() * p.keys.layout.v_page_bytes + head.v_offset;
    values.add(from, p.v_dtype, 0, dim, s.p, tokens, s.factor);
  }
  const bool valid = stream.finish();

  sync_threads();
  const int64_t stride = int64_t{workspace.splits()} * dim;
  float* out =
      workspace.partial_out + rows.slot(workspace.row_tiles, 0) * stride + int64_t{split} * dim;
  values.write(out, stride, dim);
  write_states(s, state, workspace, rows, split, valid);
}

template <typename Scores>
LaunchShape attend_pages_launch(const AttendParams& p, const AttendWorkspace& workspace) {
  return {p.keys.layout.num_heads * workspace.row_tiles, workspace.page_splits, p.keys.batch,
          kAttendThreads, kPagesPlanBytes<Scores> + workspace.stages * workspace.stage_bytes};
}

}  // namespace svdq::device
