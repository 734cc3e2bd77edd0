// The covariance stage and its eigenvectors on a GPU. In addition to csrc/gpu/stream.h, a Stream has
//   add_gram(rows, heads, tokens, dim, gram)   gram [heads, dim, dim] += rows^T rows of each head;
//                                              rows [heads, tokens, dim]
//   eigenvectors(matrices, values, heads, dim, info)
//                                              symmetric matrices [heads, dim, dim] become their
//                                              eigenvectors, one a row, by rising eigenvalue, and
//                                              values [heads, dim] the eigenvalues; info [heads] is
//                                              0 where that succeeded
#pragma once

#include <vector>

#include "csrc/gpu/project.h"
#include "kernels/fit/covariance.cuh"

namespace svdq::gpu {

// Rows take `scratch` numbers at a time, or those of 64 tokens.
template <typename Stream>
void covariance(const CovarianceParams& p, Stream& stream, int64_t scratch) {
  constexpr int64_t kMostTokens = 4096;  // longer products gain nothing
  const int64_t row = int64_t{p.num_heads} * p.head_dim, matrices = row * p.head_dim;
  const int64_t num_chunks = ceil_div(p.keys.num_tokens, kPageTokens);
  const int64_t chunks_at_once =
      std::clamp<int64_t>(std::min(scratch / row, kMostTokens) / kPageTokens, 1, num_chunks);

  device::CovarianceWorkspace w{};
  w.keys = token_rows(p.keys, p.rope, p.position, num_chunks, stream);
  w.num_heads = p.num_heads;
  w.head_dim = p.head_dim;
  w.num_slots = static_cast<int>(chunks_at_once);
  w.shift = stream.template allocate<float>(row);
  w.delta = stream.template allocate<float>(row);
  w.sums = stream.template allocate<float>(chunks_at_once * row);
  w.rows = stream.template allocate<float>(
      std::min(chunks_at_once * kPageTokens, p.keys.num_tokens) * row);
  w.gram = stream.template allocate<float>(matrices);
  stream.launch("shift", device::shift_launch(w), device::shift_kernel, w);
  for (w.first_chunk = 0; w.first_chunk < num_chunks; w.first_chunk += chunks_at_once) {
    const int64_t runs = std::min(chunks_at_once, num_chunks - w.first_chunk);
    w.first = w.first_chunk == 0;
    w.chunk_tokens = std::min(runs * kPageTokens, p.keys.num_tokens - w.first_chunk * kPageTokens);
    stream.launch("rows", device::rows_launch(w, static_cast<int>(runs)), device::rows_kernel, w);
    stream.add_gram(w.rows, p.num_heads, w.chunk_tokens, p.head_dim, w.gram);
  }
  stream.launch("mean", device::mean_launch(w), device::mean_kernel, w, p.mean);
  stream.launch("covariance", device::covariance_launch(w), device::covariance_kernel, w,
                p.covariance);
}

// Waits for the solver's report; throws Error if a head has no eigenvectors.
template <typename Stream>
void components(const ComponentsParams& p, Stream& stream) {
  float* values = stream.template allocate<float>(int64_t{p.num_heads} * p.head_dim);
  int* info = stream.template allocate<int>(p.num_heads);
  stream.eigenvectors(p.covariance, values, p.num_heads, p.head_dim, info);
  stream.launch("components", device::components_launch(p), device::components_kernel, p, values);
  std::vector<int> found(p.num_heads);
  stream.read(found.data(), info, p.num_heads);
  for (int h = 0; h < p.num_heads; ++h) {
    SVDQ_CHECK(found[h] == 0, "no eigenvectors found for the covariance of head ", h,
               ": the solver reports ", found[h]);
  }
}

template <typename Stream>
void covariance(const CovarianceParams& p, Stream& stream) {
  covariance(p, stream, kScratchNumbers);
}

}  // namespace svdq::gpu
