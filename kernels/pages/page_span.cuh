// Page ids as a kernel argument: the table of the pack and unpack stages lies on the host, where it
// has been checked, and a launch takes the next run of it along.
#pragma once

#include "kernels/machine/device.cuh"
#include "kernels/params.h"

namespace svdq::device {

inline constexpr int kMaxLaunchPages = 128;  // of one launch: blocks enough for any device

struct PageIds {
  int32_t of[kMaxLaunchPages];
};

// Slots first .. first + count - 1 of a page, which are tokens token .. token + count - 1.
struct PageSpan {
  int64_t page;
  int64_t token;
  int first, count;

  SVDQ_DEVICE bool has(int slot) const { return slot >= first && slot < first + count; }
};

// Page `first_chunk` + `run` of those that `num_tokens` tokens from `slot` on lie in; the launch has
// those from `first_chunk` on.
SVDQ_DEVICE PageSpan page_span(const PageIds& ids, int64_t slot, int64_t num_tokens,
                               int64_t first_chunk, int run) {
  const int64_t page_slot = (slot / kPageTokens + first_chunk + run) * kPageTokens;
  const int64_t begin = slot > page_slot ? slot : page_slot;
  const int64_t end =
      slot + num_tokens < page_slot + kPageTokens ? slot + num_tokens : page_slot + kPageTokens;
  return {ids.of[run], begin - slot, static_cast<int>(begin - page_slot),
          static_cast<int>(end - begin)};
}

// Pages that `num_tokens` tokens from `slot` on lie in.
SVDQ_HOST_DEVICE constexpr int64_t spanned_pages(int64_t slot, int64_t num_tokens) {
  return num_tokens == 0 ? 0 : (slot + num_tokens - 1) / kPageTokens - slot / kPageTokens + 1;
}

}  // namespace svdq::device
