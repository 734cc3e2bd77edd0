// What a model does to its logits (LogitRules): softcap, and the sliding window of each query row. Both
// are off for most models, so that kernels branch on them, and what they need is read where it is needed:
// it takes no registers elsewhere.
#pragma once

#include "kernels/attend/token_slots.cuh"

namespace svdq::device {

// Hyperbolic tangent, relative error below 1e-6.
SVDQ_DEVICE float hyperbolic_tangent(float x) {
  const float size = x < 0.0f ? -x : x;
  // Near zero an odd polynomial (that of Cephes): a difference of exponentials would cancel.
  const float square = x * x;
  float sum = fused(-5.70498872745e-3f, square, 2.06390887954e-2f);
  sum = fused(sum, square, -5.37397155531e-2f);
  sum = fused(sum, square, 1.33314422036e-1f);
  sum = fused(sum, square, -3.33332819422e-1f);
  const float near_zero = fused(sum * square, x, x);
  const float power = exp2_fast(size * (-2 * kLog2E));  // e^(-2 |x|)
  const float far = (1.0f - power) * reciprocal_fast(1.0f + power);
  const float signed_far = x < 0.0f ? -far : far;
  return size >= 0.625f ? signed_far : near_zero;  // a NaN stays one
}

// A score in units of log2 after the softcap, if there is one.
SVDQ_DEVICE float cap_score(const LogitRules& rules, float x) {
  if (rules.softcap <= 0.0f) return x;
  const float cap = rules.softcap * kLog2E;
  return hyperbolic_tangent(x * reciprocal_fast(cap)) * cap;
}

// The same for all scores of a thread.
template <int kTiles>
SVDQ_DEVICE void cap_scores(const LogitRules& rules, float (&score)[kTiles][4]) {
  if (rules.softcap <= 0.0f) return;
  const float cap = rules.softcap * kLog2E, inverse = reciprocal_fast(cap);
  SVDQ_UNROLL
  for (int i = 0; i < 4 * kTiles; ++i) {
    float& x = score[i / 4][i % 4];
    x = hyperbolic_tangent(x * inverse) * cap;
  }
}

// Sliding windows of the query rows of a block.
class SlidingWindow {
 public:
  SVDQ_DEVICE SlidingWindow(const AttendParams& p, const BlockRows& rows) : p_(p), rows_(rows) {}

  SVDQ_DEVICE bool given() const { return p_.rules.window_size > 0; }
  // First slot that row `row` of the block sees.
  SVDQ_DEVICE int first_slot(int row) const { return first_slot_of(query_of(row)); }
  // The least of all rows of the block, for pages that are not gathered.
  SVDQ_DEVICE int first_slot() const {
    if (!given() || p_.token_slots) return 0;
    const int query = query_of(0);
    return first_slot_of(query + rows_.count > p_.queries.length ? 0 : query);
  }
  // First row of a window of `length` tokens that row `row` of the block sees.
  SVDQ_DEVICE int first_window_row(int row, int length) const {
    if (!given()) return 0;
    const int query = query_of(row);
    const int64_t own = length + query - (p_.causal ? p_.queries.length : 0);
    const int recent = clamped(own - p_.rules.window_size + 1);
    int sinks = first_slot_of(query);
    if (sinks > p_.window.sink_rows) sinks = p_.window.sink_rows;
    return recent > sinks ? recent : sinks;
  }

  // Masks the tokens of page `page` that rows do not see: element e of tile i is the score of token
  // token_of(i, e) for row row_of(e) of the block.
  template <int kTiles, typename TokenOf, typename RowOf>
  SVDQ_DEVICE void mask(const TokenSlots& slots, int page, const TokenOf& token_of,
                        const RowOf& row_of, float (&score)[kTiles][4]) const {
    if (!given()) return;
    SVDQ_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int first = first_slot(row_of(e));
      SVDQ_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        const int token = token_of(i, e);
        const int slot = slots.given() ? slots.slot(page, token) : page * kPageTokens + token;
        if (slot < first) score[i][e] = no_score();
      }
    }
  }

 private:
  SVDQ_DEVICE int query_of(int row) const {
    return static_cast<int>(rows_.first + row) % static_cast<int>(p_.queries.length);
  }
  SVDQ_DEVICE static int clamped(int64_t slot) {
    return slot < 0 ? 0 : slot < kNoSlot ? static_cast<int>(slot) : kNoSlot;
  }
  SVDQ_DEVICE int first_slot_of(int query) const {
    const int64_t position = int64_t{query} + load(&p_.rules.query_position[rows_.sequence]);
    const int start = p_.keys.first_position ? load(&p_.keys.first_position[rows_.sequence]) : 0;
    return clamped(position - p_.rules.window_size + 1 - start);
  }

  const AttendParams& p_;
  const BlockRows& rows_;
};

}  // namespace svdq::device
