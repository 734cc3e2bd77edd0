// A task of attend: its rows, its memory and the page that it visits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/absorb.h"
#include "csrc/cpu/attend/absorbed-inl.h"
#include "csrc/cpu/attend/interleaved-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/attend/softmax-inl.h"
#include "csrc/cpu/attend/values-inl.h"
#include "csrc/cpu/pages/page_span-inl.h"
#include "csrc/cpu/pages/prefetch-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Query rows of one head in a task.
struct AttendTask {
  int64_t b, h, sequence_head;
  int64_t row;   // first query row
  int64_t rows;  // count
};

// Memory of one worker; see carve_scratch.
struct AttendScratch {
  uint8_t* codes;     // [D, 64] unpacked codes of a page
  float* keys;        // [interleaved channels, 64], reconstructed from pre-RoPE channels
  float* page_query;  // [rows, D], unrotated by the page's first position
  float* scores;      // [kTileRows, 64]
  float (*probabilities)[kPageTokens];  // [kTileRows], for uncompressed values
  ScaledProbs* scaled_probs;            // [kTileRows]
  ValueScales* value_scales;            // of the page
  float* nodes;                         // [tiles, kNodes, 2, lanes]
  AbsorbedPage absorbed;                // of a tile
  float* token_cos_sin;                 // [rotary_pairs, 2, 64], of gathered tokens
  RowBlock rows;                        // [task heads, rows]
};

// Lays the scratch of one worker out from `base` (null: only to measure); returns its bytes.
inline int64_t carve_scratch(const AttendPlan& plan, uint8_t* base, AttendScratch& s) {
  const int64_t dim = plan.p.keys.layout.head_dim;
  const int64_t rows = std::min(plan.rows, kTaskRows), all_rows = plan.task_heads * rows;
  int64_t bytes = 0;
  carve(s.codes, base, bytes, dim * kPageTokens);
  carve(s.keys, base, bytes, round_up(dim, kTileRows) * kPageTokens);
  carve(s.page_query, base, bytes, round_up(rows, kTileRows) * dim);
  carve(s.scores, base, bytes, kTileRows * kPageTokens);
  carve(s.probabilities, base, bytes, kTileRows);
  carve(s.scaled_probs, base, bytes, kTileRows);
  carve(s.value_scales, base, bytes, 1);
  if (plan.absorbs) {
    carve(s.nodes, base, bytes, plan.tiles() * kNodes * 2 * plan.lanes);
    carve(s.absorbed.high, base, bytes, kDegrees * plan.lanes);
    carve(s.absorbed.low, base, bytes, kDegrees * plan.lanes);
    carve(s.absorbed.sums, base, bytes, kDegrees * plan.lanes);
  }
  if (plan.gathered())
    carve(s.token_cos_sin, base, bytes, 2 * plan.p.keys.codec.rope.rotary_pairs * kPageTokens);
  carve(s.rows.max, base, bytes, all_rows);
  carve(s.rows.sum, base, bytes, all_rows * kVecLanes);
  carve(s.rows.middle_sum, base, bytes, all_rows * kVecLanes);
  carve(s.rows.out, base, bytes, all_rows * dim);
  return bytes;
}

// Slots of the 64 tokens of a gathered page.
inline const int32_t* gathered_slots(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  return plan.p.token_slots + (task.sequence_head * plan.p.keys.table_stride + page) * kPageTokens;
}

// Valid tokens of packed page `page`: of a gathered page, those with a slot.
inline uint64_t page_mask(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  const uint64_t mask = valid_slots(plan.p.keys, task.b, page);
  if (!plan.gathered() || mask == 0) return mask;
  const int32_t* slots = gathered_slots(plan, task, page);
  uint64_t filled = 0;
  for (int t = 0; t < kPageTokens; ++t) filled |= uint64_t{slots[t] != kNoSlot} << t;
  return mask & filled;
}

// Tokens of packed page `page` whose slots are `first` or later.
inline uint64_t tokens_from(const AttendPlan& plan, const AttendTask& task, int64_t page,
                            int64_t first) {
  if (!plan.gathered())
    return slot_mask(std::clamp<int64_t>(first - page * kPageTokens, 0, kPageTokens), kPageTokens);
  const int32_t* slots = gathered_slots(plan, task, page);
  uint64_t mask = 0;
  for (int t = 0; t < kPageTokens; ++t) mask |= uint64_t{slots[t] >= first} << t;
  return mask;
}

// Tokens of packed page `page` in the sliding window of the task's row `row`.
inline uint64_t sliding_mask(const AttendPlan& plan, const AttendTask& task, int64_t page,
                             int64_t row) {
  const int64_t query = (task.row + row) % plan.p.queries.length;
  return tokens_from(plan, task, page, plan.first_slot(task.b, query));
}

// Tokens of packed page `page` in the sliding window of any of the task's rows.
inline uint64_t sliding_mask(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  const int64_t length = plan.p.queries.length, query = task.row % length;
  const int64_t earliest = query + task.rows > length ? 0 : query;
  return tokens_from(plan, task, page, plan.first_slot(task.b, earliest));
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

inline PagePointers page_pointers(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  const LayoutView& layout = plan.p.keys.layout;
  const int64_t id = plan.p.keys.page_table[task.b * plan.p.keys.table_stride + page];
  return {plan.p.keys.pages + id * layout.k_page_bytes + plan.head(task.h).k_offset,
          plan.p.v_pages + id * layout.v_page_bytes + plan.head(task.h).v_offset};
}

// A visit of a task to a page of one head.
struct PageVisit {
  PagePointers lines;
  uint64_t mask;
  int64_t page;                     // of the sequence
  int chunk_page;                   // index in its chunk of pages
  bool fused;                       // interleaved channels are scored as they are reconstructed
  bool smooth;                      // nodes hold the sums of smooth pairs
  InterleavedChannels interleaved;  // reconstructed keys
  OutlierRange outliers;
};

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
