// The attend stage: flash-decoding over packed pages and exact rows.
//
// Work is cut into tasks of (sequence, split of blocks, up to kTaskRows query rows, group of KV heads).
// A block is a packed page or 64 exact rows. A task goes through its blocks in runs, and a head at a
// time through each run: every page is visited once a head, while it lies in the nearest cache. Queries
// are absorbed into codes where that is less work (absorb-inl.h), else keys are reconstructed, once for
// all rows; then each kMaxRows query rows score the page, update their softmax and add its values. The
// query heads of a KV head are rows like the queries of a speculation. Partial results are merged in a
// fixed order, and how work is cut depends on shapes alone, so results do not depend on the number of
// threads.
//
// Per token, D = 128, 1.25-bit keys after RoPE, 4-bit values, 4 query heads: 92 bytes read; about 4
// vector operations unpack and score, 3 exponentiate, 4 quantize probabilities, 11 multiply values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/core/absorb.h"
#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/attend/absorb-inl.h"
#include "csrc/cpu/attend/accumulate-inl.h"
#include "csrc/cpu/attend/merge-inl.h"
#include "csrc/cpu/attend/page-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/prepare-inl.h"
#include "csrc/cpu/attend/scores-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Softmax of kRows rows of scores. Rows that see nothing get zero probabilities. Returns false if
// no row sees anything.
template <int kRows>
inline bool softmax_rows(const AttendScratch& s, const RowBlock& rows,
                         const uint64_t (&masks)[kRows], int dim, int groups) {
  bool any = false;
  for (int r = 0; r < kRows; ++r) {
    if (softmax_row(rows, r, s.scores + r * kPageTokens, masks[r], dim, groups,
                    s.probabilities[r])) {
      any = true;
    } else {
      std::memset(s.probabilities + r, 0, sizeof(s.probabilities[r]));
    }
  }
  return any;
}

// One part in so many of what is left to fetch goes out before each of three steps: visiting a page,
// scoring it and weighing it.
inline constexpr int kScoresShare = 9;

template <int kRows>
inline void attend_page_rows(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                             const RowBlock& head_rows, int64_t first, const PageVisit& visit,
                             Prefetcher& next) {
  const AttendParams& p = plan.p;
  const int dim = p.keys.layout.head_dim, groups = plan.v_groups;
  const RowBlock rows = sub_block(head_rows, first, dim, groups);
  const uint64_t mask = visit.mask;
  next.fetch(next.share(kScoresShare));
  page_scores<kRows>(plan, task, s, first, visit);
  if (!p.keys.layout.value.packed()) {
    uint64_t masks[kRows];
    for (int r = 0; r < kRows; ++r) masks[r] = mask;
    if (softmax_rows<kRows>(s, rows, masks, dim, groups))
      accumulate_window<kRows>(s.probabilities, visit.bytes.values, p.v_dtype, 0, mask, dim,
                               rows.out);
    return;
  }
  next.fetch(next.share(kScoresShare));
  if (mask != ~uint64_t{0}) mask_scores<kRows>(mask, s.scores);
  weigh_rows<kRows>(rows, s.scores, p.keys.layout.value, groups, s.value_scales, next, s.weights);
  const uint8_t* codes = visit.bytes.values + plan.v_code_offset;
  if (p.keys.layout.value.bits == 4)
    accumulate_packed<4, kRows>(p.keys.layout.value, groups, codes, s.weights, next, rows.out);
  if (p.keys.layout.value.bits == 2)
    accumulate_packed<2, kRows>(p.keys.layout.value, groups, codes, s.weights, next, rows.out);
}

inline void attend_page(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                        const RowBlock& rows, int64_t page, int in_run, bool smooth,
                        Prefetcher& next) {
  const AttendParams& p = plan.p;
  PageVisit visit{page_bytes(plan, task, page),
                  page_mask(plan, task, page),
                  page,
                  in_run,
                  fuses_columns(plan, task),
                  smooth,
                  plan.has_pre() ? plan.columns[task.sequence_head] : Columns{},
                  {}};
  if (visit.mask == 0) return;
  if (p.keys.num_outliers) visit.outliers = page_outliers(plan, task, page);
  next.fetch(next.share(kScoresShare));
  if (visit.columns.used()) reconstruct_page(plan, task, s, visit);
  if (visit.columns.used() || visit.columns.num_means) turn_queries(plan, task, s, visit.page);
  if (p.keys.layout.value.packed())
    load_value_scales(p.keys.layout.value, plan.v_groups, visit.bytes.values, visit.mask,
                      s.value_scales);
  for (int64_t first = 0; first < task.rows; first += kMaxRows) {
    with_count<kMaxRows>(static_cast<int>(task.rows - first), [&]<int kRows>() {
      attend_page_rows<kRows>(plan, task, s, rows, first, visit, next);
    });
  }
}

// Exact rows block * 64 and on.
inline void attend_window(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                          const RowBlock& head_rows, int64_t block) {
  const AttendParams& p = plan.p;
  const int dim = p.keys.layout.head_dim, groups = plan.v_groups;
  const int64_t begin = block * kPageTokens;
  const int count =
      static_cast<int>(std::min<int64_t>(kPageTokens, plan.window_len(task.b) - begin));
  const int64_t at = task.b * p.window.batch_stride + task.h * p.window.head_stride + begin * dim;
  for (int64_t first = 0; first < task.rows; first += kMaxRows) {
    with_count<kMaxRows>(static_cast<int>(task.rows - first), [&]<int kRows>() {
      uint64_t masks[kRows], any = 0;
      for (int r = 0; r < kRows; ++r) {
        int64_t visible = count;
        if (p.causal) {
          const int64_t i = (task.row + first + r) % p.queries.length;
          visible = std::clamp<int64_t>(
              plan.window_len(task.b) - (p.queries.length - 1 - i) - begin, 0, count);
        }
        masks[r] = visible == kPageTokens ? ~uint64_t{0} : (uint64_t{1} << visible) - 1;
        any |= masks[r];
      }
      if (any == 0) return;
      const RowBlock rows = sub_block(head_rows, first, dim, groups);
      const float* query = plan.query + (task.sequence_head * plan.rows + task.row + first) * dim;
      exact_scores<kRows>(query, dim, p.window.keys, p.window.dtype, at, count, s.scores);
      if (!softmax_rows<kRows>(s, rows, masks, dim, groups)) return;
      accumulate_window<kRows>(s.probabilities, p.window.values, p.window.dtype, at, any, dim,
                               rows.out);
    });
  }
}

// A task's way through its blocks: runs of `step`, each head's in turn.
struct Walk {
  int64_t heads, step, last;
  int64_t run, head = 0, block = run;

  bool done() const { return block >= last; }
  bool at_run() const { return block == run; }
  int64_t run_end() const { return std::min(run + step, last); }
  Walk next() const {
    if (block + 1 < run_end()) return {heads, step, last, run, head, block + 1};
    if (head + 1 < heads) return {heads, step, last, run, head + 1};
    return {heads, step, last, run + step};
  }
};

// What smooth pairs add at the nodes of one head's run from block `first` on.
inline void absorb_run(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                       int64_t first) {
  for (int64_t row = 0; row < task.rows; row += kMaxRows) {
    const int64_t tile = (task.row + row) / kMaxRows;
    absorb_nodes(plan.absorbed(task.sequence_head, tile), plan.slow,
                 plan.page_middle(task.b, first), s.nodes + tile * kNodes * 2 * plan.lanes);
  }
}

// Writes the partial results of one head's rows.
inline void store_partial(const AttendPlan& plan, const AttendTask& task, const RowBlock& rows,
                          int64_t split) {
  const int dim = plan.p.keys.layout.head_dim, groups = plan.v_groups;
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t at = (task.sequence_head * plan.rows + task.row + r) * plan.splits + split;
    float* out = plan.partial_out + at * dim;
    for (int d = 0; d < dim; d += kVecLanes) {
      F32 value = load<F32>(rows.out + r * dim + d);
      if (groups) {
        const int64_t group = r * groups + d / plan.p.keys.layout.value.group_size;
        value += reduce_add(load<F32>(rows.middle_sum + group * kVecLanes));
      }
      store(out + d, value);
    }
    plan.partial_max[at] = rows.max[r];
    plan.partial_sum[at] = reduce_add(load<F32>(rows.sum + r * kVecLanes));
  }
}

inline void attend_task(const AttendPlan& plan, int64_t index, const AttendScratch& s) {
  const AttendParams& p = plan.p;
  const int dim = p.keys.layout.head_dim, groups = plan.v_groups;
  const auto take = [&](int64_t count) {
    const int64_t rest = index % count;
    index /= count;
    return rest;
  };
  const int64_t first_head = take(plan.head_groups()) * plan.task_heads;
  const int64_t row = take(plan.row_chunks) * kTaskRows, split = take(plan.splits), b = index;
  const int64_t heads = std::min(plan.task_heads, p.keys.layout.num_heads - first_head);
  const int64_t count = std::min(kTaskRows, plan.rows - row);
  const auto head_task = [&](int64_t i) {
    const int64_t h = first_head + i;
    return AttendTask{b, h, b * p.keys.layout.num_heads + h, row, count};
  };
  reset_rows(s.rows, static_cast<int>(heads * count), dim, groups);
  const int64_t first = split * plan.split_blocks;
  const int64_t last = std::min(first + plan.split_blocks, plan.blocks(b));
  const int64_t pages = plan.pages(b);
  const auto is_page = [&](const Walk& at) { return !at.done() && at.block < pages; };
  const auto bytes = [&](const Walk& at) { return page_bytes(plan, head_task(at.head), at.block); };
  // Nothing to fetch behind the last page; what there is twice behind the last but one.
  const auto prefetcher = [&](const Walk& next) {
    if (!is_page(next)) return Prefetcher({}, {}, 0, 0);
    const Walk after = next.next();
    return Prefetcher(bytes(next), bytes(is_page(after) ? after : next),
                      plan.head(head_task(next.head).h).page_bytes(), plan.v_head_bytes);
  };
  // A page at a time where nothing is prepared for a run: its heads lie side by side.
  Walk walk{heads, plan.has_pre() ? kRunPages : 1, last, first};
  for (Walk next = walk.next(); !walk.done(); walk = next, next = next.next()) {
    const AttendTask task = head_task(walk.head);
    const RowBlock rows = sub_block(s.rows, walk.head * count, dim, groups);
    if (walk.block >= pages) {
      attend_window(plan, task, s, rows, walk.block - pages);
      continue;
    }
    // Few pages are not worth the nodes.
    const bool smooth = plan.absorbs && std::min(walk.run_end(), pages) - walk.run > kNodes;
    if (smooth && walk.at_run()) absorb_run(plan, task, s, walk.run);
    Prefetcher lines = prefetcher(next);
    attend_page(plan, task, s, rows, walk.block, static_cast<int>(walk.block - walk.run), smooth,
                lines);
  }
  for (int64_t i = 0; i < heads; ++i)
    store_partial(plan, head_task(i), sub_block(s.rows, i * count, dim, groups), split);
}

inline void attend(const AttendParams& p, const Executor& executor) {
  const PageAngles angles(p.keys.codec.rope);
  AttendPlan plan = make_plan(p, angles);
  AttendScratch scratch{};
  const int64_t plan_bytes = carve_plan(plan, nullptr);
  const int64_t worker_bytes = carve_scratch(plan, nullptr, scratch);
  const AlignedBuffer memory(plan_bytes + worker_bytes * executor.workers());
  carve_plan(plan, memory.as());
  if (plan.absorbs) prepare_mids(plan);

  // Waking threads costs more than preparing or merging one decode step: that is left to this one.
  const SerialExecutor this_thread;
  const auto executor_for = [&](int64_t products) -> const Executor& {
    return products < kSerialProducts ? this_thread : executor;
  };
  const int64_t heads = plan.sequence_heads(), dim = p.keys.layout.head_dim;
  const int64_t weights = plan.weight_rows + (plan.absorbs ? 4 * plan.slow.count * plan.rows : 0);
  const int64_t chunks = (plan.angle_pages() + kAngleChunk - 1) / kAngleChunk;
  const int64_t angles_work =
      p.keys.batch * plan.angle_pages() * p.keys.codec.rope.rotary_pairs * 8;
  for_each_task(executor_for(plan.batch_rank() * weights * dim + angles_work),
                heads + p.keys.batch * chunks, [&](int64_t task, int) {
                  if (task < heads) {
                    prepare_head(plan, task);
                  } else {
                    prepare_angles(plan, (task - heads) / chunks, (task - heads) % chunks);
                  }
                });
  for_each_task(executor, plan.tasks(), [&](int64_t index, int worker) {
    AttendScratch own{};
    carve_scratch(plan, memory.as(plan_bytes + worker_bytes * worker), own);
    // The last split first: it has the exact rows, and the longest task should not end alone.
    attend_task(plan, plan.tasks() - 1 - index, own);
  });
  constexpr int64_t kRowsPerTask = 16;
  const int64_t rows = heads * plan.rows;
  for_each_task(executor_for(rows * plan.splits * dim), (rows + kRowsPerTask - 1) / kRowsPerTask,
                [&](int64_t task, int) {
                  const int64_t last = std::min((task + 1) * kRowsPerTask, rows);
                  for (int64_t row = task * kRowsPerTask; row < last; ++row) finish_row(plan, row);
                });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
