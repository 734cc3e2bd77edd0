// The attend stage: flash-decoding over packed pages and the window.
//
// A task is a sequence, a split of its blocks, up to kTaskRows query rows and a group of KV heads. A block is a
// packed page or 64 tokens of the window. A task goes through its blocks in chunks of pages, and through each chunk
// head by head: a page is visited once a head, while it lies in the nearest cache. Queries are absorbed into codes
// where that is less work (absorb-inl.h), else keys are reconstructed, once for all rows; then each tile of
// kTileRows query rows scores the page, updates its softmax and adds its values. The query heads of a KV head are
// rows, and so are the queries of a speculation. Partial results are merged in a fixed order and the tiling depends
// on shapes alone, so results do not depend on the number of threads.
//
// Per token, D = 128, 1.25-bit keys after RoPE, 4-bit values, 4 query heads: 92 bytes read; about 4 vector
// operations unpack and score, 3 exponentiate, 4 quantize probabilities, 11 multiply values.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/absorb.h"
#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/attend/absorb-inl.h"
#include "csrc/cpu/attend/absorb_query-inl.h"
#include "csrc/cpu/attend/merge-inl.h"
#include "csrc/cpu/attend/page-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/prepare-inl.h"
#include "csrc/cpu/attend/softmax-inl.h"
#include "csrc/cpu/attend/task-inl.h"
#include "csrc/cpu/attend/window-inl.h"
#include "csrc/cpu/pages/prefetch-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Order in which a task visits its blocks: chunks of `chunk_blocks` blocks, head by head in each chunk.
struct Walk {
  int64_t heads, chunk_blocks, last;
  int64_t chunk, head = 0, block = chunk;

  bool done() const { return block >= last; }
  bool at_chunk() const { return block == chunk; }
  int64_t chunk_end() const { return std::min(chunk + chunk_blocks, last); }
  Walk next() const {
    if (block + 1 < chunk_end()) return {heads, chunk_blocks, last, chunk, head, block + 1};
    if (head + 1 < heads) return {heads, chunk_blocks, last, chunk, head + 1};
    return {heads, chunk_blocks, last, chunk + chunk_blocks};
  }
};

// Sums of smooth pairs at the nodes of one head's chunk of pages from block `first` on.
inline void absorb_chunk(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                         int64_t first) {
  for (int64_t row = 0; row < task.rows; row += kTileRows) {
    const int64_t tile = (task.row + row) / kTileRows;
    absorb_nodes(plan.absorbed(task.sequence_head, tile), plan.slow,
                 plan.page_middle(task.b, first), s.nodes + tile * kNodes * 2 * plan.lanes);
  }
}

// Writes the partial results of one head's rows.
inline void store_partial(const AttendPlan& plan, const AttendTask& task, const RowBlock& rows,
                          int64_t split) {
  const int dim = plan.p.keys.layout.head_dim;
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t at = (task.sequence_head * plan.rows + task.row + r) * plan.splits + split;
    float* out = plan.partial_out + at * dim;
    for (int d = 0; d < dim; d += kVecLanes) {
      store(out + d, load<F32>(rows.out + r * dim + d));
    }
    // Every token of the pages that a row visited may be masked.
    plan.partial_max[at] = rows.max[r] == kMaskedScore ? kNoScore : rows.max[r];
    plan.partial_sum[at] = reduce_add(load<F32>(rows.sum + r * kVecLanes));
  }
}

// Attends one task's rows over its blocks and stores their partial results.
inline void attend_task(const AttendPlan& plan, int64_t index, const AttendScratch& s) {
  const AttendParams& p = plan.p;
  const int dim = p.keys.layout.head_dim;
  // Find the task's heads, rows, split and sequence.
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
  reset_rows(s.rows, static_cast<int>(heads * count), dim);

  // Visit its blocks.
  const int64_t first = plan.first_block(b) + split * plan.split_blocks;
  const int64_t last = std::min(first + plan.split_blocks, plan.blocks(b));
  const int64_t pages = plan.pages(b);
  const auto is_page = [&](const Walk& at) { return !at.done() && at.block < pages; };
  const auto pointers = [&](const Walk& at) {
    return page_pointers(plan, head_task(at.head), at.block);
  };
  // Prefetch nothing on the last page; on the one before it, the last page into both caches.
  const auto prefetcher = [&](const Walk& next) {
    if (!is_page(next)) return Prefetcher({}, {}, 0, 0);
    const Walk after = next.next();
    const HeadPlan& head = plan.head(head_task(next.head).h);
    return Prefetcher(pointers(next), pointers(is_page(after) ? after : next), head.page_bytes(),
                      head.value.page_bytes());
  };
  // Once after a head's pages, before its window.
  const auto finish = [&](const RowBlock& rows) {
    if (p.keys.layout.packs_values()) finish_packed(rows, count, dim);
  };
  // Visit all heads of one page where nothing is prepared per chunk: they lie next to each other.
  Walk walk{heads, plan.has_pre() ? kChunkPages : 1, last, first};
  for (Walk next = walk.next(); !walk.done(); walk = next, next = next.next()) {
    const AttendTask task = head_task(walk.head);
    const RowBlock rows = sub_block(s.rows, walk.head * count, dim);
    if (walk.block >= pages) {
      if (walk.block == pages && first < pages) finish(rows);
      attend_window(plan, task, s, rows, walk.block - pages);
      continue;
    }
    // Interpolate between nodes if the chunk has more pages than nodes.
    const bool smooth = plan.absorbs && std::min(walk.chunk_end(), pages) - walk.chunk > kNodes;
    if (smooth && walk.at_chunk()) absorb_chunk(plan, task, s, walk.chunk);
    Prefetcher lines = prefetcher(next);
    attend_page(plan, task, s, rows, walk.block, static_cast<int>(walk.block - walk.chunk), smooth,
                lines);
  }
  // Store the partial results.
  for (int64_t i = 0; i < heads; ++i) {
    const RowBlock rows = sub_block(s.rows, i * count, dim);
    if (first < last && last <= pages) finish(rows);
    store_partial(plan, head_task(i), rows, split);
  }
}

// Tiles the call, prepares its operands, attends every task and merges the splits.
inline void attend(const AttendParams& p, const Executor& executor) {
  const PageAngles angles(p.keys.codec.rope);
  AttendPlan plan = make_plan(p, angles);
  AttendScratch scratch{};
  const int64_t plan_bytes = carve_plan(plan, nullptr);
  const int64_t worker_bytes = carve_scratch(plan, nullptr, scratch);
  const AlignedBuffer memory(plan_bytes + worker_bytes * executor.workers());
  carve_plan(plan, memory.as());
  if (plan.absorbs) prepare_mids(plan);

  // Prepare and merge a small call on this thread: waking others costs more.
  const SerialExecutor this_thread;
  const auto executor_for = [&](int64_t products) -> const Executor& {
    return products < kSerialProducts ? this_thread : executor;
  };
  const int64_t heads = plan.sequence_heads(), dim = p.keys.layout.head_dim;
  const int64_t fold_products =
      plan.folded_rows + (plan.absorbs ? 4 * plan.slow.count * plan.rows : 0);
  const int64_t chunks = ceil_div(plan.angle_pages(), kAngleTaskPages);
  const int64_t angles_work =
      p.keys.batch * plan.angle_pages() * p.keys.codec.rope.rotary_pairs * 8;
  for_each_task(executor_for(plan.batch_rank() * fold_products * dim + angles_work),
                heads + p.keys.batch * chunks, [&](int64_t task, int) {
                  if (task < heads) {
                    prepare_head(plan, task);
                  } else {
                    prepare_page_angles(plan, (task - heads) / chunks, (task - heads) % chunks);
                  }
                });
  // Attend every task.
  for_each_task(executor, plan.tasks(), [&](int64_t index, int worker) {
    AttendScratch own{};
    carve_scratch(plan, memory.as(plan_bytes + worker_bytes * worker), own);
    // Begin with the last split: it has the window, and the longest task should not end alone.
    attend_task(plan, plan.tasks() - 1 - index, own);
  });
  // Merge the splits.
  constexpr int64_t kRowsPerTask = 16;
  const int64_t rows = heads * plan.rows;
  for_each_task(executor_for(rows * plan.splits * dim), ceil_div(rows, kRowsPerTask),
                [&](int64_t task, int) {
                  const int64_t last = std::min((task + 1) * kRowsPerTask, rows);
                  for (int64_t row = task * kRowsPerTask; row < last; ++row) finish_row(plan, row);
                });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
