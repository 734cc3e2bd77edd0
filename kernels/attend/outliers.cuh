// Outlier tokens: keys held exact next to their codes. A scorer scores a page by its codes alone; then
// the scores of the few outliers in it are replaced, so nothing is masked and their values are those
// of the page. A warp finds its first outlier among a head's ascending slots and walks on from there
// with its pages; where there is none, that costs a comparison a page.
#pragma once

#include "kernels/attend/plan.cuh"

namespace svdq::device {

class Outliers {
 public:
  // Those from page `page` on. All lanes of a warp take part.
  SVDQ_DEVICE Outliers(const AttendParams& p, const BlockRows& rows, int page)
      : p_(p), rows_(rows), next_(0), slot_(kNoSlot) {
    if (p.keys.num_outliers == 0) return;
    next_ = first_from(page * kPageTokens);
    slot_ = slot(next_);
  }

  // fn(token, index) for each outlier of page `page`: its token in the page and its place in the
  // list. Pages must come in ascending order, one after the other.
  template <typename Fn>
  SVDQ_DEVICE void for_each(int page, const Fn& fn) {
    while (slot_ < (page + 1) * kPageTokens) {
      fn(slot_ % kPageTokens, next_);
      ++next_;
      slot_ = slot(next_);
    }
  }

  // Score of outlier `index` for query row `row` of the block, in units of log2. The four lanes of a
  // row share its channels.
  SVDQ_DEVICE float score(int index, int row) const {
    const int dim = p_.keys.layout.head_dim;
    const int64_t key = (rows_.sequence_head * p_.keys.num_outliers + index) * dim;
    float sum = 0.0f;
    if (row < rows_.count) {
      for (int d = lane_index() % 4; d < dim; d += 4) {
        sum = fused(load_number(p_.keys.outlier_keys, p_.keys.outlier_dtype, key + d),
                    load_query(p_, rows_, row, d), sum);
      }
    }
    sum += shuffle_xor(sum, 1);
    return sum + shuffle_xor(sum, 2);
  }

  // The same for rows 0 to 7, of which this thread gets 2 c and 2 c + 1, with c = lane % 4.
  SVDQ_DEVICE Floats2 score_pair(int index) const {
    const float own = score(index, lane_index() / 4);
    const int from = lane_index() % 4 * 8;
    return {shuffle(own, from), shuffle(own, from + 4)};
  }

 private:
  SVDQ_DEVICE int slot(int index) const {
    return index < p_.keys.num_outliers
               ? load(&p_.keys.outlier_slots[rows_.sequence_head * p_.keys.num_outliers + index])
               : kNoSlot;
  }

  // Number of slots before `least`: every round leaves a 32nd of those in question.
  SVDQ_DEVICE int first_from(int least) const {
    int first = 0, count = p_.keys.num_outliers;  // the answer is in first .. first + count
    while (count > 0) {
      const int step = (count + kWarpSize - 1) / kWarpSize, at = lane_index() * step;
      const bool before = at < count && slot(first + at) < least;
      const int passed = count_bits(ballot(before));
      if (passed == 0) break;
      const int skipped = (passed - 1) * step + 1, left = count - skipped;
      first += skipped;
      count = left < step - 1 ? left : step - 1;
    }
    return first;
  }

  const AttendParams& p_;
  const BlockRows& rows_;
  int next_, slot_;
};

}  // namespace svdq::device
