// A decode step on a GPU, around attend: everything that it does follows from lengths on the device.
#pragma once

#include "csrc/gpu/pack.h"
#include "kernels/pack/step.cuh"

namespace svdq::gpu {

template <typename Stream>
void append_step(const StepParams& p, Stream& stream) {
  using namespace device;
  if (p.batch == 0) return;
  stream.launch("plan_step", LaunchShape{p.batch, 1, 1, kStepThreads, 0}, plan_step_kernel, p);
  const LaunchShape shape{static_cast<int>(p.new_keys.num_tokens), p.num_heads, p.batch,
                          kStepThreads, 0};
  if (p.dtype == DataType::kFloat32) {
    stream.launch("append_rows", shape, append_rows_kernel<uint32_t>, p);
  } else {
    stream.launch("append_rows", shape, append_rows_kernel<uint16_t>, p);
  }
}

template <int kDim, typename Stream>
void pack_due(const StepPackParams& p, Stream& stream) {
  using namespace device;
  const int heads = p.layout.num_heads, batch = p.step.batch, dim = p.layout.head_dim;
  const int bytes = static_cast<int>(sizeof(PackPlan<kDim>));
  const LaunchShape shape{1, heads, batch, kPackThreads, bytes};
  const LaunchShape plain{1, heads, batch, kPackThreads, 0};
  const HeadTable table = head_table(p.layout);
  const auto rotates = rotations(p.codec.rope, 0, p.step.plan.page_position, batch, 1, stream);
  const TokenRows rows{{}, p.codec.rope.rotary_pairs, rotates.slots, rotates.pages, true};
  const bool hybrid = p.post_layout.heads != nullptr;
  const float* none = nullptr;
  stream.launch("pack_due_keys", shape, pack_due_keys_kernel<kDim>, p, p.layout, p.codec, rows,
                table, none);
  if (hybrid) {
    float* rest = stream.template allocate<float>(int64_t{batch} * heads * kPageTokens * dim);
    const DecodeParams d{p.codec.rope,  rotates.slots, rotates.pages, p.codec.basis,
                         p.codec.scale, p.codec.mean,  rest};
    stream.launch(
        "unpack_due_keys",
        LaunchShape{1, heads, batch, kUnpackThreads, static_cast<int>(sizeof(UnpackPlan<kDim>))},
        unpack_due_keys_kernel<kDim>, p, table, d);
    stream.launch("residual_due", LaunchShape{1, heads, batch, kStepThreads, 0},
                  residual_due_kernel, p, rest);
    const KeyCodec post{Rope{}, p.codec.basis, p.codec.scale, p.codec.post_mean, nullptr};
    const TokenRows plain_rows{{}, 0, nullptr, nullptr, true};
    const float* left = rest;
    stream.launch("pack_due_keys", shape, pack_due_keys_kernel<kDim>, p, p.post_layout, post,
                  plain_rows, head_table(p.post_layout), left);
  }
  if (p.layout.packs_values()) {
    stream.launch("pack_due_values", shape, pack_due_values_kernel<kDim>, p, table);
  } else if (p.step.dtype == DataType::kFloat32) {
    stream.launch("copy_due_values", plain, copy_due_values_kernel<uint32_t>, p);
  } else {
    stream.launch("copy_due_values", plain, copy_due_values_kernel<uint16_t>, p);
  }
}

template <typename Stream>
void pack_step(const StepPackParams& p, Stream& stream) {
  using namespace device;
  if (p.step.batch == 0) return;
  check_aligned(p.codec.basis, "basis");
  check_aligned(p.k_pages, "k_pages");
  check_aligned(p.v_pages, "v_pages");
  check_aligned(p.step.window_keys, "window_keys");
  check_aligned(p.step.window_values, "window_values");
  with_dim_class(p.layout.head_dim, [&]<int kDim>() { pack_due<kDim>(p, stream); });
  const LaunchShape shape{1, p.step.num_heads, p.step.batch, kStepThreads, 0};
  if (p.step.dtype == DataType::kFloat32) {
    stream.launch("finish_step", shape, finish_step_kernel<uint32_t>, p.step);
  } else {
    stream.launch("finish_step", shape, finish_step_kernel<uint16_t>, p.step);
  }
}

}  // namespace svdq::gpu
