// The quantizer stage: the basis of each head as bfloat16 rows, the range that the codes of each
// channel span, and the mean moved to the middle of those ranges.
//
// Ranges come from latents: of all tokens where a range is just least to most, else of an even
// sample of up to 64 runs of 64 tokens, which is searched for the range of least error. The
// search is that of the CPU backend, candidate by candidate; only sums are in another order, so a
// candidate within rounding of the best may win in its place. Every sum has a fixed order.
#pragma once

#include "kernels/pages/heads.cuh"
#include "kernels/pack/project.cuh"
#include "kernels/machine/device.cuh"
#include "kernels/pages/code_fragments.cuh"

namespace svdq::device {

inline constexpr int kFitThreads = 128;
inline constexpr int kFitTeams = kFitThreads / kLanes;  // half warps: a slot a lane
inline constexpr int kFitShares = 64;                   // of a head's runs; of a sample, its runs
inline constexpr int kMostSamples = kFitShares * kPageTokens;

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

struct CodeRange {
  float centre;
  float scale;  // distance between codes
};

SVDQ_DEVICE CodeRange full_range(float least, float most, float top) {
  return {(least + most) / 2, (most - least) / top};
}

SVDQ_DEVICE void store_range(const QuantizerParams& p, const QuantizerWorkspace& w, int channel,
                             const CodeRange& range) {
  store(&p.scale[channel], range.scale);
  store(&w.centre[channel], range.centre);
}

SVDQ_DEVICE float warp_min(float x) { return -warp_max(-x); }

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

inline constexpr int kRangeThreads = 256;
inline constexpr int kRangeWarps = kRangeThreads / kWarpSize;
inline constexpr int kCoarse = 22;  // multiples of the deviation: 0.4 .. 7.5
inline constexpr int kFine = 9;     // round the best of them

static_assert(1 + kCoarse <= kWarpSize && kFine <= kWarpSize, "a lane a candidate");

struct RangePlan {
  float latent[kMostSamples];
  float part[3][kRangeWarps];
  float error[1 + kCoarse];  // of the full range and of the coarse grid
  float fine_error[kFine];
};

// Sum of the fourth powers of the errors, times `unit`, of the latents coded in `range` with the highest
// code `top`; a warp's work. Squares would give away the few latents far out, whose tokens attention
// would then misjudge; `unit` keeps the powers of any latents within the range of a float.
SVDQ_DEVICE float coding_error(const RangePlan& s, int count, const CodeRange& range, float top,
                               float unit) {
  const float inverse = range.scale > 0.0f ? 1.0f / range.scale : 0.0f, mid = top / 2;
  float error = 0.0f;
  for (int i = lane_index(); i < count; i += kWarpSize) {
    const float x = load(&s.latent[i]) - range.centre;
    const float place = x * inverse + mid, least = place > 0.0f ? place : 0.0f;
    const float code = static_cast<float>(round_to_int(least < top ? least : top));
    const float miss = (x - (code - mid) * range.scale) * unit;
    error += (miss * miss) * (miss * miss);
  }
  return warp_sum(error);
}

// The root of the factor that makes decoded latents unbiased along the latents (kernels/params.h); a warp's work.
SVDQ_DEVICE float root_gain(const RangePlan& s, int count, const CodeRange& range, float top) {
  const float inverse = range.scale > 0.0f ? 1.0f / range.scale : 0.0f, mid = top / 2;
  float square = 0.0f, product = 0.0f;
  for (int i = lane_index(); i < count; i += kWarpSize) {
    const float x = load(&s.latent[i]) - range.centre;
    const float place = x * inverse + mid, least = place > 0.0f ? place : 0.0f;
    const float code = static_cast<float>(round_to_int(least < top ? least : top));
    square += x * x;
    product += x * (code - mid) * range.scale;
  }
  square = warp_sum(square);
  product = warp_sum(product);
  float gain = product > 0.0f ? square / product : 1.0f;
  gain = gain > 1 / kLargestGain ? gain : 1 / kLargestGain;
  return square_root(gain < kLargestGain ? gain : kLargestGain);
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

// The error of candidate `lane`, as far as there are any.
SVDQ_DEVICE float candidate_error(const float* errors, int candidates) {
  return lane_index() < candidates ? load(&errors[lane_index()]) : int_as_float(0x7f800000u);
}

// The lane of the least number, of equals the first. All lanes get the same answer, NaN or not.
SVDQ_DEVICE int first_min(float x) {
  int lane = lane_index();
  SVDQ_UNROLL
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(x, mask);
    const int other_lane = shuffle_xor(lane, mask);
    if (other < x || (other == x && other_lane < lane)) x = other, lane = other_lane;
  }
  return shuffle(lane, 0);
}

// Multiple `i` of the coarse grid.
SVDQ_DEVICE float coarse_multiple(int i) {
  float multiple = 0.4f;
  for (int k = 0; k < i; ++k) multiple *= 1.15f;
  return multiple;
}
SVDQ_DEVICE float fine_multiple(float coarse, int i) {
  return coarse * (1.0f + 0.03f * static_cast<float>(i - kFine / 2));
}

// Least, most, mean and standard deviation of the latents, which are read into shared memory.
struct Spread {
  float least, most, mean, deviation;
};
SVDQ_DEVICE Spread load_latents(RangePlan& s, const float* latents, int count) {
  const float infinity = int_as_float(0x7f800000u);
  float sum = 0.0f, least = infinity, most = -infinity;
  for (int i = thread_index(); i < count; i += kRangeThreads) {
    const float x = load(&latents[i]);
    store(&s.latent[i], x);
    sum += x;
    least = x < least ? x : least;
    most = x > most ? x : most;
  }
  sum = warp_sum(sum);
  least = warp_min(least);
  most = warp_max(most);
  if (lane_index() == 0) {
    store(&s.part[0][warp_index()], sum);
    store(&s.part[1][warp_index()], least);
    store(&s.part[2][warp_index()], most);
  }
  sync_threads();
  sum = 0.0f;
  for (int warp = 0; warp < kRangeWarps; ++warp) {
    const float low = load(&s.part[1][warp]), high = load(&s.part[2][warp]);
    sum += load(&s.part[0][warp]);
    least = low < least ? low : least;
    most = high > most ? high : most;
  }
  const float mean = sum / static_cast<float>(count);
  float squares = 0.0f;
  for (int i = thread_index(); i < count; i += kRangeThreads) {
    const float x = load(&s.latent[i]) - mean;
    squares += x * x;
  }
  squares = warp_sum(squares);
  sync_threads();  // all have read the sums
  if (lane_index() == 0) store(&s.part[0][warp_index()], squares);
  sync_threads();
  squares = 0.0f;
  for (int warp = 0; warp < kRangeWarps; ++warp) squares += load(&s.part[0][warp]);
  return {least, most, mean, square_root(squares / static_cast<float>(count))};
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
