// Cosines and sines of chunks of 64 consecutive positions, split as position = base + offset: a call
// then needs one table of offsets and one row per chunk, and both come from few sines by complex
// products in double.
#pragma once

#include <cstdint>

#include "csrc/core/parallel.h"
#include "kernels/params.h"

namespace svdq {

// One rotation per pair, [cos (rotary_pairs) | sin (rotary_pairs)] in double.
void start_rotation(const Rope& rope, int64_t position, double* rotation);

// rotation *= step: the positions add.
void advance_rotation(double* rotation, const double* step, int rotary_pairs);

// Angles of the offsets 0 .. 63 and of one whole page.
class PageAngles {
 public:
  explicit PageAngles(const Rope& rope);

  int rotary_pairs() const { return rotary_pairs_; }
  const double* page_rotation() const {
    return page_rotation_.as<double>();
  }  // rotation by 64 positions
  // By offset: [rotary_pairs] each.
  const float* row_cos(int offset) const {
    return rows_.as<float>() + int64_t{offset} * 2 * rotary_pairs_;
  }
  const float* row_sin(int offset) const { return row_cos(offset) + rotary_pairs_; }
  // By pair: [64] each.
  const float* column_cos(int pair) const {
    return columns_.as<float>() + int64_t{pair} * 2 * kPageTokens;
  }
  const float* column_sin(int pair) const { return column_cos(pair) + kPageTokens; }

 private:
  int rotary_pairs_;
  AlignedBuffer page_rotation_;  // [2, rotary_pairs] double
  AlignedBuffer rows_;           // [64, 2, rotary_pairs] float
  AlignedBuffer columns_;        // [rotary_pairs, 2, 64] float
};

// Angles of num_chunks chunks of 64 positions from first_position on.
class RopeTable {
 public:
  RopeTable(const Rope& rope, int64_t first_position, int64_t num_chunks);

  int rotary_pairs() const { return offsets_.rotary_pairs(); }
  const PageAngles& offsets() const { return offsets_; }
  const float* base_cos(int64_t chunk) const {
    return bases_.as<float>() + chunk * 2 * rotary_pairs();
  }
  const float* base_sin(int64_t chunk) const { return base_cos(chunk) + rotary_pairs(); }

 private:
  PageAngles offsets_;
  AlignedBuffer bases_;  // [num_chunks, 2, rotary_pairs] float
};

}  // namespace svdq
