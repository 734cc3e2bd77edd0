#include "csrc/core/rope_table.h"

#include <cmath>

namespace svdq {
namespace {

// Chunks after which a rotation is computed afresh; until then products lose about 1e-16 each.
constexpr int64_t kFreshChunks = 64;

}  // namespace

void start_rotation(const Rope& rope, int64_t position, double* rotation) {
  for (int i = 0; i < rope.rotary_pairs; ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(rope.inv_freq[i]);
    rotation[i] = std::cos(angle);
    rotation[rope.rotary_pairs + i] = std::sin(angle);
  }
}

void advance_rotation(double* rotation, const double* step, int rotary_pairs) {
  for (int i = 0; i < rotary_pairs; ++i) {
    const double c = rotation[i], s = rotation[rotary_pairs + i];
    rotation[i] = c * step[i] - s * step[rotary_pairs + i];
    rotation[rotary_pairs + i] = s * step[i] + c * step[rotary_pairs + i];
  }
}

PageAngles::PageAngles(const Rope& rope)
    : rotary_pairs_(rope.rotary_pairs),
      page_rotation_(sizeof(double) * 2 * rope.rotary_pairs),
      rows_(sizeof(float) * 2 * kPageTokens * rope.rotary_pairs),
      columns_(sizeof(float) * 2 * kPageTokens * rope.rotary_pairs) {
  const AlignedBuffer step(sizeof(double) * 2 * rotary_pairs_);
  double* rotation = page_rotation_.as<double>();
  start_rotation(rope, 1, step.as<double>());
  start_rotation(rope, 0, rotation);
  for (int offset = 0; offset < kPageTokens; ++offset) {
    float* row = rows_.as<float>() + int64_t{offset} * 2 * rotary_pairs_;
    for (int i = 0; i < 2 * rotary_pairs_; ++i) row[i] = static_cast<float>(rotation[i]);
    advance_rotation(rotation, step.as<double>(), rotary_pairs_);
  }
  for (int i = 0; i < rotary_pairs_; ++i) {
    float* column = columns_.as<float>() + int64_t{i} * 2 * kPageTokens;
    for (int offset = 0; offset < kPageTokens; ++offset) {
      column[offset] = row_cos(offset)[i];
      column[kPageTokens + offset] = row_sin(offset)[i];
    }
  }
}

RopeTable::RopeTable(const Rope& rope, int64_t first_position, int64_t num_chunks)
    : offsets_(rope), bases_(sizeof(float) * 2 * num_chunks * rope.rotary_pairs) {
  const AlignedBuffer rotation(sizeof(double) * 2 * rope.rotary_pairs);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    if (chunk % kFreshChunks == 0) {
      start_rotation(rope, first_position + chunk * kPageTokens, rotation.as<double>());
    } else {
      advance_rotation(rotation.as<double>(), offsets_.page_rotation(), rope.rotary_pairs);
    }
    float* row = bases_.as<float>() + chunk * 2 * rope.rotary_pairs;
    for (int i = 0; i < 2 * rope.rotary_pairs; ++i)
      row[i] = static_cast<float>(rotation.as<double>()[i]);
  }
}

}  // namespace svdq
