// Operands that attend prepares once a call: scaled queries, folded and absorbed queries, rotations to every page.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/absorb.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/attend/absorb_query-inl.h"
#include "csrc/cpu/attend/fold_query-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/pre_basis-inl.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Scales the queries of one (sequence, KV head) and prepares the operands that multiply its codes.
inline void prepare_head(const AttendPlan& plan, int64_t sequence_head) {
  const AttendParams& p = plan.p;
  const int64_t b = sequence_head / p.keys.layout.num_heads,
                h = sequence_head % p.keys.layout.num_heads;
  const int dim = p.keys.layout.head_dim;
  const HeadPlan& head = plan.head(h);
  float* query = plan.query + sequence_head * plan.rows * dim;
  const float factor = p.queries.sm_scale * kLog2E;
  for (int64_t i = 0; i < plan.rows * dim; i += kVecLanes) {
    store(query + i,
          load_as_float(p.queries.data, p.queries.dtype, sequence_head * plan.rows * dim + i) *
              factor);
  }
  if (plan.pages(b) == 0) return;

  if (plan.has_post()) fold_queries(plan, sequence_head);
  if (!plan.has_pre()) return;

  const uint16_t* basis = p.keys.codec.basis + (b * p.keys.layout.rank + head.first_channel) * dim;
  const float* scale = p.keys.codec.scale + b * p.keys.layout.rank + head.first_channel;
  const float* mean = p.keys.codec.mean + sequence_head * dim;
  const PreBasis pre(basis, scale, head.pre.rank(), dim);
  prepare_interleaved(plan, sequence_head, head, pre, mean);
  for (int64_t tile = 0; plan.absorbs && tile < plan.tiles(); ++tile) {
    const int64_t row = tile * kTileRows;
    absorb_tile(plan.slow, p.keys.codec.rope, query + row * dim,
                static_cast<int>(std::min<int64_t>(kTileRows, plan.rows - row)), dim, pre, mean,
                plan.absorbed(sequence_head, tile));
  }
}

// Pages of a task that computes angles.
inline constexpr int64_t kAngleTaskPages = 4 * kChunkPages;

// Rotations to the first positions and the middles of pages chunk * kAngleTaskPages and on of sequence b.
inline void prepare_page_angles(const AttendPlan& plan, int64_t b, int64_t chunk) {
  const int rotary_pairs = plan.p.keys.codec.rope.rotary_pairs;
  const int64_t first = chunk * kAngleTaskPages;
  const int64_t last = std::min(first + kAngleTaskPages, plan.angle_pages());
  double rotation[kMaxHeadDim];
  const int64_t position = plan.p.keys.first_position ? plan.p.keys.first_position[b] : 0;
  start_rotation(plan.p.keys.codec.rope, position + first * kPageTokens, rotation);
  for (int64_t page = first; page < last; ++page) {
    float* start = plan.starts + (b * plan.angle_pages() + page) * 2 * rotary_pairs;
    for (int i = 0; i < 2 * rotary_pairs; ++i) start[i] = static_cast<float>(rotation[i]);
    if (plan.absorbs) set_middle(plan.slow, rotation, rotary_pairs, plan.page_middle(b, page));
    advance_rotation(rotation, plan.angles.page_rotation(), rotary_pairs);
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
