// Scores of one page for a task's rows: absorbed queries (absorb-inl.h), reconstructed keys, tail codes
// and outliers, each where there are any.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/core/absorb.h"
#include "csrc/cpu/attend/absorb-inl.h"
#include "csrc/cpu/attend/accumulate-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/scores-inl.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// What one worker needs besides a task's row states; see carve_scratch.
struct AttendScratch {
  uint8_t* codes;                       // [D, 64] unpacked codes of a page
  float* keys;                          // [columns, 64] of a page, from its pre-RoPE channels
  float* page_query;                    // [rows, D] turned to the page's first position
  float* scores;                        // [kMaxRows, 64]
  float (*probabilities)[kPageTokens];  // [kMaxRows], of exact values
  WeightCodes* weights;                 // [kMaxRows, v_groups]
  ValueScales* value_scales;            // [v_groups]
  float* nodes;                         // [tiles, kNodes, 2, lanes]
  AbsorbedWeights absorbed;             // of a tile
  float* turns;                         // [half, 2, 64], of gathered tokens to their positions
  RowBlock rows;                        // [task heads, rows]
};

// Lays the scratch of one worker out from `base` (null: only to measure); returns its bytes.
inline int64_t carve_scratch(const AttendPlan& plan, uint8_t* base, AttendScratch& s) {
  const int64_t dim = plan.p.keys.layout.head_dim, groups = plan.v_groups;
  const int64_t rows = std::min(plan.rows, kTaskRows), all_rows = plan.task_heads * rows;
  int64_t bytes = 0;
  carve(s.codes, base, bytes, dim * kPageTokens);
  carve(s.keys, base, bytes, round_up(dim, kMaxRows) * kPageTokens);
  carve(s.page_query, base, bytes, round_up(rows, kMaxRows) * dim);
  carve(s.scores, base, bytes, kMaxRows * kPageTokens);
  carve(s.probabilities, base, bytes, kMaxRows);
  carve(s.weights, base, bytes, kMaxRows * groups);
  carve(s.value_scales, base, bytes, groups);
  if (plan.absorbs) {
    carve(s.nodes, base, bytes, plan.tiles() * kNodes * 2 * plan.lanes);
    carve(s.absorbed.high, base, bytes, kDegrees * plan.lanes);
    carve(s.absorbed.low, base, bytes, kDegrees * plan.lanes);
    carve(s.absorbed.raw, base, bytes, kDegrees * plan.lanes);
  }
  if (plan.gathered())
    carve(s.turns, base, bytes, 2 * plan.p.keys.codec.rope.rotary_pairs * kPageTokens);
  carve(s.rows.max, base, bytes, all_rows);
  carve(s.rows.sum, base, bytes, all_rows * kVecLanes);
  carve(s.rows.middle_sum, base, bytes, all_rows * groups * kVecLanes);
  carve(s.rows.out, base, bytes, all_rows * dim);
  return bytes;
}

// Rows of one head in a task.
struct AttendTask {
  int64_t b, h, sequence_head;
  int64_t row;   // first query row
  int64_t rows;  // count
};

// Slots of the 64 tokens of a gathered page.
inline const int32_t* gathered_slots(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  return plan.p.token_slots + (task.sequence_head * plan.p.keys.table_stride + page) * kPageTokens;
}

// Tokens of packed page `page` that count: neither sinks nor past the end nor gathered from nowhere.
inline uint64_t page_mask(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  const int64_t begin =
      std::clamp<int64_t>(plan.p.keys.sink_tokens - page * kPageTokens, 0, kPageTokens);
  const int64_t end =
      std::clamp<int64_t>(plan.p.keys.cache_seqlens[task.b] - page * kPageTokens, 0, kPageTokens);
  if (begin >= end) return 0;
  uint64_t mask = end == kPageTokens ? ~uint64_t{0} : (uint64_t{1} << end) - 1;
  mask &= ~uint64_t{0} << begin;
  if (!plan.gathered()) return mask;
  const int32_t* slots = gathered_slots(plan, task, page);
  uint64_t there = 0;
  for (int t = 0; t < kPageTokens; ++t) there |= uint64_t{slots[t] != kNoSlot} << t;
  return mask & there;
}

inline RowBlock sub_block(const RowBlock& rows, int64_t first, int head_dim, int v_groups) {
  return {rows.max + first, rows.sum + first * kVecLanes,
          rows.middle_sum + first * v_groups * kVecLanes, rows.out + first * head_dim};
}

// Outliers first .. first + count - 1 of a head's list.
struct OutlierRange {
  int64_t first, count;
};

inline OutlierRange page_outliers(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  const int32_t* slots = plan.p.keys.outlier_slots + task.sequence_head * plan.p.keys.num_outliers;
  const int32_t* end = slots + plan.p.keys.num_outliers;
  const int32_t* first = std::lower_bound(slots, end, page * kPageTokens);
  const int32_t* last = std::lower_bound(first, end, (page + 1) * kPageTokens);
  return {first - slots, last - first};
}

inline PageBytes page_bytes(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  const LayoutView& layout = plan.p.keys.layout;
  const int64_t id = plan.p.keys.page_table[task.b * plan.p.keys.table_stride + page];
  return {plan.p.keys.pages + id * layout.k_page_bytes + plan.head(task.h).k_offset,
          plan.p.v_pages + id * layout.v_page_bytes + task.h * plan.v_head_bytes};
}

// A page of one head on its way through a task.
struct PageVisit {
  PageBytes bytes;
  uint64_t mask;
  int64_t page;     // of the sequence
  int in_run;       // number in the run
  bool fused;       // columns are scored as they are made
  bool smooth;      // nodes hold what smooth pairs add
  Columns columns;  // reconstructed keys
  OutlierRange outliers;
};

// Whether a task scores columns as it makes them: where one tile of rows reads them, their codes are
// narrow, and all of them turn.
inline bool fuses_columns(const AttendPlan& plan, const AttendTask& task) {
  const LayoutView& layout = plan.p.keys.layout;
  const bool all_turn =
      plan.absorbs ||
      (plan.gathered() && 2 * plan.p.keys.codec.rope.rotary_pairs == layout.head_dim);
  return all_turn && task.rows <= kMaxRows && plan.head(task.h).pre.count[0] == 0;
}

inline const float* column_turns(const AttendPlan& plan, const AttendScratch& s) {
  return plan.gathered() ? s.turns : plan.angles.column_cos(0);
}

// Scores of a tile of rows, first of the task's, from all the page's codes.
template <int kRows>
inline void page_scores(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                        int64_t first, const PageVisit& visit) {
  const AttendParams& p = plan.p;
  const int dim = p.keys.layout.head_dim;
  const HeadPlan& head = plan.head(task.h);
  bool scored = false;
  if (plan.absorbs) {
    const int64_t tile = (task.row + first) / kMaxRows;
    const AbsorbedQuery query = plan.absorbed(task.sequence_head, tile);
    const float* nodes = visit.smooth ? s.nodes + tile * kNodes * 2 * plan.lanes : nullptr;
    AbsorbedWeights weights = s.absorbed;
    absorb_page(query, plan.slow, plan.page_middle(task.b, visit.page), visit.in_run, nodes,
                head.pre.count[0] / kQuad * kQuadLanes, weights);
    if (visit.columns.used()) {
      absorbed_scores<true, kRows>(s.codes, head.pre, weights, query.lanes, s.scores);
    } else {
      absorbed_scores<false, kRows>(visit.bytes.keys, head.pre, weights, query.lanes, s.scores);
    }
    scored = true;
  }
  if (visit.columns.used()) {
    const float* query = s.page_query + first * dim;
    if (visit.fused) {
      if (!scored) std::fill_n(s.scores, kRows * kPageTokens, 0.0f);
      add_pair_scores<kRows>(s.codes, head.pre, pre_codes(plan, task.sequence_head, head),
                             visit.columns, column_turns(plan, s), query, dim, s.scores);
    } else if (scored) {
      column_scores<kRows, true>(query, dim, visit.columns, s.keys, s.scores);
    } else {
      column_scores<kRows, false>(query, dim, visit.columns, s.keys, s.scores);
    }
    scored = true;
  }
  if (visit.columns.num_means) {
    add_mean_scores<kRows>(visit.columns, p.keys.codec.mean + task.sequence_head * dim,
                           plan.angles.column_cos(0), s.page_query + first * dim, dim, s.scores);
  }
  if (plan.has_post()) {
    const QueryCodes query = post_codes(plan, task.sequence_head, head);
    const uint8_t* lines = visit.bytes.keys + head.pre.page_bytes();
    const int row = static_cast<int>(task.row + first);
    if (scored) {
      code_scores<false, kRows, true>(lines, head.post, query, row, s.scores);
    } else {
      code_scores<false, kRows>(lines, head.post, query, row, s.scores);
    }
  }
  for (int64_t i = visit.outliers.first; i < visit.outliers.first + visit.outliers.count; ++i) {
    const int64_t at = task.sequence_head * p.keys.num_outliers + i;
    const float* query = plan.query + (task.sequence_head * plan.rows + task.row + first) * dim;
    exact_score<kRows>(query, dim, p.keys.outlier_keys, p.keys.outlier_dtype, at * dim,
                       s.scores + p.keys.outlier_slots[at] % kPageTokens);
  }
}

// Rotations of the 64 tokens of a gathered page, by pair: that of the page each came from times
// that of its offset there.
inline void turn_gathered(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                          int64_t page) {
  const int half = plan.p.keys.codec.rope.rotary_pairs;
  const int32_t* slots = gathered_slots(plan, task, page);
  for (int first = 0; first < kPageTokens; first += kVecLanes) {
    const float* base[kVecLanes];
    const float* offset[kVecLanes];
    for (int t = 0; t < kVecLanes; ++t) {
      const int64_t slot = slots[first + t] == kNoSlot ? 0 : slots[first + t];
      base[t] = plan.page_start(task.b, slot / kPageTokens);
      offset[t] = plan.angles.row_cos(static_cast<int>(slot % kPageTokens));
    }
    int i = 0;
    for (; i + kVecLanes <= half; i += kVecLanes) {
      F32 cosines[kVecLanes], sines[kVecLanes];
      for (int t = 0; t < kVecLanes; ++t) {
        const F32 a = load<F32>(base[t] + i), b = load<F32>(base[t] + half + i);
        const F32 c = load<F32>(offset[t] + i), d = load<F32>(offset[t] + half + i);
        cosines[t] = a * c - b * d;
        sines[t] = b * c + a * d;
      }
      transpose(cosines);
      transpose(sines);
      for (int j = 0; j < kVecLanes; ++j) {
        float* to = s.turns + int64_t{i + j} * 2 * kPageTokens + first;
        store(to, cosines[j]);
        store(to + kPageTokens, sines[j]);
      }
    }
    for (; i < half; ++i) {
      float* to = s.turns + int64_t{i} * 2 * kPageTokens + first;
      for (int t = 0; t < kVecLanes; ++t) {
        const float a = base[t][i], b = base[t][half + i], c = offset[t][i],
                    d = offset[t][half + i];
        to[t] = a * c - b * d;
        to[kPageTokens + t] = b * c + a * d;
      }
    }
  }
}

// Turns the queries back by the first position of the page, or not where keys are turned all the way.
inline void turn_queries(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                         int64_t page) {
  const int dim = plan.p.keys.layout.head_dim, half = plan.p.keys.codec.rope.rotary_pairs;
  const float* query = plan.query + (task.sequence_head * plan.rows + task.row) * dim;
  std::memcpy(s.page_query, query, sizeof(float) * task.rows * dim);
  if (plan.gathered()) return;
  const float* turn = plan.page_start(task.b, page);
  for (int64_t r = 0; r < task.rows; ++r)
    rotate_back(s.page_query + r * dim, turn, turn + half, half);
}

// Reconstructs a page's columns, rotated relative to the first position of their page; gathered ones to
// their positions.
inline void reconstruct_page(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                             const PageVisit& visit) {
  const HeadPlan& head = plan.head(task.h);
  if (plan.gathered()) turn_gathered(plan, task, s, visit.page);
  unpack_codes(visit.bytes.keys, head.pre, s.codes);
  if (!visit.fused) {
    reconstruct_keys(s.codes, head.pre, pre_codes(plan, task.sequence_head, head), visit.columns,
                     column_turns(plan, s), s.keys);
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
