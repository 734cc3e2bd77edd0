// The quantizer stage: the basis of each head as bfloat16 rows, the range that the codes of each
// channel span, and the mean moved to the middle of those ranges.
//
// Ranges come from latents: of all tokens where a range is just least to most, else of an even
// sample of up to 64 runs of 64 tokens, which is searched for the range of least error. The
// search is that of the CPU backend, candidate by candidate; only sums are in another order, so a
// candidate within rounding of the best may win in its place. Every sum has a fixed order.
#pragma once

#include "kernels/fit/range.cuh"
#include "kernels/pages/heads.cuh"
#include "kernels/pack/project.cuh"
#include "kernels/machine/device.cuh"
#include "kernels/pages/code_fragments.cuh"

namespace svdq::device {

inline constexpr int kFitThreads = 128;
inline constexpr int kFitTeams = kFitThreads / kLanes;  // half warps: a slot a lane
struct QuantizerWorkspace {
  TokenRows keys;
  int64_t num_chunks;
  int shares;         // min(num_chunks, kFitShares)
  int first_head;     // of this launch
  int first_channel;  // of first_head
  float* latents;     // [channels of the launch, shares * 64], where ranges are searched for
  float* least;       // [R, shares] of a share of the runs, where they are not
  float* most;        // likewise
  float* centre;      // [R] of the ranges
};

// Rows of the basis. Grid: x = 8 numbers a thread, y = head.
SVDQ_KERNEL(kFitThreads) basis_kernel(QuantizerParams p, HeadTable heads) {
  const int dim = p.layout.head_dim;
  const HeadPlan head = head_plan(heads, block_y());
  const int i = block_x() * kFitThreads + thread_index();
  if (i >= head.rank() * dim / 8) return;
  const Floats8 x =
      load_eight(p.components, DataType::kFloat32, int64_t{block_y()} * dim * dim + i * 8, true);
  Words4 words;
  SVDQ_UNROLL
  for (int k = 0; k < 4; ++k) words.word[k] = pack_bfloat162(x.x[2 * k], x.x[2 * k + 1]);
  store(reinterpret_cast<Words4*>(p.basis + int64_t{head.first_channel} * dim) + i, words);
}

template <int kDim>
struct LatentPlan {
  RowPlan<kDim> rows;
  float least[kDim], most[kDim];  // so far; a channel belongs to one half warp
};

// Least and most of 16 slots join those so far. `latent` counts where `counts` is set.
template <int kDim>
SVDQ_DEVICE void join_ends(LatentPlan<kDim>& s, int channel, float latent, bool counts,
                           bool first) {
  const uint32_t members = 0xffffu << (lane_index() & kLanes);
  const float infinity = int_as_float(0x7f800000u);
  float least = counts ? latent : infinity, most = counts ? latent : -infinity;
  SVDQ_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const float other_min = shuffle_xor(least, mask, members),
                other_max = shuffle_xor(most, mask, members);
    least = other_min < least ? other_min : least;
    most = other_max > most ? other_max : most;
  }
  if (lane_index() % kLanes > 0) return;
  if (!first) {
    const float before_min = load(&s.least[channel]), before_max = load(&s.most[channel]);
    least = before_min < least ? before_min : least;
    most = before_max > most ? before_max : most;
  }
  store(&s.least[channel], least);
  store(&s.most[channel], most);
}

// Latents of one run, 16 slots at a time: each half warp takes 4 channels, a lane a slot.
template <int kDim, bool kSearch>
SVDQ_DEVICE void project_chunk(LatentPlan<kDim>& s, const QuantizerParams& p,
                               const QuantizerWorkspace& w, const HeadPlan& head, int head_index,
                               int64_t run, bool first) {
  const int dim = p.layout.head_dim, lane = lane_index() % kLanes;
  const int64_t rest = w.keys.source.num_tokens - run * kPageTokens;
  const PageSpan span{0, run * kPageTokens, 0,
                      static_cast<int>(rest < kPageTokens ? rest : kPageTokens)};
  const int64_t capacity = int64_t{w.shares} * kPageTokens;
  for (int group = 0; group * kLanes < span.count; ++group) {
    load_rows(s.rows, w.keys, head_index, dim, {span, run, group},
              p.mean + int64_t{head_index} * dim, kFitThreads);
    sync_threads();
    const int slot = group * kLanes + lane;
    for (int j = thread_index() / kLanes * 4; j < head.rank(); j += kFitTeams * 4) {
      const int64_t channel = head.first_channel + j;
      const bool counts = span.has(slot);
      Floats4 latent = {};
      if (counts) latent = project_row(s.rows, lane, p.basis + channel * dim, dim);
      SVDQ_UNROLL
      for (int k = 0; k < 4; ++k) {
        if constexpr (kSearch) {
          float* to = w.latents + (channel - w.first_channel + k) * capacity;
          if (counts) store(&to[int64_t{block_x()} * kPageTokens + slot], latent.x[k]);
        } else {
          join_ends(s, j + k, latent.x[k], counts, first && group == 0);
        }
      }
    }
    sync_threads();
  }
}

// Grid: x = share of the runs, y = head of the launch.
template <int kDim, bool kSearch>
SVDQ_KERNEL(kFitThreads)
latents_kernel(QuantizerParams p, QuantizerWorkspace w, HeadTable heads) {
  LatentPlan<kDim>& s = shared_memory<LatentPlan<kDim>>();
  const int head_index = w.first_head + block_y();
  const HeadPlan head = head_plan(heads, head_index);
  if constexpr (kSearch) {
    const int64_t run = block_x() * w.num_chunks / w.shares;
    project_chunk<kDim, true>(s, p, w, head, head_index, run, true);
  } else {
    for (int64_t run = block_x(); run < w.num_chunks; run += w.shares)
      project_chunk<kDim, false>(s, p, w, head, head_index, run, run == block_x());
    for (int j = thread_index(); j < head.rank(); j += kFitThreads) {
      const int64_t at = (int64_t{head.first_channel} + j) * w.shares + block_x();
      store(&w.least[at], load(&s.least[j]));
      store(&w.most[at], load(&s.most[j]));
    }
  }
}

SVDQ_DEVICE void store_range(const QuantizerParams& p, const QuantizerWorkspace& w, int channel,
                             const CodeRange& range) {
  store(&p.scale[channel], range.scale);
  store(&w.centre[channel], range.centre);
}

// Ranges from least to most. Grid: x = 4 channels, y = head; a warp a channel.
SVDQ_KERNEL(kFitThreads)
full_range_kernel(QuantizerParams p, QuantizerWorkspace w, HeadTable heads) {
  const HeadPlan head = head_plan(heads, block_y());
  const int j = block_x() * (kFitThreads / kWarpSize) + warp_index();
  if (j >= head.rank()) return;
  const int channel = head.first_channel + j;
  float least = int_as_float(0x7f800000u), most = -least;
  for (int share = lane_index(); share < w.shares; share += kWarpSize) {
    const float low = load(&w.least[int64_t{channel} * w.shares + share]),
                high = load(&w.most[int64_t{channel} * w.shares + share]);
    least = low < least ? low : least;
    most = high > most ? high : most;
  }
  least = warp_min(least);
  most = warp_max(most);
  const float top = static_cast<float>((1 << channel_width(head, j)) - 1);
  if (lane_index() == 0) store_range(p, w, channel, full_range(least, most, top));
}

// Writes the range of a channel of least error, with scale and row of the basis times the root of its gain; a warp's
// work. `component` is the row before it is rounded.
SVDQ_DEVICE void store_unbiased(const RangePlan& s, const QuantizerParams& p,
                                const QuantizerWorkspace& w, int channel, const CodeRange& range,
                                int count, float top, const float* component) {
  constexpr float kTop = (1 << kUnbiasedWidth) - 1;
  const float root = top <= kTop ? root_gain(s, count, range, top) : 1.0f;
  if (lane_index() == 0) store_range(p, w, channel, {range.centre / root, range.scale * root});
  const int dim = p.layout.head_dim;
  for (int d = lane_index(); d < dim; d += kWarpSize)
    store(&p.basis[int64_t{channel} * dim + d], float_to_bfloat16(load(&component[d]) * root));
}

// Ranges of least error of the latents in scratch: the full range, then multiples of the standard
// deviation about the mean on a coarse and, round the best of these, a fine geometric grid; of
// equals the first. Grid: x = channel, y = head of the launch; the candidates are spread over the
// warps.
SVDQ_KERNEL(kRangeThreads)
search_range_kernel(QuantizerParams p, QuantizerWorkspace w, HeadTable heads, int count) {
  RangePlan& s = shared_memory<RangePlan>();
  const HeadPlan head = head_plan(heads, w.first_head + block_y());
  if (block_x() >= head.rank()) return;
  const int channel = head.first_channel + block_x();
  const float top = static_cast<float>((1 << channel_width(head, block_x())) - 1);
  const int64_t capacity = int64_t{w.shares} * kPageTokens;
  const Spread spread = load_latents(s, w.latents + (channel - w.first_channel) * capacity, count);
  const CodeRange full = full_range(spread.least, spread.most, top);
  const float width = spread.most - spread.least, unit = width > 0.0f ? 1.0f / width : 0.0f;
  const auto clipped = [&](float multiple) {
    return CodeRange{spread.mean, 2 * multiple * spread.deviation / top};
  };

  for (int i = warp_index(); i <= kCoarse; i += kRangeWarps) {
    const CodeRange range = i == 0 ? full : clipped(coarse_multiple(i - 1));
    const float sum = coding_error(s, count, range, top, unit);
    if (lane_index() == 0) store(&s.error[i], sum);
  }
  sync_threads();
  const float error = candidate_error(s.error, 1 + kCoarse);
  const int best = first_min(error);
  const int64_t row = int64_t{w.first_head + block_y()} * p.layout.head_dim + block_x();
  const float* component = p.components + row * p.layout.head_dim;
  if (best == 0) {
    if (warp_index() == 0) store_unbiased(s, p, w, channel, full, count, top, component);
    return;
  }

  const float coarse = coarse_multiple(best - 1);
  for (int i = warp_index(); i < kFine; i += kRangeWarps) {
    const float sum = coding_error(s, count, clipped(fine_multiple(coarse, i)), top, unit);
    if (lane_index() == 0) store(&s.fine_error[i], sum);
  }
  sync_threads();
  if (warp_index() > 0) return;
  const float fine_error = candidate_error(s.fine_error, kFine);
  const int fine = first_min(fine_error);
  const bool better = shuffle(fine_error, fine) < shuffle(error, best);
  const CodeRange range = clipped(better ? fine_multiple(coarse, fine) : coarse);
  store_unbiased(s, p, w, channel, range, count, top, component);
}

// mean + the centres' share of every row of the basis. Grid: x = channels of a key, y = head.
SVDQ_KERNEL(kFitThreads)
centred_mean_kernel(QuantizerParams p, QuantizerWorkspace w, HeadTable heads) {
  const int dim = p.layout.head_dim, d = block_x() * kFitThreads + thread_index();
  if (d >= dim) return;
  const HeadPlan head = head_plan(heads, block_y());
  const int64_t at = int64_t{block_y()} * dim + d;
  float sum = load(&p.mean[at]);
  for (int64_t j = head.first_channel; j < head.first_channel + head.rank(); ++j)
    sum = fused(load(&w.centre[j]), bfloat16_to_float(load(&p.basis[j * dim + d])), sum);
  store(&p.centred_mean[at], sum);
}

}  // namespace svdq::device
