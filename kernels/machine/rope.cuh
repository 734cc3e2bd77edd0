// The rotations of RoPE that the pages of a call need: by the 64 slots of a page, shared by all
// pages and heads, and to the first position of every page. Keys are rotated by the former and
// queries back by the latter, so that no inner loop computes a sine.
#pragma once

#include "kernels/machine/device.cuh"
#include "kernels/params.h"

namespace svdq::device {

inline constexpr int kRotationThreads = 128;

// Slot 0 of page n of sequence b has position `position` + first_position[b] + 64 n.
struct RotationParams {
  Rope rope;
  int64_t position;
  const int32_t* first_position;  // [B], or null: zeros
  int batch;
  int num_pages;   // of a sequence
  Floats2* slots;  // [64, half] cosine and sine of slot * frequency
  Floats2* pages;  // [B, num_pages, half] of the pages' first positions
};

// Cosine and sine of position * frequency, whatever the position: whole rotates are taken off in
// double.
SVDQ_DEVICE Floats2 rotation(int64_t position, float frequency) {
  constexpr double kTurn = 6.283185307179586476925;
  const double angle = static_cast<double>(position) * static_cast<double>(frequency);
  Floats2 result;
  sine_cosine(static_cast<float>(angle - round_double(angle / kTurn) * kTurn), result.y, result.x);
  return result;
}

// The turn by the sum of two angles: that of a page's first position and that of a slot.
SVDQ_DEVICE Floats2 add_rotations(const Floats2& a, const Floats2& b) {
  return {a.x * b.x - a.y * b.y, a.y * b.x + a.x * b.y};
}

// Grid: x = 64 slots, then the pages of a sequence; z = sequence.
SVDQ_KERNEL(kRotationThreads) rotations_kernel(RotationParams p) {
  const int page = block_x() - kPageTokens;
  if (page < 0 && block_z() > 0) return;  // slots are alike for all sequences
  int64_t position = block_x();
  Floats2* to = p.slots + position * p.rope.rotary_pairs;
  if (page >= 0) {
    const int first = p.first_position ? load(&p.first_position[block_z()]) : 0;
    position = p.position + first + int64_t{page} * kPageTokens;
    to = p.pages + (int64_t{block_z()} * p.num_pages + page) * p.rope.rotary_pairs;
  }
  for (int i = thread_index(); i < p.rope.rotary_pairs; i += kRotationThreads)
    store(&to[i], rotation(position, load(&p.rope.inv_freq[i])));
}

// Tokens of gathered pages come from anywhere, so their rotations are no sums of two from a table.
// Each pair has its frequency as a fraction of 2^64 of a full rotation per position: times a
// position that is exact except for whole rotates, and for 2^-63 a position.
SVDQ_DEVICE uint64_t pair_frequency(float inv_freq) {
  constexpr double kTurn = 6.283185307179586476925;
  const double part = static_cast<double>(inv_freq) / kTurn;
  const double fraction = part - round_double(part);  // at most a half either way
  return static_cast<uint64_t>(static_cast<int64_t>(fraction * 0x1p63)) << 1;
}

// Cosine and sine at a position, off by 2^-20.
SVDQ_DEVICE Floats2 rotation_at(uint64_t turn, int64_t position) {
  constexpr float kUnit = 1.46291807926715968e-9f;  // radians of 2^-32 of a turn
  const uint64_t phase = turn * static_cast<uint64_t>(position);
  Floats2 result;
  sine_cosine_fast(static_cast<float>(static_cast<int32_t>(phase >> 32)) * kUnit, result.y,
                   result.x);
  return result;
}

inline LaunchShape rotations_launch(const RotationParams& p) {
  return {kPageTokens + p.num_pages, 1, p.batch, kRotationThreads, 0};
}

}  // namespace svdq::device
