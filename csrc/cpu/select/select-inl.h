// The select stage: weighs every packed token of a sequence by its leading channels (lead-inl.h)
// and keeps the best. Work is cut by shapes alone and every step has one order, so the choice does
// not depend on the number of threads.
//
// Per page of 64 tokens and KV head, D = 128, 4 query heads, 16 channels of 4 bits: 512 bytes read;
// 47 slow pairs, 30 of them interpolated, take 270 vector operations to absorb, the 64 tokens 140 to
// score and 130 to exponentiate.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/core/absorb.h"
#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/core/scalar.h"
#include "csrc/core/top_tokens.h"
#include "csrc/cpu/attend/accumulate-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/scores-inl.h"
#include "csrc/cpu/fit/quantizer-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/select/proxy-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Pages of a task, which weighs them for all heads: those of one row of the pool lie on few pages of
// the machine's memory, whose translations are then found.
inline constexpr int64_t kSelectChunkPages = kRunPages;
// Pages whose angles are a task.
inline constexpr int64_t kAngleChunkPages = 4 * kRunPages;

struct SelectPlan {
  const SelectParams& p;
  int64_t rows;  // query rows of a KV head
  ProxyPairs slow;
  int tile = 0;                   // numbers of a tile, of the head that has most
  float* angles = nullptr;        // [B, max_pages, 2, pairs] of the middles of pages
  float* fixed = nullptr;         // [B, H, tiles, tile]
  float* turn = nullptr;          // [B, H, tiles, pairs, 2, tile]
  float* steps = nullptr;         // [B, H, rows, LeadBands::kMost]
  float* norms = nullptr;         // [B, H, rows], log2 units
  float* sums = nullptr;          // [B, H, rows], of which norms are made
  float* weights = nullptr;       // [B, H, max_pages * 64]
  int32_t* candidates = nullptr;  // [B, H, max_pages * 64 + kLanes]

  int64_t pages(int64_t b) const {
    return (int64_t{p.keys.cache_seqlens[b]} + kPageTokens - 1) / kPageTokens;
  }
  int64_t max_pages() const { return p.keys.table_stride; }
  int64_t angle_pages() const { return round_up(max_pages(), kRunPages); }
  int num_pairs() const { return slow.count; }
  int64_t tiles() const { return (rows + kMaxRows - 1) / kMaxRows; }
  const float* page_angles(int64_t b, int64_t page) const {
    return angles + (b * angle_pages() + page) * 2 * num_pairs();
  }
  ProxyQuery proxy_query(int64_t sequence_head) const {
    const int64_t size = tiles() * tile;
    return {fixed + sequence_head * size, turn + sequence_head * size * 2 * num_pairs(),
            steps + sequence_head * rows * ProxyBands::kMost};
  }
  const uint8_t* lines(int64_t b, int64_t h, int64_t page) const {
    const int64_t id = p.keys.page_table[b * p.keys.table_stride + page];
    return p.keys.pages + id * p.keys.layout.k_page_bytes + p.keys.layout.heads[h].k_offset;
  }
};

inline int64_t carve_select(SelectPlan& plan, uint8_t* base) {
  const SelectParams& p = plan.p;
  const int64_t heads = int64_t{p.keys.batch} * p.keys.layout.num_heads;
  const int64_t size = heads * plan.tiles() * plan.tile;
  int64_t bytes = 0;
  carve(plan.angles, base, bytes, p.keys.batch * plan.angle_pages() * 2 * plan.num_pairs());
  carve(plan.fixed, base, bytes, size);
  carve(plan.turn, base, bytes, size * 2 * plan.num_pairs());
  carve(plan.steps, base, bytes, heads * plan.rows * ProxyBands::kMost);
  carve(plan.norms, base, bytes, heads * plan.rows);
  carve(plan.sums, base, bytes, heads * plan.rows);
  carve(plan.weights, base, bytes, heads * plan.max_pages() * kPageTokens);
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

// Angles of the middles of up to kAngleChunkPages pages of sequence b.
inline void prepare_angles(const SelectPlan& plan, int64_t b, int64_t chunk) {
  const SelectParams& p = plan.p;
  const int64_t first = chunk * kAngleChunkPages;
  const int64_t last = std::min(first + kAngleChunkPages, round_up(plan.pages(b), kRunPages));
  const int count = plan.num_pairs();
  if (first >= last || count == 0) return;
  float frequencies[kMaxHeadDim / 2];
  for (int i = 0; i < count; ++i) frequencies[i] = p.keys.codec.rope.inv_freq[plan.slow.pair[i]];
  const Rope slow{frequencies, count};
  double turn[kMaxHeadDim], rotation[kMaxHeadDim];
  start_rotation(slow, kPageTokens, turn);
  const int64_t position = p.keys.first_position ? p.keys.first_position[b] : 0;
  start_rotation(slow, position + first * kPageTokens + kPageTokens / 2, rotation);
  for (int64_t page = first; page < last; ++page) {
    float* angles = plan.angles + (b * plan.angle_pages() + page) * 2 * count;
    for (int i = 0; i < 2 * count; ++i) angles[i] = static_cast<float>(rotation[i]);
    advance_rotation(rotation, turn, count);
  }
}

// Absorbs the queries of one head into its leading channels.
inline void prepare_proxy(const SelectPlan& plan, int64_t sequence_head) {
  const SelectParams& p = plan.p;
  const int64_t b = sequence_head / p.keys.layout.num_heads,
                h = sequence_head % p.keys.layout.num_heads;
  const int dim = p.keys.layout.head_dim, half = p.keys.codec.rope.rotary_pairs;
  const HeadPlan& head = p.keys.layout.heads[h];
  const ProxyBands lead = proxy_bands(head, p.channels);
  const ProxyQuery query = plan.proxy_query(sequence_head);
  const int64_t size = plan.tiles() * lead.tile();
  std::memset(query.fixed, 0, sizeof(float) * size);
  std::memset(query.turn, 0, sizeof(float) * size * 2 * plan.num_pairs());
  float q[kMaxHeadDim], x[kMaxHeadDim];
  const float factor = p.queries.sm_scale * kLog2E;
  for (int row = 0; row < plan.rows; ++row) {
    const ProxyRow own = proxy_row(lead, query, row, plan.num_pairs());
    const int64_t at = (sequence_head * plan.rows + row) * dim;
    for (int d = 0; d < dim; ++d)
      q[d] = load_scalar(p.queries.data, p.queries.dtype, at + d) * factor;
    const auto absorb = [&](float* fixed, float* turn, bool pre) {
      absorb_fixed(fixed, q, x, pre ? 2 * half : 0, dim);
      if (pre) absorb_turned(turn, own.stride, plan.slow, half, q, x);
    };
    for (int i = 0; i < lead.bands; ++i) {
      const ProxyBand& band = lead.band[i];
      for (int j = 0; j < band.used; ++j) {
        const int64_t channel = b * p.keys.layout.rank + head.first_channel + band.channel + j;
        for (int d = 0; d < dim; ++d)
          x[d] = bfloat16_to_float(p.keys.codec.basis[channel * dim + d]) *
                 p.keys.codec.scale[channel];
        absorb(own.fixed + band.lane + j, own.turn + band.lane + j, band.pre);
      }
    }
    std::memcpy(x, p.keys.codec.mean + sequence_head * dim, sizeof(float) * dim);
    absorb(own.fixed_constant, own.turn_constant, p.keys.layout.rope != RopeMode::kPost);
    if (p.keys.layout.rope == RopeMode::kHybrid)
      absorb_fixed(own.fixed_constant, q, p.keys.codec.post_mean + sequence_head * dim, 0, dim);
    scale_proxy(lead, query, row, plan.num_pairs());
  }
}

// Slots of page `page` that may be selected or count for a norm.
inline uint64_t select_mask(const SelectPlan& plan, int64_t b, int64_t page) {
  const int64_t at = page * kPageTokens;
  const int64_t begin = std::clamp<int64_t>(plan.p.keys.sink_tokens - at, 0, kPageTokens);
  const int64_t end = std::clamp<int64_t>(plan.p.keys.cache_seqlens[b] - at, 0, kPageTokens);
  if (begin >= end) return 0;
  return (end == kPageTokens ? ~uint64_t{0} : (uint64_t{1} << end) - 1) & (~uint64_t{0} << begin);
}

// Where a task reads.
struct SelectHead {
  int64_t b, h, sequence_head;
  ProxyBands lead;
};

// Calls fn(page, row, part, s) with the scores s of the tokens of pages first .. last - 1, which lie
// in one run, for rows row .. row + kRows - 1.
template <typename Fn>
inline void for_each_score(const SelectPlan& plan, const SelectHead& head, int64_t first,
                           int64_t last, const Fn& fn) {
  const ProxyQuery query = plan.proxy_query(head.sequence_head);
  const int pairs = plan.num_pairs(), size = head.lead.tile(), quick = plan.slow.quick;
  const int64_t run = first / kRunPages * kRunPages;
  const bool smooth = last - first > kNodes && quick < pairs;
  for (int row = 0; row < plan.rows; row += kMaxRows) {
    const float* fixed = query.fixed + int64_t{row / kMaxRows} * size;
    const float* turn = query.turn + int64_t{row / kMaxRows} * pairs * 2 * size;
    const float* step = query.step + row * ProxyBands::kMost;
    RawWeights nodes[kNodes], raw;
    for (int k = 0; k < kNodes && smooth; ++k) {
      absorb_pairs(fixed, turn, size, pairs, quick, pairs,
                   plan.page_angles(head.b, run + k * kNodeStep), nodes[k]);
    }
    for (int64_t page = first; page < last; ++page) {
      if (smooth) interpolate(nodes, size, static_cast<int>(page - run), raw);
      absorb_pairs(smooth ? raw.of : fixed, turn, size, pairs, 0, smooth ? quick : pairs,
                   plan.page_angles(head.b, page), raw);
      const uint8_t* lines = plan.lines(head.b, head.h, page);
      with_count<kMaxRows>(static_cast<int>(plan.rows - row), [&]<int kRows>() {
        ProxyWeights weights;
        round_weights<kRows>(head.lead, raw, weights);
        for (int part = 0; part < kParts; ++part) {
          F32 s[kRows][kGroups];
          proxy_scores<kRows>(lines, head.lead, weights, step, part, s);
          fn.template operator()<kRows>(page, row, part, s);
        }
      });
    }
  }
}

// Log-sum-exp of every row's scores over the sample of pages.
inline void prepare_norms(const SelectPlan& plan, const SelectHead& head) {
  const int64_t pages = plan.pages(head.b), stride = select_sample_stride(pages);
  float* largest = plan.norms + head.sequence_head * plan.rows;
  float* sums = plan.sums + head.sequence_head * plan.rows;
  std::fill(largest, largest + plan.rows, kNoScore);
  std::fill(sums, sums + plan.rows, 0.0f);
  for (int64_t page = stride / 2; page < pages; page += stride) {
    const uint64_t mask = select_mask(plan, head.b, page);
    if (mask == 0) continue;
    const auto add = [&]<int kRows>(int64_t, int64_t row, int part, const F32(&s)[kRows][kGroups]) {
      for (int r = 0; r < kRows; ++r) {
        F32 most = splat(kNoScore), sum{};
        for (int g = 0; g < kGroups; ++g)
          most = max(most,
                     select_lanes(mask_lanes(mask, tokens_at(g, part)), s[r][g], splat(kNoScore)));
        const float top = std::max(reduce_max(most), largest[row + r]);
        if (top == kNoScore) continue;
        for (int g = 0; g < kGroups; ++g)
          sum += select_lanes(mask_lanes(mask, tokens_at(g, part)), exp2(s[r][g] - top), F32{});
        const float before =
            largest[row + r] == kNoScore ? 0.0f : std::exp2(largest[row + r] - top);
        sums[row + r] = sums[row + r] * before + reduce_add(sum);
        largest[row + r] = top;
      }
    };
    for_each_score(plan, head, page, page + 1, add);
  }
  for (int64_t r = 0; r < plan.rows; ++r)
    largest[r] = largest[r] == kNoScore ? 0.0f : largest[r] + std::log2(sums[r]);
}

// 2^v within 0.8 %, for v <= 100; below -126 it may be anything from 0 to 2^-126.
inline F32 rough_exp2(F32 v) {
#if SVDQ_TARGET != 512
  v = max(v, splat(-126.0f));
#endif
  const F32 whole = round_even(v), x = v - whole;
  return scale_by_power((splat(0.24022651f) * x + 0.69314718f) * x + 1.0f, whole);
}

// Weights of the tokens of some pages; of those that may not be selected, -1.
inline void weigh_pages(const SelectPlan& plan, const SelectHead& head, int64_t first,
                        int64_t last) {
  constexpr float kMost = 100.0f;  // so that a sum of weights stays finite
  constexpr int64_t kAhead = 4;    // pages that are asked for
  const float* norms = plan.norms + head.sequence_head * plan.rows;
  float* weights = plan.weights + head.sequence_head * plan.max_pages() * kPageTokens;
  const int64_t pages = plan.pages(head.b);
  for (int64_t run = first; run < last; run += kRunPages) {
    const auto add = [&]<int kRows>(int64_t page, int64_t row, int part,
                                    const F32(&s)[kRows][kGroups]) {
      if (row == 0 && part == 0 && page + kAhead < pages) {
        const uint8_t* next = plan.lines(head.b, head.h, page + kAhead);
        for (int i = 0; i < head.lead.bands; ++i) {
          const ProxyBand& band = head.lead.band[i];
          for (int64_t at = 0; at < band.bytes; at += kLineBytes)
            prefetch_line(next + band.offset + at);
        }
      }
      const uint64_t mask = select_mask(plan, head.b, page);
      for (int g = 0; g < kGroups; ++g) {
        float* at = weights + page * kPageTokens + g * kLanes + part * kVecLanes;
        F32 sum = row ? load<F32>(at) : F32{};
        for (int r = 0; r < kRows; ++r)
          sum += rough_exp2(min(s[r][g] - norms[row + r], splat(kMost)));
        const bool done = row + kRows == plan.rows && mask != ~uint64_t{0};
        store(at, done ? select_lanes(mask_lanes(mask, tokens_at(g, part)), sum, splat(-1)) : sum);
      }
    };
    for_each_score(plan, head, run, std::min(run + kRunPages, last), add);
  }
}

// Indices of the weights [pages * 64] that are at least `least`.
inline int64_t collect(const float* weights, int64_t pages, float least, int32_t* indices) {
  int64_t found = 0;
  for (int64_t i = 0; i < pages * kPageTokens; i += kVecLanes)
    found +=
        store_at_least(load<F32>(weights + i), least, static_cast<int32_t>(i), indices + found);
  return found;
}

// Selects a head's tokens, outliers with them.
inline void write_selected(const SelectPlan& plan, const SelectHead& head) {
  const SelectParams& p = plan.p;
  const int64_t count = p.keys.cache_seqlens[head.b], pages = plan.pages(head.b);
  const int64_t size = plan.max_pages() * kPageTokens;
  float* weights = plan.weights + head.sequence_head * size;
  int32_t* candidates = plan.candidates + head.sequence_head * (size + kLanes);
  const int32_t* outliers = p.keys.outlier_slots + head.sequence_head * p.keys.num_outliers;
  int64_t kept = 0;
  for (; kept < p.keys.num_outliers && outliers[kept] < count; ++kept)
    weights[outliers[kept]] = -1.0f;

  const float bound = likely_bound(weights, count, p.budget);
  int64_t found = collect(weights, pages, bound, candidates);
  if (found < p.budget && bound > 0) found = collect(weights, pages, 0.0f, candidates);
  keep_largest(weights, p.budget, found, candidates);
  int64_t i = std::min<int64_t>(found, p.budget), j = kept;
  // Both lists ascend.
  int32_t* slots = p.slots + head.sequence_head * (int64_t{p.budget} + p.keys.num_outliers);
  std::fill(slots + i + j, slots + p.budget + p.keys.num_outliers, kNoSlot);
  if (p.keys.num_outliers) {
    int32_t* places = p.outlier_indices + head.sequence_head * p.keys.num_outliers;
    std::fill(places + kept, places + p.keys.num_outliers, kNoSlot);
    for (; j > 0; --j) {
      for (; i > 0 && candidates[i - 1] > outliers[j - 1]; --i)
        slots[i + j - 1] = candidates[i - 1];
      slots[i + j - 1] = outliers[j - 1];
      places[j - 1] = static_cast<int32_t>(i + j - 1);
    }
  }
  std::copy(candidates, candidates + i, slots);
}

inline void select(const SelectParams& p, const Executor& executor) {
  SelectPlan plan = make_select_plan(p);
  const AlignedBuffer memory(carve_select(plan, nullptr));
  carve_select(plan, memory.as());
  const int64_t heads = int64_t{p.keys.batch} * p.keys.layout.num_heads;
  const int64_t chunks = (plan.max_pages() + kSelectChunkPages - 1) / kSelectChunkPages;
  const int64_t angle_chunks = (plan.max_pages() + kAngleChunkPages - 1) / kAngleChunkPages;
  const auto select_head = [&](int64_t sequence_head) {
    const int64_t b = sequence_head / p.keys.layout.num_heads,
                  h = sequence_head % p.keys.layout.num_heads;
    return SelectHead{b, h, sequence_head, proxy_bands(p.keys.layout.heads[h], p.channels)};
  };
  for_each_task(executor, p.keys.batch * angle_chunks, [&](int64_t task, int) {
    prepare_angles(plan, task / angle_chunks, task % angle_chunks);
  });
  for_each_task(executor, heads, [&](int64_t sequence_head, int) {
    prepare_proxy(plan, sequence_head);
    prepare_norms(plan, select_head(sequence_head));
  });
  for_each_task(executor, p.keys.batch * chunks, [&](int64_t task, int) {
    const int64_t b = task / chunks, first = task % chunks * kSelectChunkPages;
    const int64_t last = std::min(first + kSelectChunkPages, plan.pages(b));
    for (int64_t h = 0; h < p.keys.layout.num_heads; ++h)
      weigh_pages(plan, select_head(b * p.keys.layout.num_heads + h), first, last);
  });
  for_each_task(executor, heads, [&](int64_t sequence_head, int) {
    write_selected(plan, select_head(sequence_head));
  });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
