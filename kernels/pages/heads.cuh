// The plans of all heads as a kernel argument: no copy to the device and nothing that must outlive
// the call, so launches can be captured in a graph.
#pragma once

#include "kernels/machine/device.cuh"
#include "kernels/params.h"

namespace svdq::device {

inline constexpr int kMaxKvHeads = 128;  // what fits next to the other arguments in 4 KiB

struct HeadTable {
  struct Entry {
    int16_t pre[kNumWidths];
    int16_t post[kNumWidths];
    int32_t first_channel;
    int32_t k_offset;
  };
  Entry of[kMaxKvHeads];
};

// `layout.heads` lies on the host and has at most kMaxKvHeads entries; the caller has checked.
inline HeadTable make_head_table(const LayoutView& layout) {
  HeadTable table{};
  for (int h = 0; h < layout.num_heads; ++h) {
    const HeadPlan& head = layout.heads[h];
    HeadTable::Entry& entry = table.of[h];
    for (int w = 0; w < kNumWidths; ++w) {
      entry.pre[w] = static_cast<int16_t>(head.pre.count[w]);
      entry.post[w] = static_cast<int16_t>(head.post.count[w]);
    }
    entry.first_channel = head.first_channel;
    entry.k_offset = static_cast<int32_t>(head.k_offset);
  }
  return table;
}

SVDQ_DEVICE HeadPlan head_plan(const HeadTable& table, int head) {
  const HeadTable::Entry& entry = table.of[head];
  HeadPlan plan;
  SVDQ_UNROLL
  for (int w = 0; w < kNumWidths; ++w) {
    plan.pre.count[w] = entry.pre[w];
    plan.post.count[w] = entry.post[w];
  }
  plan.first_channel = entry.first_channel;
  plan.k_offset = entry.k_offset;
  return plan;
}

}  // namespace svdq::device
