// A decode step on a GPU: one launch packs, appends and prepares, then attend sees what it left. Everything follows from
// lengths on the device.
#pragma once

#include "csrc/gpu/attend.h"
#include "kernels/step/step.cuh"

namespace svdq::gpu {

// The first kernel of a step, in place of attend's `prepare`.
template <int kDim, typename Stream>
void begin_step(const StepParams& p, const AttendParams& a,
                const device::AttendWorkspace& workspace, const device::HeadTable& heads,
                const device::PrepareBlocks& blocks, Stream& stream) {
  const LayoutView& layout = a.keys.layout;
  const int64_t all = int64_t{a.keys.batch} * layout.num_heads;
  const int64_t pairs = a.keys.codec.rope.rotary_pairs;
  device::StepWorkspace scratch{};
  if (pairs > 0)
    scratch.rotation = stream.template allocate<device::Floats2>(all * (kPageTokens + 1) * pairs);
  if (layout.rope == RopeMode::kHybrid)
    scratch.rest = stream.template allocate<float>(all * kPageTokens * layout.head_dim);
  AttendParams before = a;
  before.keys.cache_seqlens = p.cache_seqlens;
  stream.launch("begin_step", device::begin_step_launch<kDim>(a, blocks),
                device::begin_step_kernel<kDim>, p, before, workspace, scratch, heads, blocks);
}

template <typename Stream>
void decode_step(const DecodeStepParams& p, Stream& stream) {
  if (p.attend.keys.batch == 0) return;
  check_aligned(p.attend.keys.codec.basis, "basis");
  check_aligned(p.step.k_pages, "k_pages");
  check_aligned(p.step.v_pages, "v_pages");
  check_aligned(p.step.window_keys, "window_keys");
  check_aligned(p.step.window_values, "window_values");
  with_dim_class(p.attend.keys.layout.head_dim,
                 [&]<int kDim>() { attend_class<kDim>(p.attend, nullptr, stream, &p.step); });
}

}  // namespace svdq::gpu
