// Tokens of gathered pages (AttendParams::token_slots): each has a slot of its own or none, and each
// KV head others. A token without one is not valid; its value is zeros. pre-RoPE channels are rotated
// by the token's own position, from how far a pair rotates in one: two instructions and a fast sine
// where pages that lie together take a table's entry.
#pragma once

#include "kernels/attend/plan.cuh"
#include "kernels/machine/rope.cuh"

namespace svdq::device {

class TokenSlots {
 public:
  SVDQ_DEVICE TokenSlots(const AttendParams& p, const BlockRows& rows)
      : slots_(p.token_slots
                   ? p.token_slots + rows.sequence_head * p.keys.table_stride * kPageTokens
                   : nullptr) {}

  SVDQ_DEVICE bool given() const { return slots_ != nullptr; }
  // False where the select stage could not read its input (kBadSlot).
  SVDQ_DEVICE bool valid() const { return !given() || load(&slots_[0]) >= 0; }
  SVDQ_DEVICE int slot(int page, int token) const {
    return load(&slots_[int64_t{page} * kPageTokens + token]);
  }
  SVDQ_DEVICE bool has(int page, int token) const { return slot(page, token) != kNoSlot; }

 private:
  const int32_t* slots_;
};

// Rotations of the tokens of gathered pages.
class TokenRotations {
 public:
  SVDQ_DEVICE TokenRotations(const AttendParams& p, const AttendWorkspace& workspace,
                             const BlockRows& rows)
      : slots_(p, rows),
        frequencies_(workspace.pair_frequencies),
        first_position_(p.keys.first_position ? load(&p.keys.first_position[rows.sequence]) : 0) {}

  SVDQ_DEVICE uint64_t pair_frequency(int pair) const { return load(&frequencies_[pair]); }
  SVDQ_DEVICE Floats2 at(uint64_t pair_frequency, int page, int token) const {
    return rotation_at(pair_frequency, int64_t{first_position_} + slots_.slot(page, token));
  }

 private:
  TokenSlots slots_;
  const uint64_t* frequencies_;
  int first_position_;
};

}  // namespace svdq::device
