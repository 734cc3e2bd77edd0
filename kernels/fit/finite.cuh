// The check of inputs: is every number finite and at most `limit` in magnitude? One pass over the
// source in 16-byte loads, bound by memory. Each warp writes a flag of its own, so nothing needs to
// be cleared before and no order matters.
#pragma once

#include "kernels/machine/numbers.cuh"

namespace svdq::device {

inline constexpr int kCheckThreads = 256;
inline constexpr int kCheckWarps = kCheckThreads / kWarpSize;

struct CheckParams {
  TokenSource source;
  int head_dim;
  float limit;
  bool aligned;  // aligned_rows(source)
  int* outside;  // [heads, blocks of a head, kCheckWarps], 1 where a warp met a number outside
};

// Grid: x = share of the tokens, y = head.
SVDQ_KERNEL(kCheckThreads) within_kernel(CheckParams p) {
  const int eights = p.head_dim / 8;
  const int64_t count = p.source.num_tokens * eights, step = int64_t{grid_x()} * kCheckThreads;
  bool outside = false;
  for (int64_t i = int64_t{block_x()} * kCheckThreads + thread_index(); i < count; i += step) {
    const int64_t token = i / eights, d = i % eights * 8;
    const Floats8 eight =
        load_eight(p.source.data, p.source.dtype,
                   block_y() * p.source.head_stride + token * p.source.token_stride + d, p.aligned);
    SVDQ_UNROLL
    for (float x : eight.x) outside |= !(x <= p.limit && x >= -p.limit);  // NaN is outside, too
  }
  const uint32_t lanes = ballot(outside);
  if (lane_index() == 0) {
    const int64_t block = int64_t{block_y()} * grid_x() + block_x();
    store(&p.outside[block * kCheckWarps + warp_index()], lanes != 0 ? 1 : 0);
  }
}

}  // namespace svdq::device
