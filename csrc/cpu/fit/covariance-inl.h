// The covariance stage: mean and covariance of the unrotated keys of every head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/pack/outer_product-inl.h"
#include "csrc/cpu/pack/token_rows-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Blocks of 64 tokens whose products are summed in one float buffer; more would lose digits, fewer cost memory.
inline constexpr int64_t kCovarianceBlocks = 64;

// A tile of the Gram matrix: narrow, as only the tiles on and above the diagonal are needed.
inline constexpr int kGramRows = SVDQ_TARGET == 512 ? 8 : 4;
inline constexpr int kGramVecs = 2;

// gram [D, D] += rows^T rows, for the tiles on and above the diagonal; sum [D] += rows.
inline void add_gram(const float* rows, int head_dim, float* gram, float* sum) {
  for (int j = 0; j < head_dim; j += kGramVecs * kVecLanes) {
    with_count<kGramVecs>((head_dim - j) / kVecLanes, [&]<int kVecs>() {
      const int last = j + kVecs * kVecLanes;
      for (int i = 0; i < last; i += kGramRows) {
        outer_product_tile<kGramRows, kVecs, true>(rows + i, 1, head_dim, rows + j, head_dim,
                                                   kPageTokens, gram + i * head_dim + j, head_dim);
      }
    });
  }
  for (int d = 0; d < head_dim; d += kTileVecs * kVecLanes) {
    with_count<kTileVecs>((head_dim - d) / kVecLanes, [&]<int kVecs>() {
      F32 total[kVecs];
      for (int v = 0; v < kVecs; ++v) total[v] = load<F32>(sum + d + v * kVecLanes);
      for (int t = 0; t < kPageTokens; ++t) {
        for (int v = 0; v < kVecs; ++v)
          total[v] += load<F32>(rows + t * head_dim + d + v * kVecLanes);
      }
      for (int v = 0; v < kVecs; ++v) store(sum + d + v * kVecLanes, total[v]);
    });
  }
}

// Mean and covariance from the partial sums of one head about `shift`: covariance = G / T - delta delta^T, where delta
// is the mean minus `shift`.
inline void finish_covariance(const float* partial, int64_t num_partial, int head_dim,
                              int64_t num_tokens, const float* shift, float* mean,
                              float* covariance) {
  const int64_t size = int64_t{head_dim} * (head_dim + 1);
  const double inverse = 1.0 / static_cast<double>(num_tokens);
  const auto total = [&](int64_t index) {
    double sum = 0;
    for (int64_t p = 0; p < num_partial; ++p) sum += static_cast<double>(partial[p * size + index]);
    return sum * inverse;
  };
  const int64_t sums = int64_t{head_dim} * head_dim;
  for (int i = 0; i < head_dim; ++i)
    mean[i] = static_cast<float>(total(sums + i));  // delta, for now
  for (int i = 0; i < head_dim; ++i) {
    for (int j = i; j < head_dim; ++j) {
      const double value = total(int64_t{i} * head_dim + j) -
                           static_cast<double>(mean[i]) * static_cast<double>(mean[j]);
      covariance[i * head_dim + j] = covariance[j * head_dim + i] = static_cast<float>(value);
    }
  }
  for (int i = 0; i < head_dim; ++i) mean[i] += shift[i];
}

inline void covariance(const CovarianceParams& p, const Executor& executor) {
  const int64_t num_blocks = ceil_div(p.keys.num_tokens, kPageTokens);
  const int64_t num_partial = ceil_div(num_blocks, kCovarianceBlocks);
  const RopeTable table(p.rope, p.position, num_blocks);
  const int64_t partial_size = int64_t{p.head_dim} * (p.head_dim + 1);
  const int64_t rows_size = int64_t{kPageTokens} * p.head_dim;
  const AlignedBuffer partials(sizeof(float) * p.num_heads * num_partial * partial_size);
  const AlignedBuffer shifts(sizeof(float) * p.num_heads * p.head_dim);
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * rows_size);
  // Average the first block: sums about zero would lose the covariance's digits to a mean far from zero.
  for_each_task(executor, p.num_heads, [&](int64_t head, int worker) {
    float* rows = scratch.as<float>() + worker * rows_size;
    float* shift = shifts.as<float>() + head * p.head_dim;
    const TokenBlock block = token_block(p.keys, 0);
    load_rows(p.keys, static_cast<int>(head), p.head_dim, block, table, nullptr, rows);
    for (int d = 0; d < p.head_dim; ++d) {
      float sum = 0;
      for (int t = 0; t < block.count; ++t) sum += rows[t * p.head_dim + d];
      shift[d] = sum / static_cast<float>(block.count);
    }
  });
  // Sum products about that average.
  for_each_task(executor, p.num_heads * num_partial, [&](int64_t task, int worker) {
    const int head = static_cast<int>(task / num_partial);
    const int64_t first = task % num_partial * kCovarianceBlocks;
    float* rows = scratch.as<float>() + worker * rows_size;
    float* gram = partials.as<float>() + task * partial_size;
    std::memset(gram, 0, sizeof(float) * partial_size);
    for (int64_t block = first; block < std::min(first + kCovarianceBlocks, num_blocks); ++block) {
      load_rows(p.keys, head, p.head_dim, token_block(p.keys, block), table,
                shifts.as<float>() + int64_t{head} * p.head_dim, rows);
      add_gram(rows, p.head_dim, gram, gram + int64_t{p.head_dim} * p.head_dim);
    }
  });
  // Reduce the partial sums.
  for_each_task(executor, p.num_heads, [&](int64_t head, int) {
    finish_covariance(partials.as<float>() + head * num_partial * partial_size, num_partial,
                      p.head_dim, p.keys.num_tokens, shifts.as<float>() + head * p.head_dim,
                      p.mean + head * p.head_dim, p.covariance + head * p.head_dim * p.head_dim);
  });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
