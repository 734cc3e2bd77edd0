// The attend stage over packed pages for up to 8 query rows a KV head: decoding.
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

#include "kernels/attend/block.cuh"
#include "kernels/attend/decode_scores.cuh"
#include "kernels/attend/decode_values.cuh"
#include "kernels/attend/logit_rules.cuh"

namespace svdq::device {

inline constexpr int kDecodeWarps = 4;  // of a block, at most
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;

// Shared memory of a block: stages of every warp follow it.
template <typename Scores>
struct DecodePlan {
  typename Scores::Shared scores;
  alignas(16) uint32_t
      transposed[kDecodeWarps][2 * kGroups][kWarpSize];  // score tiles to transpose
  alignas(16) uint8_t stages[16];                        // more follow
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

// Probabilities of a page as operands: rounded to halves and transposed through shared memory.
SVDQ_DEVICE void transpose_probabilities(uint32_t (&tiles)[2 * kGroups][kWarpSize],
                                         const float (&p)[kGroups][4], PageProbabilities& to) {
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

// Grid: x = head and row tile, y = a run of splits, one a warp, z = sequence.
template <typename Scores>
SVDQ_KERNEL(kDecodeThreads)
attend_decode_kernel(AttendParams p, AttendWorkspace workspace, HeadTable heads) {
  using Values = DecodeValues<Scores::kDim>;
  DecodePlan<Scores>& s = shared_memory<DecodePlan<Scores>>();
  const BlockRows rows = block_rows(p, workspace);
  const HeadPlan head = head_plan(heads, rows.head);
  using Parts = typename Scores::Parts;
  const ValueLayout& value = head.value;
  Scores scores(s.scores, p, workspace, rows, head, workspace.page_warps * kWarpSize);
  sync_threads();
  const int split = block_y() * workspace.page_warps + warp_index();
  if (split >= workspace.page_splits) return;

  // Start to copy the warp's first pages.
  const TokenSlots slots(p, rows);
  const SlidingWindow sliding(p, rows);
  const int key_bytes = Parts::bytes(head);
  const auto copy = [&](uint8_t* to, int64_t id, TokenRange) {
    uint8_t* values = copy_decode_keys<Parts>(
        to, p.keys.pages + id * p.keys.layout.k_page_bytes + head.k_offset, head);
    Values::copy(values, p.v_pages + id * p.keys.layout.v_page_bytes + head.v_offset, value);
  };
  PageStream stream(p.keys, rows.sequence,
                    page_range(p.keys, rows.sequence, split, workspace.split_pages,
                               workspace.max_pages, sliding.first_slot()),
                    {s.stages + warp_index() * workspace.stages * workspace.stage_bytes,
                     workspace.stages, workspace.stage_bytes},
                    copy);
  stream.require(slots.valid());

  Outliers outliers(p, rows, stream.page());
  RowState state[2] = {empty_row(), empty_row()};
  Values values;
  values.reset();
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
    transpose_probabilities(s.transposed[warp_index()], score, probabilities);

    // Accumulate the values.
    values.add(stream.bytes() + key_bytes, value, probabilities, factor, weight);
  }
  const bool valid = stream.finish();

  const int64_t slot = rows.slot(workspace.row_tiles, 0);
  const int64_t stride = int64_t{workspace.splits()} * p.keys.layout.head_dim;
  values.write(workspace.partial_out + slot * stride + int64_t{split} * p.keys.layout.head_dim,
               stride, value);
  SVDQ_UNROLL
  for (int j = 0; j < 2; ++j) {
    float sum = state[j].sum;
    for (int mask = 4; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() < 4) {
      const int64_t at = (slot + lane_index() * 2 + j) * workspace.splits() + split;
      store(&workspace.partial_max[at], valid ? state[j].max : poisoned_score());
      store(&workspace.partial_sum[at], sum);
    }
  }
}

template <typename Scores>
LaunchShape attend_decode_launch(const AttendParams& p, const AttendWorkspace& workspace) {
  return {
      p.keys.layout.num_heads * workspace.row_tiles,
      (workspace.page_splits + workspace.page_warps - 1) / workspace.page_warps, p.keys.batch,
      workspace.page_warps * kWarpSize,
      kDecodePlanBytes<Scores> + workspace.page_warps * workspace.stages * workspace.stage_bytes};
}

}  // namespace svdq::device
