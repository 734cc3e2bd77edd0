// The select stage: estimates the mass of every packed token of a sequence from its proxy channels (proxy-inl.h)
// and keeps the largest. Work is tiled by shapes alone and every sum has one order, so the choice does not depend on
// the number of threads.
//
// Per page of 64 tokens and KV head, D = 128, 4 query heads, 16 channels of 4 bits: 512 bytes read; 47 slow pairs,
// 30 of them interpolated, take 270 vector operations to absorb, the 64 tokens 140 to score and 130 to exponentiate.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/parallel.h"
#include "csrc/cpu/select/absorb-inl.h"
#include "csrc/cpu/select/plan-inl.h"
#include "csrc/cpu/select/proxy-inl.h"
#include "csrc/cpu/select/token_mass-inl.h"
#include "csrc/cpu/select/top-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Prepares angles and operands, estimates the mass of every token, keeps the largest.
inline void select(const SelectParams& p, const Executor& executor) {
  SelectPlan plan = make_select_plan(p);
  const AlignedBuffer memory(carve_select(plan, nullptr));
  carve_select(plan, memory.as());
  const int64_t heads = int64_t{p.keys.batch} * p.keys.layout.num_heads;
  const int64_t chunks = ceil_div(plan.max_pages(), kSelectChunkPages);
  const int64_t angle_chunks = ceil_div(plan.max_pages(), kSelectAnglePages);
  const auto select_head = [&](int64_t sequence_head) {
    const int64_t b = sequence_head / p.keys.layout.num_heads,
                  h = sequence_head % p.keys.layout.num_heads;
    return SelectHead{b, h, sequence_head, proxy_bands(p.keys.layout.heads[h], p.channels)};
  };
  for_each_task(executor, p.keys.batch * angle_chunks, [&](int64_t task, int) {
    prepare_middle_angles(plan, task / angle_chunks, task % angle_chunks);
  });
  for_each_task(executor, heads, [&](int64_t sequence_head, int) {
    prepare_proxy(plan, sequence_head);
    prepare_norms(plan, select_head(sequence_head));
  });
  for_each_task(executor, p.keys.batch * chunks, [&](int64_t task, int) {
    const int64_t b = task / chunks, first = task % chunks * kSelectChunkPages;
    const int64_t last = std::min(first + kSelectChunkPages, plan.pages(b));
    for (int64_t h = 0; h < p.keys.layout.num_heads; ++h)
      estimate_mass(plan, select_head(b * p.keys.layout.num_heads + h), first, last);
  });
  for_each_task(executor, heads, [&](int64_t sequence_head, int) {
    write_selected(plan, select_head(sequence_head));
  });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
