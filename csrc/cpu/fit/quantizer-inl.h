// The quantizer stage: the range of every channel, given the eigenvectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/core/scalar.h"
#include "csrc/cpu/fit/range-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/pack/token_rows-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Largest sample of a head that the search uses, in blocks of 64 tokens; the largest number of tasks for a head.
inline constexpr int64_t kSampleBlocks = 64;

// Memory of a head's fit; rank and padding are those of the widest head.
struct QuantizerScratch {
  float* basis_t;   // [D, padded_rank]
  float* channels;  // [rank, capacity], the sampled latents by channel
  float* extremes;  // [kSampleBlocks, 2, padded_rank], smallest and largest latents by task
  Range* ranges;    // [rank]
  int64_t capacity;
};

// Extremes of the latents of a task's blocks and, if ranges are searched, the latents themselves. rows [64, D] and
// latent [64, padded_rank] are a worker's.
inline void gather_latents(const QuantizerParams& p, const RopeTable& table, int h, int64_t task,
                           int64_t num_tasks, const QuantizerScratch& s, float* rows,
                           float* latent) {
  const int rank = p.layout.heads[h].rank(), dim = p.layout.head_dim, padded = padded_rank(rank);
  const int64_t num_blocks = ceil_div(p.keys.num_tokens, kPageTokens);
  // Take one block a task, an even sample, or all blocks from this task's to the next one's.
  const int64_t first = task * num_blocks / num_tasks;
  const int64_t end = p.clip ? first + 1 : (task + 1) * num_blocks / num_tasks;
  float* low = s.extremes + task * 2 * padded;
  float* high = low + padded;
  for (int64_t block = first; block < end; ++block) {
    // Project the block.
    const TokenBlock tokens = token_block(p.keys, block);
    load_rows(p.keys, h, dim, tokens, table, p.mean + int64_t{h} * dim, rows);
    project_rows(rows, s.basis_t, rank, dim, latent);

    // Update the extremes.
    for (int j = 0; j < padded; j += kVecLanes) {
      F32 channel_min = block == first ? load<F32>(latent + j) : load<F32>(low + j);
      F32 channel_max = block == first ? channel_min : load<F32>(high + j);
      for (int t = 0; t < tokens.count; ++t) {
        const F32 x = load<F32>(latent + t * padded + j);
        channel_min = min(channel_min, x);
        channel_max = max(channel_max, x);
      }
      store(low + j, channel_min);
      store(high + j, channel_max);
    }
    if (!p.clip) continue;
    // Store the latents by channel. Blocks before the last are full, so the sample has no gaps.
    for_each_channel_block(
        latent, rank, [&](int, int, const float* from) { return load<F32>(from); },
        [&](int j, int t, const F32* v) {
          for (int i = 0; i < std::min(kVecLanes, rank - j); ++i)
            store(s.channels + (j + i) * s.capacity + task * kPageTokens + t, v[i]);
        });
  }
}

// Rounds the basis of head h and finds the ranges of its channels.
inline void fit_head_quantizer(const QuantizerParams& p, const RopeTable& table, int h,
                               const QuantizerScratch& s, float* workers, int64_t worker_size,
                               const Executor& executor) {
  const HeadPlan& head = p.layout.heads[h];
  const int rank = head.rank(), dim = p.layout.head_dim, padded = padded_rank(rank);
  const float* mean = p.mean + int64_t{h} * dim;
  uint16_t* basis = p.basis + int64_t{head.first_channel} * dim;
  for (int64_t i = 0; i < int64_t{rank} * dim; ++i)
    basis[i] = float_to_bfloat16(p.components[int64_t{h} * dim * dim + i]);
  transpose_basis(basis, rank, dim, s.basis_t);

  const int64_t num_blocks = ceil_div(p.keys.num_tokens, kPageTokens);
  const int64_t num_tasks = std::min(num_blocks, kSampleBlocks);
  for_each_task(executor, rank ? num_tasks : 0, [&](int64_t task, int worker) {
    float* rows = workers + worker * worker_size;
    gather_latents(p, table, h, task, num_tasks, s, rows, rows + kPageTokens * dim);
  });
  // Only the last block may be partial, and a sample that has it ends with it.
  const int64_t last_block = (num_tasks - 1) * num_blocks / num_tasks;
  const int64_t n = (num_tasks - 1) * kPageTokens +
                    std::min<int64_t>(kPageTokens, p.keys.num_tokens - last_block * kPageTokens);
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
    s.ranges[j] = {(low + high) / 2, (high - low) / (2 * mid_code(width))};
  });

  // Move the mean to the centres of the ranges.
  float* centred = p.centred_mean + int64_t{h} * dim;
  for (int d = 0; d < dim; ++d) centred[d] = mean[d];
  for (int j = 0; j < rank; ++j) {
    // Multiply scale and row by the root of the gain.
    const Range& range = s.ranges[j];
    const float root = std::sqrt(range.gain), centre = range.centre / root;
    const float* component = p.components + (int64_t{h} * dim + j) * dim;
    p.scale[head.first_channel + j] = range.scale * root;
    for (int d = 0; d < dim; ++d) {
      const uint16_t number = float_to_bfloat16(component[d] * root);
      basis[int64_t{j} * dim + d] = number;
      centred[d] += centre * bfloat16_to_float(number);
    }
  }
}

// Fits one head at a time, its blocks and then its channels in parallel: a single head keeps all workers busy, and
// memory holds the latents of one head only.
inline void fit_quantizer(const QuantizerParams& p, const Executor& executor) {
  const int64_t num_blocks = ceil_div(p.keys.num_tokens, kPageTokens);
  const RopeTable table(p.rope, p.position, num_blocks);
  int rank = 0;
  for (int h = 0; h < p.layout.num_heads; ++h) rank = std::max(rank, p.layout.heads[h].rank());
  const int64_t dim = p.layout.head_dim, padded = padded_rank(rank);
  const int64_t capacity = std::min(num_blocks, kSampleBlocks) * kPageTokens;
  const int64_t worker_size = round_up(kPageTokens * (dim + padded), kLanes);
  const int64_t basis_t_size = round_up(dim * padded, kLanes);
  const int64_t channels_size = p.clip ? rank * capacity : 0;
  const AlignedBuffer workers(sizeof(float) * executor.workers() * worker_size);
  const AlignedBuffer shared(sizeof(float) *
                             (basis_t_size + channels_size + kSampleBlocks * 2 * padded));
  const AlignedBuffer ranges(sizeof(Range) * rank);
  float* basis_t = shared.as<float>();
  const QuantizerScratch scratch{basis_t, basis_t + basis_t_size,
                                 basis_t + basis_t_size + channels_size, ranges.as<Range>(),
                                 capacity};
  for (int h = 0; h < p.layout.num_heads; ++h)
    fit_head_quantizer(p, table, h, scratch, workers.as<float>(), worker_size, executor);
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
