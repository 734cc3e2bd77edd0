// The covariance stage: mean and covariance of the un-rotated keys of every head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Tokens whose products are summed in one float buffer; more would lose digits, fewer cost memory.
inline constexpr int64_t kCovarianceRuns = 64;

// A tile of the Gram matrix: narrow, as half of the tiles are not needed.
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

// Mean and covariance from the partial sums of one head, taken about `shift`: cov = G / T - delta
// delta^T.
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
  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  const int64_t num_partial = (num_runs + kCovarianceRuns - 1) / kCovarianceRuns;
  const RopeTable table(p.rope, p.position, num_runs);
  const int64_t partial_size = int64_t{p.head_dim} * (p.head_dim + 1);
  const int64_t rows_size = int64_t{kPageTokens} * p.head_dim;
  const AlignedBuffer partials(sizeof(float) * p.num_heads * num_partial * partial_size);
  const AlignedBuffer shifts(sizeof(float) * p.num_heads * p.head_dim);
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * rows_size);
  const auto run_length = [&](int64_t run) {
    return static_cast<int>(std::min<int64_t>(kPageTokens, p.keys.num_tokens - run * kPageTokens));
  };

  // A mean far from zero would cancel the covariance's digits: sum about the mean of the first run.
  for_each_task(executor, p.num_heads, [&](int64_t head, int worker) {
    float* rows = scratch.as<float>() + worker * rows_size;
    float* shift = shifts.as<float>() + head * p.head_dim;
    load_rows(p.keys, static_cast<int>(head), p.head_dim, 0, run_length(0), table, 0, 0, nullptr,
              rows);
    for (int d = 0; d < p.head_dim; ++d) {
      float sum = 0;
      for (int t = 0; t < run_length(0); ++t) sum += rows[t * p.head_dim + d];
      shift[d] = sum / static_cast<float>(run_length(0));
    }
  });
  for_each_task(executor, p.num_heads * num_partial, [&](int64_t task, int worker) {
    const int head = static_cast<int>(task / num_partial);
    const int64_t first = task % num_partial * kCovarianceRuns;
    float* rows = scratch.as<float>() + worker * rows_size;
    float* gram = partials.as<float>() + task * partial_size;
    std::memset(gram, 0, sizeof(float) * partial_size);
    for (int64_t run = first; run < std::min(first + kCovarianceRuns, num_runs); ++run) {
      load_rows(p.keys, head, p.head_dim, run * kPageTokens, run_length(run), table, run, 0,
                shifts.as<float>() + int64_t{head} * p.head_dim, rows);
      add_gram(rows, p.head_dim, gram, gram + int64_t{p.head_dim} * p.head_dim);
    }
  });
  for_each_task(executor, p.num_heads, [&](int64_t head, int) {
    finish_covariance(partials.as<float>() + head * num_partial * partial_size, num_partial,
                      p.head_dim, p.keys.num_tokens, shifts.as<float>() + head * p.head_dim,
                      p.mean + head * p.head_dim, p.covariance + head * p.head_dim * p.head_dim);
  });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
