// Attends one packed page with a task's rows: absorbed queries (absorb-inl.h), reconstructed keys, folded queries
// and outliers, each where there are any.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/core/absorb.h"
#include "csrc/cpu/attend/absorb-inl.h"
#include "csrc/cpu/attend/absorbed-inl.h"
#include "csrc/cpu/attend/folded_rows-inl.h"
#include "csrc/cpu/attend/interleaved-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/softmax-inl.h"
#include "csrc/cpu/attend/task-inl.h"
#include "csrc/cpu/attend/token_slots-inl.h"
#include "csrc/cpu/attend/uncompressed-inl.h"
#include "csrc/cpu/attend/values-inl.h"
#include "csrc/cpu/pack/token_rows-inl.h"
#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/pages/prefetch-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// True if a task scores interleaved channels as it reconstructs them: one tile of rows reads them, no code has 8 bits,
// and all of them rotate.
inline bool fuses_interleaved(const AttendPlan& plan, const AttendTask& task) {
  const LayoutView& layout = plan.p.keys.layout;
  const bool all_rotate =
      plan.absorbs ||
      (plan.gathered() && 2 * plan.p.keys.codec.rope.rotary_pairs == layout.head_dim);
  return all_rotate && task.rows <= kTileRows && plan.head(task.h).pre.count[0] == 0;
}

inline const float* interleaved_cos_sin(const AttendPlan& plan, const AttendScratch& s) {
  return plan.gathered() ? s.token_cos_sin : plan.angles.column_cos(0);
}

// Scores of the tile of rows that begins at the task's row `first`, from all codes of the page.
template <int kRows>
inline void page_scores(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                        int64_t first, const PageVisit& visit) {
  const AttendParams& p = plan.p;
  const int dim = p.keys.layout.head_dim;
  const HeadPlan& head = plan.head(task.h);
  bool scored = false;

  // Score the slow pairs of pre-RoPE channels with absorbed queries.
  if (plan.absorbs) {
    const int64_t tile = (task.row + first) / kTileRows;
    const AbsorbedQuery query = plan.absorbed(task.sequence_head, tile);
    const float* nodes = visit.smooth ? s.nodes + tile * kNodes * 2 * plan.lanes : nullptr;
    AbsorbedPage operands = s.absorbed;
    absorb_page(query, plan.slow, plan.page_middle(task.b, visit.page), visit.chunk_page, nodes,
                head.pre.count[0] / kQuad * kQuadLanes, operands);
    if (visit.interleaved.used()) {
      absorbed_scores<true, kRows>(s.codes, head.pre, operands, query.lanes, s.scores);
    } else {
      absorbed_scores<false, kRows>(visit.lines.keys, head.pre, operands, query.lanes, s.scores);
    }
    scored = true;
  }

  // Add the reconstructed channels.
  if (visit.interleaved.used()) {
    const float* query = s.page_query + first * dim;
    if (visit.fused) {
      if (!scored) std::fill_n(s.scores, kRows * kPageTokens, 0.0f);
      add_pair_scores<kRows>(s.codes, head.pre, folded_channels(plan, task.sequence_head, head),
                             visit.interleaved, interleaved_cos_sin(plan, s), query, dim, s.scores);
    } else if (scored) {
      interleaved_scores<kRows, true>(query, dim, visit.interleaved, s.keys, s.scores);
    } else {
      interleaved_scores<kRows, false>(query, dim, visit.interleaved, s.keys, s.scores);
    }
    scored = true;
  }
  // Add the pairs that hold the mean alone.
  if (visit.interleaved.num_means) {
    add_mean_scores<kRows>(visit.interleaved, p.keys.codec.mean + task.sequence_head * dim,
                           plan.angles.column_cos(0), s.page_query + first * dim, dim, s.scores);
  }
  // Add the post-RoPE channels.
  if (plan.has_post()) {
    const FoldedRows query = folded_queries(plan, task.sequence_head, head);
    const uint8_t* lines = visit.lines.keys + head.pre.page_bytes();
    const int row = static_cast<int>(task.row + first);
    if (scored) {
      code_scores<false, kRows, true>(lines, head.post, query, row, s.scores);
    } else {
      code_scores<false, kRows>(lines, head.post, query, row, s.scores);
    }
  }
  // Overwrite the scores of outliers.
  for (int64_t i = visit.outliers.first; i < visit.outliers.first + visit.outliers.count; ++i) {
    const int64_t at = task.sequence_head * p.keys.num_outliers + i;
    const float* query = plan.query + (task.sequence_head * plan.rows + task.row + first) * dim;
    uncompressed_score<kRows>(query, dim, p.keys.outlier_keys, p.keys.outlier_dtype, at * dim,
                              s.scores + p.keys.outlier_slots[at] % kPageTokens);
  }
}

// Unrotates the queries by the first position of the page, except for gathered pages, whose keys are rotated to their
// own positions.
inline void unrotate_queries(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                             int64_t page) {
  const int dim = plan.p.keys.layout.head_dim, rotary_pairs = plan.p.keys.codec.rope.rotary_pairs;
  const float* query = plan.query + (task.sequence_head * plan.rows + task.row) * dim;
  std::memcpy(s.page_query, query, sizeof(float) * task.rows * dim);
  if (plan.gathered()) return;
  const float* start = plan.page_start(task.b, page);
  for (int64_t r = 0; r < task.rows; ++r)
    unrotate(s.page_query + r * dim, start, start + rotary_pairs, rotary_pairs);
}

// Unpacks a page's pre-RoPE codes and, unless scoring fuses it, reconstructs the interleaved channels: rotated relative
// to the page's first position, or to their own positions if gathered.
inline void reconstruct_page(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                             const PageVisit& visit) {
  const HeadPlan& head = plan.head(task.h);
  if (plan.gathered()) rotate_gathered(plan, task, s, visit.page);
  unpack_bands(visit.lines.keys, head.pre, s.codes);
  if (!visit.fused) {
    reconstruct_keys(s.codes, head.pre, folded_channels(plan, task.sequence_head, head),
                     visit.interleaved, interleaved_cos_sin(plan, s), s.keys);
  }
}

// The share of the lines left to prefetch, one in so many, that goes out before each of three steps: visiting a page,
// scoring it and quantizing its probabilities.
inline constexpr int kScoresShare = 9;

// Attends the page with the tile of rows that begins at the task's row `first`.
template <int kRows>
inline void attend_page_rows(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                             const RowBlock& head_rows, int64_t first, const PageVisit& visit,
                             Prefetcher& next) {
  const AttendParams& p = plan.p;
  const int dim = p.keys.layout.head_dim;
  const RowBlock rows = sub_block(head_rows, first, dim);
  const uint64_t mask = visit.mask;
  // Score the page.
  next.fetch(next.share(kScoresShare));
  page_scores<kRows>(plan, task, s, first, visit);
  if (p.rules.softcap > 0) cap_scores<kRows>(p.rules.softcap, s.scores);
  // Queries of a call have sliding windows of their own.
  const bool rows_differ = plan.slides() && p.queries.length > 1;
  uint64_t masks[kRows];
  for (int r = 0; r < kRows; ++r)
    masks[r] = rows_differ ? mask & sliding_mask(plan, task, visit.page, first + r) : mask;
  // Update the softmax and accumulate 16- or 32-bit values.
  if (!p.keys.layout.packs_values()) {
    if (softmax_rows<kRows>(rows, s.scores, masks, dim, s.probabilities))
      accumulate_uncompressed<kRows>(s.probabilities, visit.lines.values, p.v_dtype, 0, mask, dim,
                                     rows.out);
    return;
  }
  // Mask, update the softmax and quantize probabilities.
  next.fetch(next.share(kScoresShare));
  if (rows_differ) {
    for (int r = 0; r < kRows; ++r) mask_scores<1>(masks[r], s.scores + r * kPageTokens);
  } else if (mask != ~uint64_t{0}) {
    mask_scores<kRows>(mask, s.scores);
  }
  const ValueLayout& value = plan.head(task.h).value;
  quantize_probs<kRows>(rows, s.scores, value, *s.value_scales, next, s.scaled_probs);
  // Accumulate packed values.
  accumulate_packed<kRows>(value, visit.lines.values, s.scaled_probs, next, rows.out);
}

// Attends the page with all rows of the task.
inline void attend_page(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                        const RowBlock& rows, int64_t page, int chunk_page, bool smooth,
                        Prefetcher& next) {
  const AttendParams& p = plan.p;
  PageVisit visit{page_pointers(plan, task, page),
                  page_mask(plan, task, page),
                  page,
                  chunk_page,
                  fuses_interleaved(plan, task),
                  smooth,
                  plan.has_pre() ? plan.interleaved[task.sequence_head] : InterleavedChannels{},
                  {}};
  if (plan.slides()) visit.mask &= sliding_mask(plan, task, page);
  if (visit.mask == 0) return;
  // Reconstruct keys and load value scales, once for all rows.
  if (p.keys.num_outliers) visit.outliers = page_outliers(plan, task, page);
  next.fetch(next.share(kScoresShare));
  if (visit.interleaved.used()) reconstruct_page(plan, task, s, visit);
  if (visit.interleaved.used() || visit.interleaved.num_means)
    unrotate_queries(plan, task, s, visit.page);
  if (p.keys.layout.packs_values())
    load_value_scales(visit.lines.values, visit.mask, *s.value_scales);
  for (int64_t first = 0; first < task.rows; first += kTileRows) {
    with_count<kTileRows>(static_cast<int>(task.rows - first), [&]<int kRows>() {
      attend_page_rows<kRows>(plan, task, s, rows, first, visit, next);
    });
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
