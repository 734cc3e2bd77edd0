// The plans of all heads as a kernel argument: no copy to the device and nothing that must outlive
// the call, so launches can be captured in a graph.
#pragma once

#include "kernels/machine/device.cuh"
#include "kernels/params.h"

namespace svdq::device {

inline constexpr int kMaxKvHeads = 128;  // what fits next to the other arguments in 4 KiB

struct HeadTable {
  struct Entry {
    uint8_t pre_quads[kNumWidths];  // of 4 channels, of which a band is a multiple
    uint8_t post_quads[kNumWidths];
    int32_t first_channel;
    int32_t k_offset;
    int32_t v_offset;
    int32_t v_bits;
  };
  Entry of[kMaxKvHeads];
  int32_t head_dim;
};
static_assert(kMaxHeadDim / kQuad <= UINT8_MAX);

// `layout.heads` lies on the host and has at most kMaxKvHeads entries; the caller has checked.
inline HeadTable make_head_table(const LayoutView& layout) {
  HeadTable table{};
  table.head_dim = layout.head_dim;
  for (int h = 0; h < layout.num_heads; ++h) {
    const HeadPlan& head = layout.heads[h];
    HeadTable::Entry& entry = table.of[h];
    for (int w = 0; w < kNumWidths; ++w) {
      entry.pre_quads[w] = static_cast<uint8_t>(head.pre.count[w] / kQuad);
      entry.post_quads[w] = static_cast<uint8_t>(head.post.count[w] / kQuad);
    }
    entry.first_channel = head.first_channel;
    entry.k_offset = static_cast<int32_t>(head.k_offset);
    entry.v_offset = static_cast<int32_t>(head.v_offset);
    entry.v_bits = head.value.bits;
  }
  return table;
}

SVDQ_DEVICE HeadPlan head_plan(const HeadTable& table, int head) {
  const HeadTable::Entry& entry = table.of[head];
  HeadPlan plan;
  SVDQ_UNROLL
  for (int w = 0; w < kNumWidths; ++w) {
    plan.pre.count[w] = entry.pre_quads[w] * kQuad;
    plan.post.count[w] = entry.post_quads[w] * kQuad;
  }
  plan.first_channel = entry.first_channel;
  plan.k_offset = entry.k_offset;
  plan.v_offset = entry.v_offset;
  plan.value = {entry.v_bits, table.head_dim};
  return plan;
}

}  // namespace svdq::device
