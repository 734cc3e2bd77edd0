// The finite stage: a pass over keys or values that finds NaN, infinity and numbers above `limit` in
// magnitude. It loads 16 bytes a thread and is bound by memory. Each warp writes a flag of its own, so
// nothing is cleared before and no order matters.
#pragma once

#include "kernels/machine/numbers.cuh"

namespace svdq::device {

inline constexpr int kFiniteThreads = 256;
inline constexpr int kFiniteWarps = kFiniteThreads / kWarpSize;

struct FiniteWorkspace {
  bool aligned;  // aligned_rows(tokens)
  int* outside;  // [heads, blocks of a head, kFiniteWarps], 1 where a warp met a number outside
};

// Grid: x = share of the tokens, y = head.
SVDQ_KERNEL(kFiniteThreads) finite_kernel(FiniteParams p, FiniteWorkspace workspace) {
  const int eights = p.head_dim / 8;
  const int64_t count = p.tokens.num_tokens * eights, step = int64_t{grid_x()} * kFiniteThreads;
  bool outside = false;
  for (int64_t i = int64_t{block_x()} * kFiniteThreads + thread_index(); i < count; i += step) {
    const int64_t token = i / eights, d = i % eights * 8;
    const Floats8 eight = load_eight(
        p.tokens.data, p.tokens.dtype,
        block_y() * p.tokens.head_stride + token * p.tokens.token_stride + d, workspace.aligned);
    SVDQ_UNROLL
    for (float x : eight.x) outside |= !(x <= p.limit && x >= -p.limit);  // NaN is outside, too
  }
  const uint32_t lanes = ballot(outside);
  if (lane_index() == 0) {
    const int64_t block = int64_t{block_y()} * grid_x() + block_x();
    store(&workspace.outside[block * kFiniteWarps + warp_index()], lanes != 0 ? 1 : 0);
  }
}

}  // namespace svdq::device
