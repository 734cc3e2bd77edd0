// The tokens of largest mass, merged with the outliers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/top_tokens.h"
#include "csrc/cpu/select/plan-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Indices of the tokens [pages * 64] with a mass of at least `bound`.
inline int64_t collect(const float* token_mass, int64_t pages, float bound, int32_t* indices) {
  int64_t found = 0;
  for (int64_t i = 0; i < pages * kPageTokens; i += kVecLanes)
    found +=
        store_at_least(load<F32>(token_mass + i), bound, static_cast<int32_t>(i), indices + found);
  return found;
}

// Writes a head's selected tokens, merged with its outliers.
inline void write_selected(const SelectPlan& plan, const SelectHead& head) {
  const SelectParams& p = plan.p;
  const int64_t count = p.keys.cache_seqlens[head.b], pages = plan.pages(head.b);
  const int64_t size = plan.max_pages() * kPageTokens;
  float* token_mass = plan.token_mass + head.sequence_head * size;
  int32_t* candidates = plan.candidates + head.sequence_head * (size + kLanes);
  const int32_t* outliers = p.keys.outlier_slots + head.sequence_head * p.keys.num_outliers;
  // Exclude outliers from the selection: they are selected anyway.
  int64_t kept = 0;
  for (; kept < p.keys.num_outliers && outliers[kept] < count; ++kept)
    token_mass[outliers[kept]] = -1.0f;

  // Collect candidates above a bound that is likely to leave enough, and keep the largest.
  const float bound = likely_bound(token_mass, count, p.budget);
  int64_t found = collect(token_mass, pages, bound, candidates);
  if (found < p.budget && bound > 0) found = collect(token_mass, pages, 0.0f, candidates);
  keep_largest(token_mass, p.budget, found, candidates);
  int64_t i = std::min<int64_t>(found, p.budget), j = kept;
  // Merge both lists, which ascend, from the back.
  int32_t* slots = p.slots + head.sequence_head * (int64_t{p.budget} + p.keys.num_outliers);
  std::fill(slots + i + j, slots + p.budget + p.keys.num_outliers, kNoSlot);
  if (p.keys.num_outliers) {
    int32_t* indices = p.outlier_indices + head.sequence_head * p.keys.num_outliers;
    std::fill(indices + kept, indices + p.keys.num_outliers, kNoSlot);
    for (; j > 0; --j) {
      for (; i > 0 && candidates[i - 1] > outliers[j - 1]; --i)
        slots[i + j - 1] = candidates[i - 1];
      slots[i + j - 1] = outliers[j - 1];
      indices[j - 1] = static_cast<int32_t>(i + j - 1);
    }
  }
  std::copy(candidates, candidates + i, slots);
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
