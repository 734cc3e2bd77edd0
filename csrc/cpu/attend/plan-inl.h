// How a call to attend is cut into tasks, and what is prepared once for all of them: scaled
// queries, quantized weights of every head, rotations to where splits begin.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/absorb.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/attend/absorb-inl.h"
#include "csrc/cpu/attend/scores-inl.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Query rows of one task; a multiple of kMaxRows. More would push their outputs out of the nearest
// cache.
inline constexpr int64_t kTaskRows = 64;
// Blocks of a split are a multiple of these, few enough to fill all cores with one KV head.
inline constexpr int64_t kMinSplitBlocks = kRunPages;
// Tasks there should be: as few as keep the cores of a large machine busy. A task takes all heads of
// its pages if there are enough tasks then: heads lie side by side in the pools.
inline constexpr int64_t kTargetTasks = 32;

// Multiply-adds below which a step of the plan is not worth other threads: some 50 microseconds.
inline constexpr int64_t kSerialProducts = 1 << 19;

// Scores are kept in units of log2, so that the softmax needs 2^x alone.
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// Sizes that all tasks share, and the memory they use.
struct AttendPlan {
  const AttendParams& p;
  const PageAngles& angles;
  SlowPairs slow;             // pairs that are absorbed, if any are
  int64_t rows;               // query rows of a KV head: its query heads times q_len
  int64_t pre_rows = 0;       // rows of QueryCodes over pre-RoPE channels: columns, at most
  int64_t weight_rows = 0;    // those, then rows over post-RoPE channels: rows, or none before RoPE
  int64_t row_chunks = 1;     // tasks over rows
  int64_t splits = 1;         // tasks over blocks
  int64_t split_blocks = 1;   // blocks of one split
  int64_t task_heads = 1;     // KV heads of one task
  float* query = nullptr;     // [B, H, rows, D], times sm_scale * log2(e)
  int8_t* weights = nullptr;  // [B, H, weight_rows, 2, D]: high and low terms
  float* steps = nullptr;     // [B, H, weight_rows]
  float* offsets = nullptr;   // [B, H, weight_rows]
  Columns* columns = nullptr;       // [B, H]
  int16_t* column_pairs = nullptr;  // [B, H, half]
  int32_t* turn = nullptr;          // [B, H, tiles, slow pairs, lanes]: see AbsorbedQuery
  float* fixed = nullptr;           // [B, H, tiles, lanes]
  float* unit = nullptr;            // [B, H, tiles, kMaxRows]
  float* constant = nullptr;        // [B, H, tiles, 1 + 2 * slow pairs, kConstantLanes]
  uint8_t* mids = nullptr;          // [H, lanes]
  float* starts = nullptr;          // [B, pages, 2 * half]: rotations to pages' first positions
  MiddleAngles middles{};           // [B, pages, ...]: slow pairs' rotations to pages' middles
  int64_t source_pages = 0;         // pages that gathered tokens come from, at most
  float* partial_out = nullptr;     // [B, H, rows, splits, D]
  float* partial_max = nullptr;     // [B, H, rows, splits], log2 units
  float* partial_sum = nullptr;     // [B, H, rows, splits]
  int lanes = 0;                    // of the head with most pre-RoPE channels
  bool absorbs = false;             // slow pairs of pre-RoPE channels into the queries
  // Of the layout's values, one head's: they are computed there by division.
  int v_groups;
  int64_t v_code_offset, v_head_bytes;

  bool gathered() const { return p.token_slots != nullptr; }
  bool has_pre() const { return p.keys.layout.rope != RopeMode::kPost; }
  bool has_post() const { return p.keys.layout.rope != RopeMode::kPre; }
  const HeadPlan& head(int64_t h) const { return p.keys.layout.heads[h]; }
  int64_t batch_rank() const { return int64_t{p.keys.batch} * p.keys.layout.rank; }
  int64_t sequence_heads() const { return int64_t{p.keys.batch} * p.keys.layout.num_heads; }
  int64_t window_len(int64_t b) const { return p.window.lens[b]; }
  int64_t pages(int64_t b) const {
    return (int64_t{p.keys.cache_seqlens[b]} + kPageTokens - 1) / kPageTokens;
  }
  int64_t tiles() const { return (rows + kMaxRows - 1) / kMaxRows; }
  AbsorbedQuery absorbed(int64_t sequence_head, int64_t tile) const {
    const int64_t h = sequence_head % p.keys.layout.num_heads, at = sequence_head * tiles() + tile;
    return {turn + at * slow.count * lanes,
            fixed + at * lanes,
            unit + at * kMaxRows,
            constant + at * (1 + 2 * slow.count) * kConstantLanes,
            mids + h * lanes,
            absorbed_lanes(head(h).pre.rank()),
            slow.count};
  }
  // Pages whose angles are kept: those of the longest sequence in whole runs, or those that gathered
  // tokens come from.
  int64_t angle_pages() const {
    if (!has_pre()) return 0;
    return gathered() ? source_pages : splits * split_blocks;
  }
  const float* page_start(int64_t b, int64_t page) const {
    return starts + (b * angle_pages() + page) * 2 * p.keys.codec.rope.rotary_pairs;
  }
  MiddleAngles page_middle(int64_t b, int64_t page) const {
    return middles.at(b * angle_pages() + page);
  }
  int64_t head_groups() const { return (p.keys.layout.num_heads + task_heads - 1) / task_heads; }
  int64_t tasks() const { return p.keys.batch * splits * row_chunks * head_groups(); }
  int64_t blocks(int64_t b) const {
    return pages(b) + (window_len(b) + kPageTokens - 1) / kPageTokens;
  }
};

// Takes `count` numbers from the memory at `base`, which starts `bytes` in; null stays null, to
// measure.
template <typename T>
inline void carve(T*& to, uint8_t* base, int64_t& bytes, int64_t count) {
  to = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
  bytes += round_up(count * static_cast<int64_t>(sizeof(T)), kLineBytes);
}

// Lays the plan's memory out from `base` (null: only to measure); returns its bytes.
inline int64_t carve_plan(AttendPlan& plan, uint8_t* base) {
  const int64_t dim = plan.p.keys.layout.head_dim, half = plan.p.keys.codec.rope.rotary_pairs;
  const int64_t heads = plan.sequence_heads(), rows = heads * plan.rows;
  const int64_t weight_rows = heads * plan.weight_rows;
  const int64_t tiles = plan.absorbs ? heads * plan.tiles() : 0;
  int64_t bytes = 0;
  carve(plan.query, base, bytes, rows * dim);
  carve(plan.weights, base, bytes, weight_rows * 2 * dim);
  carve(plan.steps, base, bytes, weight_rows);
  carve(plan.offsets, base, bytes, weight_rows);
  carve(plan.columns, base, bytes, heads);
  carve(plan.column_pairs, base, bytes, heads * half);
  carve(plan.turn, base, bytes, tiles * plan.slow.count * plan.lanes);
  carve(plan.fixed, base, bytes, tiles * plan.lanes);
  carve(plan.unit, base, bytes, tiles * kMaxRows);
  carve(plan.constant, base, bytes, tiles * (1 + 2 * plan.slow.count) * kConstantLanes);
  carve(plan.mids, base, bytes, tiles ? plan.p.keys.layout.num_heads * plan.lanes : 0);
  const int64_t angle_pages = plan.p.keys.batch * plan.angle_pages();
  const int64_t pairs = plan.absorbs ? round_up(plan.slow.count, kVecLanes) : 0;
  plan.middles.pairs = static_cast<int>(pairs);
  carve(plan.starts, base, bytes, angle_pages * 2 * half);
  carve(plan.middles.turns, base, bytes, angle_pages * 2 * pairs);
  carve(plan.middles.halves, base, bytes, angle_pages * kDegrees * pairs);
  carve(plan.partial_out, base, bytes, rows * plan.splits * dim);
  carve(plan.partial_max, base, bytes, rows * plan.splits);
  carve(plan.partial_sum, base, bytes, rows * plan.splits);
  return bytes;
}

// Cuts the call into tasks: splits of whole runs of blocks, then groups of heads.
inline void cut_tasks(AttendPlan& plan) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t most_blocks = 1;
  for (int b = 0; b < plan.p.keys.batch; ++b) most_blocks = std::max(most_blocks, plan.blocks(b));
  const int64_t heads = plan.p.keys.layout.num_heads, others = plan.p.keys.batch * plan.row_chunks;
  const int64_t wanted = ceil_div(kTargetTasks, others);
  plan.split_blocks = round_up(ceil_div(most_blocks, wanted), kMinSplitBlocks);
  plan.splits = ceil_div(most_blocks, plan.split_blocks);
  plan.task_heads = std::max<int64_t>(1, heads * plan.splits / wanted);
  plan.task_heads = std::min(plan.task_heads, heads);
}

inline AttendPlan make_plan(const AttendParams& p, const PageAngles& angles) {
  AttendPlan plan{.p = p,
                  .angles = angles,
                  .slow = slow_pairs(p.keys.codec.rope),
                  .rows = p.queries.num_heads / p.keys.layout.num_heads * p.queries.length,
                  .v_groups = p.keys.layout.value.groups(),
                  .v_code_offset = p.keys.layout.value.code_offset(),
                  .v_head_bytes = p.keys.layout.value.page_bytes()};
  plan.row_chunks = (plan.rows + kTaskRows - 1) / kTaskRows;
  if (plan.has_pre()) {
    plan.absorbs = plan.rows <= kAbsorbRows && !plan.gathered();
    const int64_t columns = plan.absorbs ? 2 * (p.keys.codec.rope.rotary_pairs - plan.slow.count)
                                         : p.keys.layout.head_dim;
    plan.pre_rows = round_up(columns, kMaxRows);
    for (int h = 0; h < p.keys.layout.num_heads; ++h)
      plan.lanes = std::max(plan.lanes, absorbed_lanes(plan.head(h).pre.rank()));
  }
  plan.weight_rows = plan.pre_rows + (plan.has_post() ? plan.rows : 0);
  if (plan.gathered() && plan.has_pre()) {
    const int64_t all = plan.sequence_heads() * p.keys.table_stride * kPageTokens;
    for (int64_t i = 0; i < all; ++i) {
      const int64_t slot = p.token_slots[i];
      if (slot != kNoSlot) plan.source_pages = std::max(plan.source_pages, slot / kPageTokens + 1);
    }
  }
  cut_tasks(plan);
  return plan;
}

// Rows of weights from `row` on, over `rank` channels.
inline QueryCodes weight_codes(const AttendPlan& plan, int64_t sequence_head, int64_t row,
                               int rank) {
  const int64_t first = sequence_head * plan.weight_rows + row;
  const int8_t* high = plan.weights + first * 2 * plan.p.keys.layout.head_dim;
  return {high,
          high + rank,
          plan.steps + first,
          plan.offsets + first,
          2 * int64_t{plan.p.keys.layout.head_dim},
          kQuad};
}

// What multiplies a head's core codes: a row for each column of its keys.
inline QueryCodes pre_codes(const AttendPlan& plan, int64_t sequence_head, const HeadPlan& head) {
  return weight_codes(plan, sequence_head, 0, head.pre.rank());
}

// What multiplies a head's tail codes: a row for each query.
inline QueryCodes post_codes(const AttendPlan& plan, int64_t sequence_head, const HeadPlan& head) {
  return weight_codes(plan, sequence_head, plan.pre_rows, head.post.rank());
}

// Numbers of every channel of a head, in whole vectors; zeros past the last channel.
using ChannelRow = float[kMaxHeadDim + 4 * kVecLanes];

// Quantizes one row of weights over the channels of `bands`; `constant` multiplies no code. Writes
// whole lines of codes, high and low.
inline void quantize_row(const Bands& bands, const ChannelRow& weights, float constant,
                         int8_t* high, int8_t* low, float* step, float* offset) {
  const int rank = bands.rank();
  F32 most{};
  for (int j = 0; j < rank; j += kVecLanes) {
    const F32 w = load<F32>(weights + j);
    most = max(most, max(w, -w));
  }
  *step = reduce_max(most) / kMostWeight;
  const F32 inverse = splat(*step > 0 ? 1.0f / *step : 0.0f);
  for (int j = 0; j < rank; j += 4 * kVecLanes) {
    I32 code[4], rest[4];
    for (int v = 0; v < 4; ++v) {
      const F32 w = load<F32>(weights + j + v * kVecLanes) * inverse;
      code[v] = round_to_int(w);
      rest[v] = round_to_int((w - to_float(code[v])) * kLowSteps);
    }
    store_bytes(high + j, code);
    store_bytes(low + j, rest);
  }
  // With the quantized weights, so that their rounding meets code - mid and not the much larger code.
  float middle = 0;
  int channel = 0;
  for (int w = 0; w < kNumWidths; ++w) {
    int64_t sum = 0, low_sum = 0;
    for (int j = channel; j < channel + bands.count[w]; ++j) {
      sum += high[j];
      low_sum += low[j];
    }
    middle += mid_code(kWidths[w]) * static_cast<float>(sum);
    if (kWidths[w] == 8) middle += mid_code(8) / kLowSteps * static_cast<float>(low_sum);
    channel += bands.count[w];
  }
  *offset = constant - middle * *step;
}

inline float dot_rows(const float* a, const float* b, int n) {
  F32 sum{};
  for (int i = 0; i < n; i += kVecLanes) sum += load<F32>(a + i) * load<F32>(b + i);
  return reduce_add(sum);
}

inline float dot_basis(const uint16_t* basis, const float* x, int n) {
  F32 sum{};
  for (int i = 0; i < n; i += kVecLanes) sum += load_bfloat16(basis + i) * load<F32>(x + i);
  return reduce_add(sum);
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
