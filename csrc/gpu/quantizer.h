// The quantizer stage on a GPU: basis, ranges and centred mean, without waiting for the device.
#pragma once

#include "csrc/gpu/project.h"
#include "kernels/fit/quantizer.cuh"

namespace svdq::gpu {

// Widest head of heads first .. last - 1.
inline int max_channels(const LayoutView& layout, int first, int last) {
  int most = 0;
  for (int h = first; h < last; ++h) most = std::max(most, layout.heads[h].rank());
  return most;
}

// Searches ranges for as many heads at once as have `scratch` latents, one at least.
template <int kDim, typename Stream>
void search_ranges(const QuantizerParams& p, device::QuantizerWorkspace w,
                   const device::HeadTable& heads, int64_t scratch, Stream& stream) {
  const LayoutView& layout = p.layout;
  const int64_t capacity = int64_t{w.shares} * kPageTokens;
  const int64_t max_rank =
      std::max<int64_t>(scratch / capacity, max_channels(layout, 0, layout.num_heads));
  // A sample of fewer runs than there are leaves out the last one, which may be short.
  const int count = static_cast<int>(std::min(p.keys.num_tokens, capacity));
  w.latents = stream.template allocate<float>(std::min<int64_t>(max_rank, layout.rank) * capacity);
  for (int first = 0, last; first < layout.num_heads; first = last) {
    int rank = 0;
    for (last = first; last < layout.num_heads; ++last) {
      if (rank + layout.heads[last].rank() > max_rank) break;
      rank += layout.heads[last].rank();
    }
    if (rank == 0) continue;
    w.first_head = first;
    w.first_channel = layout.heads[first].first_channel;
    stream.launch("latents",
                  {w.shares, last - first, 1, device::kFitThreads,
                   static_cast<int>(sizeof(device::LatentPlan<kDim>))},
                  device::latents_kernel<kDim, true>, p, w, heads);
    stream.launch("search_range",
                  {max_channels(layout, first, last), last - first, 1, device::kRangeThreads,
                   static_cast<int>(sizeof(device::RangePlan))},
                  device::search_range_kernel, p, w, heads, count);
  }
}

template <int kDim, typename Stream>
void full_ranges(const QuantizerParams& p, device::QuantizerWorkspace w,
                 const device::HeadTable& heads, Stream& stream) {
  const LayoutView& layout = p.layout;
  w.least = stream.template allocate<float>(int64_t{layout.rank} * w.shares);
  w.most = stream.template allocate<float>(int64_t{layout.rank} * w.shares);
  stream.launch("latents",
                {w.shares, layout.num_heads, 1, device::kFitThreads,
                 static_cast<int>(sizeof(device::LatentPlan<kDim>))},
                device::latents_kernel<kDim, false>, p, w, heads);
  constexpr int kChannels = device::kFitThreads / device::kWarpSize;
  const int blocks =
      static_cast<int>(ceil_div(max_channels(layout, 0, layout.num_heads), kChannels));
  stream.launch("full_range", {blocks, layout.num_heads, 1, device::kFitThreads, 0},
                device::full_range_kernel, p, w, heads);
}

template <int kDim, typename Stream>
void fit_quantizer_class(const QuantizerParams& p, int64_t scratch, Stream& stream) {
  check_aligned(p.components, "components");
  check_aligned(p.basis, "basis");
  const LayoutView& layout = p.layout;
  const int dim = layout.head_dim, heads = layout.num_heads;
  const device::HeadTable table = head_table(layout);
  device::QuantizerWorkspace w{};
  w.num_chunks = ceil_div(p.keys.num_tokens, kPageTokens);
  w.shares = static_cast<int>(std::min<int64_t>(w.num_chunks, device::kFitShares));
  w.centre = stream.template allocate<float>(layout.rank);
  if (layout.rank > 0) {
    w.keys = token_rows(p.keys, p.rope, p.position, w.num_chunks, stream);
    const int64_t eights = int64_t{max_channels(layout, 0, heads)} * dim / 8;
    stream.launch(
        "basis",
        {static_cast<int>(ceil_div(eights, device::kFitThreads)), heads, 1, device::kFitThreads, 0},
        device::basis_kernel, p, table);
    p.clip ? search_ranges<kDim>(p, w, table, scratch, stream)
           : full_ranges<kDim>(p, w, table, stream);
  }
  stream.launch(
      "centred_mean",
      {static_cast<int>(ceil_div(dim, device::kFitThreads)), heads, 1, device::kFitThreads, 0},
      device::centred_mean_kernel, p, w, table);
}

template <typename Stream>
void fit_quantizer(const QuantizerParams& p, Stream& stream, int64_t scratch) {
  with_dim_class(p.layout.head_dim,
                 [&]<int kDim>() { fit_quantizer_class<kDim>(p, scratch, stream); });
}

template <typename Stream>
void fit_quantizer(const QuantizerParams& p, Stream& stream) {
  fit_quantizer(p, stream, kScratchNumbers);
}

}  // namespace svdq::gpu
