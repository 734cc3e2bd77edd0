// The basis stage: the kernels around the two library calls that find principal axes.
//
// covariance: keys are read once, rotated back, and written less a shift as float rows, a bounded
// number of tokens at a time; a batched matrix product adds their Gram matrices, and the covariance
// is G / T - delta delta^T, delta being what the mean is off the shift. Rows are float and shifted,
// not the keys as they came, because keys lie far from zero: G / T and mean mean^T would be large,
// nearly equal numbers, whose difference is lost in the rounding of the sum. The shift, as on the
// CPU, is the mean of the first 64 tokens.
//
// components: eigenvectors, which come by rising eigenvalue, rotated into rows by falling variance.
#pragma once

#include "kernels/pack/project.cuh"

namespace svdq::device {

inline constexpr int kBasisThreads = 128;

struct CovarianceWorkspace {
  TokenRows keys;
  int num_heads, head_dim;
  int64_t first_chunk;   // of this launch
  int64_t chunk_tokens;  // of this launch
  int num_slots;         // runs of the first launch, the longest
  bool first;            // launch: sums begin
  float* shift;          // [H, D]
  float* rows;           // [H, chunk_tokens, D]
  float* sums;           // [num_slots, H, D] of the rows of every num_slots-th run
  float* delta;          // [H, D] mean less shift
  float* gram;           // [H, D, D]
};

struct ColumnPlan {
  alignas(16) float sum[kBasisThreads][8];
};

// Sums of a run's keys by channel. fn(row, d, x) sees channels d .. d + 7 of each, and may change
// them, before they are added; column_sum then gives the sums.
template <typename Fn>
SVDQ_DEVICE void sum_columns(ColumnPlan& s, const CovarianceWorkspace& w, int64_t run, int count,
                             const Fn& fn) {
  const int eights = w.head_dim / 8, groups = kBasisThreads / eights;
  const int d = thread_index() % eights * 8, group = thread_index() / eights;
  Floats8 sum = {};
  for (int row = group; row < count && group < groups; row += groups) {
    Floats8 x = load_channels(w.keys, block_y(), run * kPageTokens + row, run, row, d);
    fn(row, d, x);
    SVDQ_UNROLL
    for (int i = 0; i < 8; ++i) sum.x[i] += x.x[i];
  }
  Floats4* to = reinterpret_cast<Floats4*>(s.sum[thread_index()]);
  store(to, {sum.x[0], sum.x[1], sum.x[2], sum.x[3]});
  store(to + 1, {sum.x[4], sum.x[5], sum.x[6], sum.x[7]});
  sync_threads();
}

SVDQ_DEVICE float column_sum(const ColumnPlan& s, int dim, int d) {
  const int eights = dim / 8;
  float sum = 0.0f;
  for (int thread = d / 8; thread < kBasisThreads / eights * eights; thread += eights)
    sum += load(&s.sum[thread][d % 8]);
  return sum;
}

SVDQ_DEVICE int chunk_pages(const CovarianceWorkspace& w, int64_t run) {
  const int64_t rest = w.keys.source.num_tokens - run * kPageTokens;
  return static_cast<int>(rest < kPageTokens ? rest : kPageTokens);
}

// The shift, and zeros in the Gram matrix that products are added to. Grid: y = head.
SVDQ_KERNEL(kBasisThreads) shift_kernel(CovarianceWorkspace w) {
  ColumnPlan& s = shared_memory<ColumnPlan>();
  const int dim = w.head_dim, count = chunk_pages(w, 0);
  sum_columns(s, w, 0, count, [](int, int, Floats8&) {});
  for (int d = thread_index(); d < dim; d += kBasisThreads) {
    store(&w.shift[int64_t{block_y()} * dim + d],
          column_sum(s, dim, d) / static_cast<float>(count));
  }
  Floats4* gram = reinterpret_cast<Floats4*>(w.gram + int64_t{block_y()} * dim * dim);
  for (int i = thread_index(); i < dim * dim / 4; i += kBasisThreads) store(&gram[i], {});
}

// Rows of one launch's tokens, and their sums. Grid: x = run of the launch, y = head.
SVDQ_KERNEL(kBasisThreads) rows_kernel(CovarianceWorkspace w) {
  ColumnPlan& s = shared_memory<ColumnPlan>();
  const int dim = w.head_dim, head = block_y();
  const int64_t run = w.first_chunk + block_x();
  const float* shift = w.shift + int64_t{head} * dim;
  float* rows = w.rows + (head * w.chunk_tokens + int64_t{block_x()} * kPageTokens) * dim;
  sum_columns(s, w, run, chunk_pages(w, run), [&](int row, int d, Floats8& x) {
    SVDQ_UNROLL
    for (int q = 0; q < 8; q += 4) {
      const Floats4 less = load(reinterpret_cast<const Floats4*>(&shift[d + q]));
      Floats4 four;
      SVDQ_UNROLL
      for (int i = 0; i < 4; ++i) four.x[i] = x.x[q + i] -= less.x[i];
      store(reinterpret_cast<Floats4*>(&rows[int64_t{row} * dim + d + q]), four);
    }
  });
  float* sums = w.sums + (int64_t{block_x()} * w.num_heads + head) * dim;
  for (int d = thread_index(); d < dim; d += kBasisThreads) {
    const float before = w.first ? 0.0f : load(&sums[d]);
    store(&sums[d], before + column_sum(s, dim, d));
  }
}

// Grid: y = head.
SVDQ_KERNEL(kBasisThreads) mean_kernel(CovarianceWorkspace w, float* mean) {
  const int dim = w.head_dim;
  const double inverse = 1.0 / static_cast<double>(w.keys.source.num_tokens);
  for (int d = thread_index(); d < dim; d += kBasisThreads) {
    const int64_t at = int64_t{block_y()} * dim + d;
    double sum = 0;
    for (int slot = 0; slot < w.num_slots; ++slot)
      sum += static_cast<double>(load(&w.sums[int64_t{slot} * w.num_heads * dim + at]));
    const float delta = static_cast<float>(sum * inverse);
    store(&w.delta[at], delta);
    store(&mean[at], load(&w.shift[at]) + delta);
  }
}

inline constexpr int kCovarianceRows = 16;  // of a block

// Grid: x = 16 rows of the matrix, y = head. Both triangles are made from the upper one, since a
// matrix product may round the two differently.
SVDQ_KERNEL(kBasisThreads) covariance_kernel(CovarianceWorkspace w, float* covariance) {
  const int dim = w.head_dim;
  const double inverse = 1.0 / static_cast<double>(w.keys.source.num_tokens);
  const float* delta = w.delta + int64_t{block_y()} * dim;
  const int64_t head = int64_t{block_y()} * dim * dim;
  for (int k = thread_index(); k < kCovarianceRows * dim; k += kBasisThreads) {
    const int i = block_x() * kCovarianceRows + k / dim, j = k % dim;
    const int64_t upper = i < j ? int64_t{i} * dim + j : int64_t{j} * dim + i;
    const double value =
        static_cast<double>(load(&w.gram[head + upper])) * inverse -
        static_cast<double>(load(&delta[i])) * static_cast<double>(load(&delta[j]));
    store(&covariance[head + int64_t{i} * dim + j], static_cast<float>(value));
  }
}

// Shapes of the launches; `runs` of 64 tokens.
inline LaunchShape shift_launch(const CovarianceWorkspace& w) {
  return {1, w.num_heads, 1, kBasisThreads, sizeof(ColumnPlan)};
}
inline LaunchShape rows_launch(const CovarianceWorkspace& w, int runs) {
  return {runs, w.num_heads, 1, kBasisThreads, sizeof(ColumnPlan)};
}
inline LaunchShape mean_launch(const CovarianceWorkspace& w) {
  return {1, w.num_heads, 1, kBasisThreads, 0};
}
inline LaunchShape covariance_launch(const CovarianceWorkspace& w) {
  return {w.head_dim / kCovarianceRows, w.num_heads, 1, kBasisThreads, 0};
}

inline constexpr int kComponentRows = kBasisThreads / kWarpSize;  // of a block

// Reverses the order of eigenvectors, which p.covariance holds as rows by rising eigenvalue, `values`
// [H, D]. The sign of a row makes its component of largest magnitude, the first of equals, positive;
// an eigenvalue that rounding left below zero becomes zero. Grid: x = 4 rows, y = head; a warp a row.
SVDQ_KERNEL(kBasisThreads) components_kernel(ComponentsParams p, const float* values) {
  const int dim = p.head_dim, row = block_x() * kComponentRows + warp_index();
  const int64_t head = int64_t{block_y()} * dim, from_row = head + dim - 1 - row;
  const float* from = p.covariance + from_row * dim;
  float largest = -1.0f;
  int at = 0;
  for (int d = lane_index(); d < dim; d += kWarpSize) {
    const float x = load(&from[d]), magnitude = x < 0.0f ? -x : x;
    if (magnitude > largest) largest = magnitude, at = d;
  }
  SVDQ_UNROLL
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(largest, mask);
    const int other_at = shuffle_xor(at, mask);
    if (other > largest || (other == largest && other_at < at)) largest = other, at = other_at;
  }
  const bool negate = load(&from[at]) < 0.0f;
  for (int d = lane_index(); d < dim; d += kWarpSize) {
    const float x = load(&from[d]);
    store(&p.components[(head + row) * dim + d], negate ? -x : x);
  }
  if (lane_index() == 0) {
    const float value = load(&values[from_row]);
    store(&p.variance[head + row], value > 0.0f ? value : 0.0f);
  }
}

inline LaunchShape components_launch(const ComponentsParams& p) {
  return {p.head_dim / kComponentRows, p.num_heads, 1, kBasisThreads, 0};
}

}  // namespace svdq::device
