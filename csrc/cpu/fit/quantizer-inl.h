// The quantizer stage: the range of every channel, once the eigenvectors are known.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/core/scalar.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

struct Range {
  float centre;
  float scale;  // distance between codes
};

// All lanes of a vector count.
struct AllLanes {};
inline F32 select_lanes(AllLanes, F32 v, F32) { return v; }

// Calls fn(vector, lanes) for n latents, whose memory ends on a whole vector; `lanes` says which
// ones count.
template <typename Fn>
inline void for_each_vector(const float* latent, int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kVecLanes <= n; i += kVecLanes) fn(load<F32>(latent + i), AllLanes{});
  if (i < n) fn(load<F32>(latent + i), (1u << (n - i)) - 1);
}

// Sum of the fourth powers of the errors, times `unit`, of n latents coded in `range` with the highest
// code `top`. Squares would give away the few latents far out, whose tokens attention would then
// misjudge; `unit` keeps the powers of any latents within the range of a float.
inline float coding_error(const float* latent, int64_t n, Range range, float top, float unit) {
  const F32 inverse = splat(range.scale > 0 ? 1.0f / range.scale : 0.0f);
  const F32 mid = splat(top / 2);
  F32 error{};
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    const F32 x = v - range.centre;
    const F32 code = min(max(round_even(x * inverse + mid), F32{}), splat(top));
    const F32 miss = select_lanes(lanes, x - (code - mid) * range.scale, F32{});
    const F32 square = (miss * unit) * (miss * unit);
    error += square * square;
  });
  return reduce_add(error);
}

// The range of least error: multiples of the standard deviation about the mean on a coarse,
// then a fine geometric grid, and the full range from min to max. Not a number if a latent is not
// finite.
inline Range search_range(const float* latent, int64_t n, int width) {
  const float top = static_cast<float>((1 << width) - 1);
  F32 sum{}, nothing{}, low = splat(latent[0]), high = low;
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    sum += select_lanes(lanes, v, F32{});
    nothing += select_lanes(lanes, v, F32{}) * 0.0f;
    low = min(low, select_lanes(lanes, v, low));
    high = max(high, select_lanes(lanes, v, high));
  });
  const float none = reduce_add(nothing);
  if (none != 0.0f) return {none, none};
  const float mean = reduce_add(sum) / static_cast<float>(n);
  const float least = -reduce_max(-low), most = reduce_max(high);
  F32 squares{};
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    const F32 x = select_lanes(lanes, v - mean, F32{});
    squares += x * x;
  });
  const float deviation = std::sqrt(reduce_add(squares) / static_cast<float>(n));

  Range best{(least + most) / 2, (most - least) / top};
  const float unit = most > least ? 1.0f / (most - least) : 0.0f;
  float best_error = coding_error(latent, n, best, top, unit);
  const auto attempt = [&](float multiple) {
    const Range range{mean, 2 * multiple * deviation / top};
    const float error = coding_error(latent, n, range, top, unit);
    const bool better = error < best_error;
    if (better) best = range, best_error = error;
    return better;
  };
  float centre_multiple = 0;
  float multiple = 0.4f;
  for (int i = 0; i < 22; ++i, multiple *= 1.15f) {  // 0.4 .. 7.5 standard deviations
    if (attempt(multiple)) centre_multiple = multiple;
  }
  for (int i = -4; i <= 4 && centre_multiple > 0; ++i)
    attempt(centre_multiple * (1 + 0.03f * static_cast<float>(i)));
  return best;
}

// Longest sample of a head that the search looks at, in runs of 64 tokens; also the tasks that the
// runs of a head are spread over.
inline constexpr int64_t kSampleRuns = 64;

// Memory of a head's fit; rank and padding are those of the widest head.
struct QuantizerScratch {
  float* columns;   // [D, padded_rank]
  float* channels;  // [rank, capacity], the sampled latents by channel
  float* extremes;  // [kSampleRuns, 2, padded_rank], least and largest latents by task
  Range* ranges;    // [rank]
  int64_t capacity;
};

// Latents of the runs first, first + step, ... below `end`: their extremes and, if they are to be
// searched, all of them. rows and latent are a worker's.
inline void gather_latents(const QuantizerParams& p, const RopeTable& table, int h, int64_t task,
                           int64_t num_tasks, const QuantizerScratch& s, float* rows,
                           float* latent) {
  const int rank = p.layout.heads[h].rank(), dim = p.layout.head_dim, padded = padded_rank(rank);
  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  // An even sample, of one run a task, or all runs between this task's and the next.
  const int64_t first = task * num_runs / num_tasks;
  const int64_t end = p.clip ? first + 1 : (task + 1) * num_runs / num_tasks;
  float* low = s.extremes + task * 2 * padded;
  float* high = low + padded;
  for (int64_t run = first; run < end; ++run) {
    const int count =
        static_cast<int>(std::min<int64_t>(kPageTokens, p.keys.num_tokens - run * kPageTokens));
    load_rows(p.keys, h, dim, run * kPageTokens, count, table, run, 0, p.mean + int64_t{h} * dim,
              rows);
    project_rows(rows, s.columns, rank, dim, latent);
    for (int j = 0; j < padded; j += kVecLanes) {
      F32 least = run == first ? load<F32>(latent + j) : load<F32>(low + j);
      F32 most = run == first ? least : load<F32>(high + j);
      for (int t = 0; t < count; ++t) {
        const F32 x = load<F32>(latent + t * padded + j);
        least = min(least, x);
        most = max(most, x);
      }
      store(low + j, least);
      store(high + j, most);
    }
    if (!p.clip) continue;
    // Runs before the last are whole, so the sample has no gaps.
    for_each_channel_block(
        latent, rank, [&](int, int, const float* from) { return load<F32>(from); },
        [&](int j, int t, const F32* v) {
          for (int i = 0; i < std::min(kVecLanes, rank - j); ++i)
            store(s.channels + (j + i) * s.capacity + task * kPageTokens + t, v[i]);
        });
  }
}

inline void fit_head_quantizer(const QuantizerParams& p, const RopeTable& table, int h,
                               const QuantizerScratch& s, float* workers, int64_t worker_size,
                               const Executor& executor) {
  const HeadPlan& head = p.layout.heads[h];
  const int rank = head.rank(), dim = p.layout.head_dim, padded = padded_rank(rank);
  const float* mean = p.mean + int64_t{h} * dim;
  uint16_t* basis = p.basis + int64_t{head.first_channel} * dim;
  for (int64_t i = 0; i < int64_t{rank} * dim; ++i)
    basis[i] = float_to_bfloat16(p.components[int64_t{h} * dim * dim + i]);
  transpose_basis(basis, rank, dim, s.columns);

  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  const int64_t num_tasks = std::min(num_runs, kSampleRuns);
  for_each_task(executor, rank ? num_tasks : 0, [&](int64_t task, int worker) {
    float* rows = workers + worker * worker_size;
    gather_latents(p, table, h, task, num_tasks, s, rows, rows + kPageTokens * dim);
  });
  // A sample that has the last run has it at its end.
  const int64_t last_run = (num_tasks - 1) * num_runs / num_tasks;
  const int64_t n = (num_tasks - 1) * kPageTokens +
                    std::min<int64_t>(kPageTokens, p.keys.num_tokens - last_run * kPageTokens);
  for_each_task(executor, rank, [&](int64_t j, int) {
    const int width = channel_width(head, static_cast<int>(j));
    if (p.clip) {
      s.ranges[j] = search_range(s.channels + j * s.capacity, n, width);
      return;
    }
    float low = s.extremes[j], high = s.extremes[padded + j];
    for (int64_t task = 1; task < num_tasks; ++task) {
      low = std::min(low, s.extremes[task * 2 * padded + j]);
      high = std::max(high, s.extremes[(task * 2 + 1) * padded + j]);
    }
    s.ranges[j] = {(low + high) / 2, (high - low) / static_cast<float>((1 << width) - 1)};
  });

  float* centred = p.centred_mean + int64_t{h} * dim;
  for (int d = 0; d < dim; ++d) centred[d] = mean[d];
  for (int j = 0; j < rank; ++j) {
    p.scale[head.first_channel + j] = s.ranges[j].scale;
    for (int d = 0; d < dim; ++d) centred[d] += s.ranges[j].centre * s.columns[d * padded + j];
  }
}

// Head after head, its runs and then its channels in parallel: a single head keeps all workers
// busy, and only one head's latents are held.
inline void fit_quantizer(const QuantizerParams& p, const Executor& executor) {
  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  const RopeTable table(p.rope, p.position, num_runs);
  int rank = 0;
  for (int h = 0; h < p.layout.num_heads; ++h) rank = std::max(rank, p.layout.heads[h].rank());
  const int64_t dim = p.layout.head_dim, padded = padded_rank(rank);
  const int64_t capacity = std::min(num_runs, kSampleRuns) * kPageTokens;
  const int64_t worker_size = round_up(kPageTokens * (dim + padded), kLanes);
  const int64_t columns_size = round_up(dim * padded, kLanes);
  const int64_t channels_size = p.clip ? rank * capacity : 0;
  const AlignedBuffer workers(sizeof(float) * executor.workers() * worker_size);
  const AlignedBuffer shared(sizeof(float) *
                             (columns_size + channels_size + kSampleRuns * 2 * padded));
  const AlignedBuffer ranges(sizeof(Range) * rank);
  float* columns = shared.as<float>();
  const QuantizerScratch scratch{columns, columns + columns_size,
                                 columns + columns_size + channels_size, ranges.as<Range>(),
                                 capacity};
  for (int h = 0; h < p.layout.num_heads; ++h)
    fit_head_quantizer(p, table, h, scratch, workers.as<float>(), worker_size, executor);
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
