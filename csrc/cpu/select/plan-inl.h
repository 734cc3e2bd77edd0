// Sizes and memory of a call to select.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/absorb.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/select/proxy-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Pages of a task, which visits all heads of each: the heads of a page lie on few pages of virtual memory, so a task
// needs few address translations.
inline constexpr int64_t kSelectChunkPages = kChunkPages;
// Pages of a task that computes angles.
inline constexpr int64_t kSelectAnglePages = 4 * kChunkPages;

// Sizes that all tasks share, and the memory they use.
struct SelectPlan {
  const SelectParams& p;
  int64_t rows;  // query rows of a KV head
  ProxyPairs slow;
  int tile = 0;                   // floats of a tile of the widest head
  float* angles = nullptr;        // [B, max_pages, 2, pairs] of the middles of pages
  float* fixed = nullptr;         // [B, H, tiles, tile]
  float* rotary = nullptr;        // [B, H, tiles, pairs, 2, tile]
  float* scales = nullptr;        // [B, H, rows, ProxyBands::kMaxBands]
  float* norms = nullptr;         // [B, H, rows], log2 units
  float* sums = nullptr;          // [B, H, rows]: sum of 2^(score - maximum), to compute norms
  float* token_mass = nullptr;    // [B, H, max_pages * 64]
  int32_t* candidates = nullptr;  // [B, H, max_pages * 64 + kLanes]

  int64_t pages(int64_t b) const { return ceil_div(p.keys.cache_seqlens[b], kPageTokens); }
  int64_t max_pages() const { return p.keys.table_stride; }
  int64_t angle_pages() const { return round_up(max_pages(), kChunkPages); }
  int num_pairs() const { return slow.count; }
  int64_t tiles() const { return ceil_div(rows, kTileRows); }
  const float* page_angles(int64_t b, int64_t page) const {
    return angles + (b * angle_pages() + page) * 2 * num_pairs();
  }
  ProxyQuery proxy_query(int64_t sequence_head) const {
    const int64_t size = tiles() * tile;
    return {fixed + sequence_head * size, rotary + sequence_head * size * 2 * num_pairs(),
            scales + sequence_head * rows * ProxyBands::kMaxBands};
  }
  const uint8_t* lines(int64_t b, int64_t h, int64_t page) const {
    const int64_t id = p.keys.page_table[b * p.keys.table_stride + page];
    return p.keys.pages + id * p.keys.layout.k_page_bytes + p.keys.layout.heads[h].k_offset;
  }
};

// Lays the plan's memory out from `base` (null: only to measure); returns its bytes.
inline int64_t carve_select(SelectPlan& plan, uint8_t* base) {
  const SelectParams& p = plan.p;
  const int64_t heads = int64_t{p.keys.batch} * p.keys.layout.num_heads;
  const int64_t size = heads * plan.tiles() * plan.tile;
  int64_t bytes = 0;
  carve(plan.angles, base, bytes, p.keys.batch * plan.angle_pages() * 2 * plan.num_pairs());
  carve(plan.fixed, base, bytes, size);
  carve(plan.rotary, base, bytes, size * 2 * plan.num_pairs());
  carve(plan.scales, base, bytes, heads * plan.rows * ProxyBands::kMaxBands);
  carve(plan.norms, base, bytes, heads * plan.rows);
  carve(plan.sums, base, bytes, heads * plan.rows);
  carve(plan.token_mass, base, bytes, heads * plan.max_pages() * kPageTokens);
  carve(plan.candidates, base, bytes, heads * (plan.max_pages() * kPageTokens + kLanes));
  return bytes;
}

inline SelectPlan make_select_plan(const SelectParams& p) {
  SelectPlan plan{
      .p = p, .rows = p.queries.num_heads / p.keys.layout.num_heads * p.queries.length, .slow = {}};
  for (int i = 0; i < p.keys.codec.rope.rotary_pairs; ++i) {
    const float frequency = p.keys.codec.rope.inv_freq[i];
    if (frequency > kSmoothFastest && frequency <= kSelectFastest)
      plan.slow.pair[plan.slow.count++] = i;
  }
  plan.slow.quick = plan.slow.count;
  for (int i = 0; i < p.keys.codec.rope.rotary_pairs; ++i) {
    if (p.keys.codec.rope.inv_freq[i] <= kSmoothFastest) plan.slow.pair[plan.slow.count++] = i;
  }
  for (int h = 0; h < p.keys.layout.num_heads; ++h)
    plan.tile = std::max(plan.tile, proxy_bands(p.keys.layout.heads[h], p.channels).tile());
  return plan;
}

// Rotations to the middles of pages chunk * kSelectAnglePages and on of sequence b.
inline void prepare_middle_angles(const SelectPlan& plan, int64_t b, int64_t chunk) {
  const SelectParams& p = plan.p;
  const int64_t first = chunk * kSelectAnglePages;
  const int64_t last = std::min(first + kSelectAnglePages, round_up(plan.pages(b), kChunkPages));
  const int count = plan.num_pairs();
  if (first >= last || count == 0) return;
  float frequencies[kMaxHeadDim / 2];
  for (int i = 0; i < count; ++i) frequencies[i] = p.keys.codec.rope.inv_freq[plan.slow.pair[i]];
  const Rope slow{frequencies, count};
  double page_rotation[kMaxHeadDim], rotation[kMaxHeadDim];
  start_rotation(slow, kPageTokens, page_rotation);
  const int64_t position = p.keys.first_position ? p.keys.first_position[b] : 0;
  start_rotation(slow, position + first * kPageTokens + kPageTokens / 2, rotation);
  for (int64_t page = first; page < last; ++page) {
    float* angles = plan.angles + (b * plan.angle_pages() + page) * 2 * count;
    for (int i = 0; i < 2 * count; ++i) angles[i] = static_cast<float>(rotation[i]);
    advance_rotation(rotation, page_rotation, count);
  }
}

// A head that a task visits.
struct SelectHead {
  int64_t b, h, sequence_head;
  ProxyBands proxy;
};

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
