// Online softmax. Scores are in units of log2, so that probabilities are 2^(score - maximum).
//
// The state of a query row over a set of keys is its maximum m, the sum of 2^(s - m), and the sum
// of 2^(s - m) v. Over no keys it is m = -inf, 0, 0; two sets merge by scaling both to the larger
// m.
#pragma once

#include "kernels/machine/math.h"
#include "kernels/machine/device.cuh"

namespace svdq::device {

SVDQ_DEVICE float no_score() { return int_as_float(0xff800000u); }  // -inf

SVDQ_DEVICE float not_a_number() { return int_as_float(0x7fc00000u); }

struct RowState {
  float max;
  float sum;
};

// State of keys that cannot be read: it makes every result NaN.
SVDQ_DEVICE float poisoned_score() { return int_as_float(0x7f800000u); }  // +inf

SVDQ_DEVICE RowState empty_row() { return {no_score(), 0.0f}; }

// Moves a row to the maximum of its keys and new ones; returns the factor that its sums shrink by.
SVDQ_DEVICE float raise_max(RowState& row, float new_max) {
  const float most = new_max > row.max ? new_max : row.max;
  const float factor = row.max == no_score() ? 0.0f : exp2_fast(row.max - most);
  row.max = most;
  row.sum *= factor;
  return factor;
}

// Probability of a score relative to a maximum; a masked score, -inf, gives exactly 0.
SVDQ_DEVICE float probability(float score, float max) {
  return score == no_score() ? 0.0f : exp2_fast(score - max);
}

// Natural logarithm of the sum over all keys; -inf if there are none, NaN where a score was.
SVDQ_DEVICE float log_sum(const RowState& row) {
  return row.sum == 0.0f ? no_score() : (row.max + log2_fast(row.sum)) * kLn2;
}

}  // namespace svdq::device
