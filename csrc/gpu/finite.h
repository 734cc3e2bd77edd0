// The check of inputs on a GPU. It waits for its answer, so it is for prefill alone.
#pragma once

#include <vector>

#include "csrc/gpu/stream.h"
#include "kernels/fit/finite.cuh"

namespace svdq::gpu {

// True if every number of `source` is finite and at most `limit` in magnitude.
template <typename Stream>
bool all_within(const TokenSource& source, int num_heads, int head_dim, float limit,
                Stream& stream) {
  constexpr int kBlocksPerSm = 8;  // as many threads as a multiprocessor holds
  if (source.num_tokens == 0 || num_heads == 0) return true;
  const int64_t most = ceil_div(source.num_tokens * head_dim / 8, device::kCheckThreads);
  const int64_t wanted = ceil_div(int64_t{kBlocksPerSm} * stream.limits().num_sms, num_heads);
  const int blocks = static_cast<int>(std::min(most, wanted));
  std::vector<int> outside(int64_t{num_heads} * blocks * device::kCheckWarps);
  const auto count = static_cast<int64_t>(outside.size());

  const device::CheckParams p{source, head_dim, limit, device::aligned_rows(source),
                              stream.template allocate<int>(count)};
  stream.launch("within", {blocks, num_heads, 1, device::kCheckThreads, 0}, device::within_kernel,
                p);
  stream.read(outside.data(), p.outside, count);
  return std::find(outside.begin(), outside.end(), 1) == outside.end();
}

}  // namespace svdq::gpu
