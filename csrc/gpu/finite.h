// The finite stage on a GPU. It waits for its answer, so it is for prefill alone.
#pragma once

#include <vector>

#include "csrc/gpu/stream.h"
#include "kernels/fit/finite.cuh"

namespace svdq::gpu {

template <typename Stream>
bool all_finite(const FiniteParams& p, Stream& stream) {
  constexpr int kBlocksPerSm = 8;  // as many threads as a multiprocessor holds
  if (p.tokens.num_tokens == 0 || p.num_heads == 0) return true;
  const int64_t most = ceil_div(p.tokens.num_tokens * p.head_dim / 8, device::kFiniteThreads);
  const int64_t wanted = ceil_div(int64_t{kBlocksPerSm} * stream.limits().num_sms, p.num_heads);
  const int blocks = static_cast<int>(std::min(most, wanted));
  std::vector<int> outside(int64_t{p.num_heads} * blocks * device::kFiniteWarps);
  const auto count = static_cast<int64_t>(outside.size());

  const device::FiniteWorkspace workspace{device::aligned_rows(p.tokens),
                                          stream.template allocate<int>(count)};
  stream.launch("finite", {blocks, p.num_heads, 1, device::kFiniteThreads, 0},
                device::finite_kernel, p, workspace);
  stream.read(outside.data(), workspace.outside, count);
  return std::find(outside.begin(), outside.end(), 1) == outside.end();
}

}  // namespace svdq::gpu
