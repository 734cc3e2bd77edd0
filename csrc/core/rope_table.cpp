#include "csrc/core/rope_table.h"

#include <cmath>

namespace svdq {
namespace {

// Runs after which a rotation is computed afresh; until then products lose about 1e-16 each.
constexpr int64_t kFreshRuns = 64;

}  // namespace

void start_rotation(const Rope& rope, int64_t position, double* rotation) {
  for (int i = 0; i < rope.rotary_pairs; ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(rope.inv_freq[i]);
    rotation[i] = std::cos(angle);
    rotation[rope.rotary_pairs + i] = std::sin(angle);
  }
}

void advance_rotation(double* rotation, const double* turn, int half) {
  for (int i = 0; i < half; ++i) {
    const double c = rotation[i], s = rotation[half + i];
    rotation[i] = c * turn[i] - s * turn[half + i];
    rotation[half + i] = s * turn[i] + c * turn[half + i];
  }
}

PageAngles::PageAngles(const Rope& rope)
    : half_(rope.rotary_pairs),
      page_turn_(sizeof(double) * 2 * rope.rotary_pairs),
      rows_(sizeof(float) * 2 * kPageTokens * rope.rotary_pairs),
      columns_(sizeof(float) * 2 * kPageTokens * rope.rotary_pairs) {
  const AlignedBuffer step(sizeof(double) * 2 * half_);
  double* turn = page_turn_.as<double>();
  start_rotation(rope, 1, step.as<double>());
  start_rotation(rope, 0, turn);
  for (int offset = 0; offset < kPageTokens; ++offset) {
    float* row = rows_.as<float>() + int64_t{offset} * 2 * half_;
    for (int i = 0; i < 2 * half_; ++i) row[i] = static_cast<float>(turn[i]);
    advance_rotation(turn, step.as<double>(), half_);
  }
  for (int i = 0; i < half_; ++i) {
    float* column = columns_.as<float>() + int64_t{i} * 2 * kPageTokens;
    for (int offset = 0; offset < kPageTokens; ++offset) {
      column[offset] = row_cos(offset)[i];
      column[kPageTokens + offset] = row_sin(offset)[i];
    }
  }
}

RopeTable::RopeTable(const Rope& rope, int64_t first_position, int64_t num_runs)
    : offsets_(rope), bases_(sizeof(float) * 2 * num_runs * rope.rotary_pairs) {
  const AlignedBuffer rotation(sizeof(double) * 2 * rope.rotary_pairs);
  for (int64_t run = 0; run < num_runs; ++run) {
    if (run % kFreshRuns == 0) {
      start_rotation(rope, first_position + run * kPageTokens, rotation.as<double>());
    } else {
      advance_rotation(rotation.as<double>(), offsets_.page_turn(), rope.rotary_pairs);
    }
    float* row = bases_.as<float>() + run * 2 * rope.rotary_pairs;
    for (int i = 0; i < 2 * rope.rotary_pairs; ++i)
      row[i] = static_cast<float>(rotation.as<double>()[i]);
  }
}

}  // namespace svdq
