// Cosines and sines of runs of 64 consecutive positions, split as position = base + offset: a call
// then needs one table of offsets and one row per run, and both come from few sines by complex
// products in double.
#pragma once

#include <cstdint>

#include "csrc/core/parallel.h"
#include "kernels/params.h"

namespace svdq {

// One rotation per pair, [cos (half) | sin (half)] in double.
void start_rotation(const Rope& rope, int64_t position, double* rotation);

// rotation *= turn: the positions add.
void advance_rotation(double* rotation, const double* turn, int half);

// Angles of the offsets 0 .. 63 and of one whole page.
class PageAngles {
 public:
  explicit PageAngles(const Rope& rope);

  int half() const { return half_; }
  const double* page_turn() const { return page_turn_.as<double>(); }  // rotation by 64 positions
  // By offset: [half] each.
  const float* row_cos(int offset) const { return rows_.as<float>() + int64_t{offset} * 2 * half_; }
  const float* row_sin(int offset) const { return row_cos(offset) + half_; }
  // By pair: [64] each.
  const float* column_cos(int pair) const {
    return columns_.as<float>() + int64_t{pair} * 2 * kPageTokens;
  }
  const float* column_sin(int pair) const { return column_cos(pair) + kPageTokens; }

 private:
  int half_;
  AlignedBuffer page_turn_;  // [2, half] double
  AlignedBuffer rows_;       // [64, 2, half] float
  AlignedBuffer columns_;    // [half, 2, 64] float
};

// Angles of num_runs runs of 64 positions from first_position on.
class RopeTable {
 public:
  RopeTable(const Rope& rope, int64_t first_position, int64_t num_runs);

  int half() const { return offsets_.half(); }
  const PageAngles& offsets() const { return offsets_; }
  const float* base_cos(int64_t run) const { return bases_.as<float>() + run * 2 * half(); }
  const float* base_sin(int64_t run) const { return base_cos(run) + half(); }

 private:
  PageAngles offsets_;
  AlignedBuffer bases_;  // [num_runs, 2, half] float
};

}  // namespace svdq
