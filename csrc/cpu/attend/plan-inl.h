// The tiling of a call to attend into tasks, and the memory that all tasks share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/absorb.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/attend/absorbed-inl.h"
#include "csrc/cpu/attend/folded_rows-inl.h"
#include "csrc/cpu/attend/interleaved-inl.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Query rows of one task, a multiple of kTileRows. The outputs of more would not fit the nearest cache.
inline constexpr int64_t kTaskRows = 64;
// Blocks of a split are a multiple of this, small enough to keep all cores busy with one KV head.
inline constexpr int64_t kMinSplitBlocks = kChunkPages;
// Wanted number of tasks: as few as keep the cores of a large machine busy. A task takes all heads of its pages if
// there are enough tasks then, as heads lie next to each other in the pools.
inline constexpr int64_t kTargetTasks = 32;

// Multiply-adds below which other threads do not pay: some 50 microseconds.
inline constexpr int64_t kSerialProducts = 1 << 19;

// Sizes that all tasks share, and the memory they use.
struct AttendPlan {
  const AttendParams& p;
  const PageAngles& angles;
  SlowPairs slow;        // pairs that are absorbed if `absorbs`
  int64_t rows;          // query rows of a KV head: its query heads times q_len
  int64_t pre_rows = 0;  // folded rows over pre-RoPE channels: interleaved channels, at most
  // Folded rows over pre-RoPE channels, then those over post-RoPE channels: `rows`, or none for "pre".
  int64_t folded_rows = 0;
  int64_t row_chunks = 1;                      // tasks over rows
  int64_t splits = 1;                          // tasks over blocks
  int64_t split_blocks = 1;                    // blocks of one split
  int64_t task_heads = 1;                      // KV heads of one task
  float* query = nullptr;                      // [B, H, rows, D], times sm_scale * log2(e)
  int8_t* folded = nullptr;                    // [B, H, folded_rows, 2, D]: high and low terms
  float* folded_scales = nullptr;              // [B, H, folded_rows]
  float* folded_offsets = nullptr;             // [B, H, folded_rows]
  InterleavedChannels* interleaved = nullptr;  // [B, H]
  int16_t* interleaved_pairs = nullptr;        // [B, H, rotary_pairs]
  int32_t* rotary = nullptr;   // [B, H, tiles, slow pairs, lanes]: see AbsorbedQuery
  float* fixed = nullptr;      // [B, H, tiles, lanes]
  float* scale = nullptr;      // [B, H, tiles, kTileRows]
  float* constant = nullptr;   // [B, H, tiles, 1 + 2 * slow pairs, kConstantLanes]
  uint8_t* mids = nullptr;     // [H, lanes]
  float* starts = nullptr;     // [B, pages, 2 * rotary_pairs]: rotations to pages' first positions
  MiddleAngles middles{};      // [B, pages, ...]: slow pairs' rotations to pages' middles
  int64_t source_pages = 0;    // largest number of pages that gathered tokens come from
  int64_t skipped_blocks = 0;  // most blocks of a sequence before its sliding windows
  float* partial_out = nullptr;  // [B, H, rows, splits, D]
  float* partial_max = nullptr;  // [B, H, rows, splits], log2 units
  float* partial_sum = nullptr;  // [B, H, rows, splits]
  int lanes = 0;                 // lanes of the head with the largest pre-RoPE rank
  bool absorbs = false;          // slow pairs of pre-RoPE channels into the queries

  bool gathered() const { return p.token_slots != nullptr; }
  bool has_pre() const { return p.keys.layout.rope != RopeMode::kPost; }
  bool has_post() const { return p.keys.layout.rope != RopeMode::kPre; }
  const HeadPlan& head(int64_t h) const { return p.keys.layout.heads[h]; }
  int64_t batch_rank() const { return int64_t{p.keys.batch} * p.keys.layout.rank; }
  int64_t sequence_heads() const { return int64_t{p.keys.batch} * p.keys.layout.num_heads; }
  int64_t window_len(int64_t b) const { return p.window.lens[b]; }
  int64_t pages(int64_t b) const { return ceil_div(p.keys.cache_seqlens[b], kPageTokens); }
  bool slides() const { return p.rules.window_size > 0; }
  // First slot in the sliding window of query i of sequence b.
  int64_t first_slot(int64_t b, int64_t i) const {
    if (!slides()) return 0;
    const int64_t query = int64_t{p.rules.query_position[b]} + i;
    const int64_t start = p.keys.first_position ? p.keys.first_position[b] : 0;
    return std::max<int64_t>(query - p.rules.window_size + 1 - start, 0);
  }
  // First block that a query of sequence b can see, in whole chunks.
  int64_t first_block(int64_t b) const {
    if (!slides() || gathered()) return 0;
    return std::min(first_slot(b, 0) / kPageTokens, pages(b)) / kChunkPages * kChunkPages;
  }
  int64_t tiles() const { return ceil_div(rows, kTileRows); }
  AbsorbedQuery absorbed(int64_t sequence_head, int64_t tile) const {
    const int64_t h = sequence_head % p.keys.layout.num_heads, at = sequence_head * tiles() + tile;
    return {rotary + at * slow.count * lanes,
            fixed + at * lanes,
            scale + at * kTileRows,
            constant + at * (1 + 2 * slow.count) * kConstantLanes,
            mids + h * lanes,
            absorbed_lanes(head(h).pre.rank()),
            slow.count};
  }
  // Pages whose angles are stored: those of the longest sequence in whole chunks, or those that gathered tokens come
  // from.
  int64_t angle_pages() const {
    if (!has_pre()) return 0;
    return gathered() ? source_pages : skipped_blocks + splits * split_blocks;
  }
  const float* page_start(int64_t b, int64_t page) const {
    return starts + (b * angle_pages() + page) * 2 * p.keys.codec.rope.rotary_pairs;
  }
  MiddleAngles page_middle(int64_t b, int64_t page) const {
    return middles.at(b * angle_pages() + page);
  }
  int64_t head_groups() const { return ceil_div(p.keys.layout.num_heads, task_heads); }
  int64_t tasks() const { return p.keys.batch * splits * row_chunks * head_groups(); }
  int64_t blocks(int64_t b) const { return pages(b) + ceil_div(window_len(b), kPageTokens); }
};

// Lays the plan's memory out from `base` (null: only to measure); returns its bytes.
inline int64_t carve_plan(AttendPlan& plan, uint8_t* base) {
  const int64_t dim = plan.p.keys.layout.head_dim,
                rotary_pairs = plan.p.keys.codec.rope.rotary_pairs;
  const int64_t heads = plan.sequence_heads(), rows = heads * plan.rows;
  const int64_t folded_rows = heads * plan.folded_rows;
  const int64_t tiles = plan.absorbs ? heads * plan.tiles() : 0;
  int64_t bytes = 0;
  carve(plan.query, base, bytes, rows * dim);
  carve(plan.folded, base, bytes, folded_rows * 2 * dim);
  carve(plan.folded_scales, base, bytes, folded_rows);
  carve(plan.folded_offsets, base, bytes, folded_rows);
  carve(plan.interleaved, base, bytes, heads);
  carve(plan.interleaved_pairs, base, bytes, heads * rotary_pairs);
  carve(plan.rotary, base, bytes, tiles * plan.slow.count * plan.lanes);
  carve(plan.fixed, base, bytes, tiles * plan.lanes);
  carve(plan.scale, base, bytes, tiles * kTileRows);
  carve(plan.constant, base, bytes, tiles * (1 + 2 * plan.slow.count) * kConstantLanes);
  carve(plan.mids, base, bytes, tiles ? plan.p.keys.layout.num_heads * plan.lanes : 0);
  const int64_t angle_pages = plan.p.keys.batch * plan.angle_pages();
  const int64_t pairs = plan.absorbs ? round_up(plan.slow.count, kVecLanes) : 0;
  plan.middles.pairs = static_cast<int>(pairs);
  carve(plan.starts, base, bytes, angle_pages * 2 * rotary_pairs);
  carve(plan.middles.cos_sin, base, bytes, angle_pages * 2 * pairs);
  carve(plan.middles.packed_cos_sin, base, bytes, angle_pages * kDegrees * pairs);
  carve(plan.partial_out, base, bytes, rows * plan.splits * dim);
  carve(plan.partial_max, base, bytes, rows * plan.splits);
  carve(plan.partial_sum, base, bytes, rows * plan.splits);
  return bytes;
}

// Tiles the call into tasks: splits of whole chunks of blocks, then groups of heads.
inline void tile_tasks(AttendPlan& plan) {
  int64_t max_blocks = 1;
  for (int b = 0; b < plan.p.keys.batch; ++b) {
    max_blocks = std::max(max_blocks, plan.blocks(b) - plan.first_block(b));
    plan.skipped_blocks = std::max(plan.skipped_blocks, plan.first_block(b));
  }
  const int64_t heads = plan.p.keys.layout.num_heads, others = plan.p.keys.batch * plan.row_chunks;
  const int64_t wanted = ceil_div(kTargetTasks, others);
  plan.split_blocks = round_up(ceil_div(max_blocks, wanted), kMinSplitBlocks);
  plan.splits = ceil_div(max_blocks, plan.split_blocks);
  plan.task_heads = std::max<int64_t>(1, heads * plan.splits / wanted);
  plan.task_heads = std::min(plan.task_heads, heads);
}

inline AttendPlan make_plan(const AttendParams& p, const PageAngles& angles) {
  AttendPlan plan{.p = p,
                  .angles = angles,
                  .slow = slow_pairs(p.keys.codec.rope),
                  .rows = p.queries.num_heads / p.keys.layout.num_heads * p.queries.length};
  plan.row_chunks = ceil_div(plan.rows, kTaskRows);
  if (plan.has_pre()) {
    plan.absorbs = plan.rows <= kAbsorbRows && !plan.gathered();
    const int64_t interleaved = plan.absorbs
                                    ? 2 * (p.keys.codec.rope.rotary_pairs - plan.slow.count)
                                    : p.keys.layout.head_dim;
    plan.pre_rows = round_up(interleaved, kTileRows);
    for (int h = 0; h < p.keys.layout.num_heads; ++h)
      plan.lanes = std::max(plan.lanes, absorbed_lanes(plan.head(h).pre.rank()));
  }
  plan.folded_rows = plan.pre_rows + (plan.has_post() ? plan.rows : 0);
  if (plan.gathered() && plan.has_pre()) {
    const int64_t all = plan.sequence_heads() * p.keys.table_stride * kPageTokens;
    for (int64_t i = 0; i < all; ++i) {
      const int64_t slot = p.token_slots[i];
      if (slot != kNoSlot) plan.source_pages = std::max(plan.source_pages, slot / kPageTokens + 1);
    }
  }
  tile_tasks(plan);
  return plan;
}

// Folded rows from `row` on, over `rank` channels.
inline FoldedRows folded_rows_from(const AttendPlan& plan, int64_t sequence_head, int64_t row,
                                   int rank) {
  const int64_t first = sequence_head * plan.folded_rows + row;
  const int8_t* high = plan.folded + first * 2 * plan.p.keys.layout.head_dim;
  return {high,
          high + rank,
          plan.folded_scales + first,
          plan.folded_offsets + first,
          2 * int64_t{plan.p.keys.layout.head_dim},
          kQuad};
}

// Folded rows over a head's pre-RoPE channels: one per interleaved channel of its keys.
inline FoldedRows folded_channels(const AttendPlan& plan, int64_t sequence_head,
                                  const HeadPlan& head) {
  return folded_rows_from(plan, sequence_head, 0, head.pre.rank());
}

// Folded rows over a head's post-RoPE channels: one per query row.
inline FoldedRows folded_queries(const AttendPlan& plan, int64_t sequence_head,
                                 const HeadPlan& head) {
  return folded_rows_from(plan, sequence_head, plan.pre_rows, head.post.rank());
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
