// Slots of a page: those that a call writes, and those that a query may see.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Bits first .. end - 1, both in 0 .. 64.
inline uint64_t slot_mask(int64_t first, int64_t end) {
  if (first >= end) return 0;
  return (end == kPageTokens ? ~uint64_t{0} : (uint64_t{1} << end) - 1) & (~uint64_t{0} << first);
}

// Slots first .. first + count - 1 of a page, written with tokens token .. token + count - 1.
struct PageSpan {
  int64_t page;  // row of the pool
  int64_t token;
  int first;
  int count;

  bool full() const { return count == kPageTokens; }
  uint64_t mask() const { return slot_mask(0, count) << first; }
};

// Span of page `index` of those that num_tokens tokens from `slot` on lie in.
inline PageSpan page_span(const int32_t* page_table, int64_t slot, int64_t num_tokens,
                          int64_t index) {
  const int64_t begin = std::max(slot, (slot / kPageTokens + index) * kPageTokens);
  const int64_t end = std::min(slot + num_tokens, (slot / kPageTokens + index + 1) * kPageTokens);
  return {page_table[slot / kPageTokens + index], begin - slot,
          static_cast<int>(begin % kPageTokens), static_cast<int>(end - begin)};
}

// Pages that num_tokens tokens from `slot` on lie in.
inline int64_t spanned_pages(int64_t slot, int64_t num_tokens) {
  return num_tokens == 0 ? 0 : (slot + num_tokens - 1) / kPageTokens - slot / kPageTokens + 1;
}

// Valid slots of page `page` of sequence b: those that are packed and are not sinks.
inline uint64_t valid_slots(const PackedKeys& keys, int64_t b, int64_t page) {
  const int64_t start = page * kPageTokens;
  return slot_mask(std::clamp<int64_t>(keys.sink_tokens - start, 0, kPageTokens),
                   std::clamp<int64_t>(keys.cache_seqlens[b] - start, 0, kPageTokens));
}

// Bits of `mask` for the tokens of a vector, t and on.
inline uint32_t mask_lanes(uint64_t mask, int t) {
  return static_cast<uint32_t>(mask >> t) & static_cast<uint32_t>((uint64_t{1} << kVecLanes) - 1);
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
