// The rotation of values (kernels/rotation.h) of rows of floats in shared memory.
//
// Lane l of a team of 16 owns channels l, l + 16, ... of a row. Strides below 16 are exchanged between lanes, all
// others and the reflection stay in a lane's own channels, since a block is a multiple of 16: no step waits for
// other threads. Sums and differences come in the order of the CPU backends, so that the same values give the same
// codes everywhere.
#pragma once

#include "kernels/machine/device.cuh"
#include "kernels/rotation.h"

namespace svdq::device {

// A product that is rounded before anything is added to it, whatever the compiler would make of it.
SVDQ_DEVICE float rounded_product(float a, float b) { return fused(a, b, 0.0f); }

// Butterflies between lanes: strides 1 .. `last`. Of two channels the lower one gets the sum, the upper one the
// lower less the upper.
SVDQ_DEVICE float exchange_butterflies(float x, int last, uint32_t members = kWarp) {
  SVDQ_UNROLL
  for (int stride = 1; stride < kWarpSize; stride *= 2) {
    if (stride > last) break;
    const float other = shuffle_xor(x, stride, members);
    x = lane_index() & stride ? other - x : x + other;
  }
  return x;
}

// Lanes of this lane's half of a warp.
SVDQ_DEVICE uint32_t team_members() { return 0xffffu << lane_index() / kLanes * kLanes; }

class TeamRotation {
 public:
  // `row` [dim]; all lanes of the team take part.
  SVDQ_DEVICE TeamRotation(float* row, int dim)
      : row_(row + lane_index() % kLanes), dim_(dim), block_(rotation_block(dim)) {}

  // row = Q row, or Q^T row: the matrices are symmetric, only the signs change places.
  SVDQ_DEVICE void rotate() const {
    butterflies([](int channel) { return rotation_sign(channel); });
    reflect();
    scale([](int) { return 1.0f; });
  }
  SVDQ_DEVICE void unrotate() const {
    reflect();
    butterflies([](int) { return 1.0f; });
    scale([](int channel) { return rotation_sign(channel); });
  }

 private:
  template <typename Factor>
  SVDQ_DEVICE void butterflies(const Factor& factor) const {
    const int lane = lane_index() % kLanes;
    for (int d = 0; d < dim_; d += kLanes)
      store(&row_[d],
            exchange_butterflies(load(&row_[d]) * factor(d + lane), kLanes / 2, team_members()));
    for (int stride = kLanes; stride < block_; stride *= 2) {
      for (int i = 0; i < dim_ / 2; i += kLanes) {
        const int d = i / stride * 2 * stride + i % stride;
        const float a = load(&row_[d]), b = load(&row_[d + stride]);
        store(&row_[d], a + b);
        store(&row_[d + stride], a - b);
      }
    }
  }

  SVDQ_DEVICE void reflect() const {
    if (block_ == dim_) return;
    const float twice = 2.0f * static_cast<float>(block_) / static_cast<float>(dim_);
    for (int j = 0; j < block_; j += kLanes) {
      float sum = load(&row_[j]);
      for (int d = j + block_; d < dim_; d += block_) sum += load(&row_[d]);
      const float share = rounded_product(sum, twice);
      for (int d = j; d < dim_; d += block_) store(&row_[d], load(&row_[d]) - share);
    }
  }

  template <typename Factor>
  SVDQ_DEVICE void scale(const Factor& factor) const {
    const int lane = lane_index() % kLanes;
    const float norm = rotation_norm(block_);
    for (int d = 0; d < dim_; d += kLanes)
      store(&row_[d], load(&row_[d]) * (norm * factor(d + lane)));
  }

  float* row_;  // from this lane's first channel on
  int dim_, block_;
};

// Rotates a row [dim] back but for its factors (unrotated), by all `threads` of a block, whole warps; barriers are
// before and after it.
SVDQ_DEVICE void unrotate_row(float* row, int dim, int threads) {
  const int block = rotation_block(dim);
  if (block < dim) {
    const float twice = 2.0f * static_cast<float>(block) / static_cast<float>(dim);
    for (int j = thread_index(); j < block; j += threads) {
      float sum = 0.0f;
      for (int d = j; d < dim; d += block) sum += load(&row[d]);
      for (int d = j; d < dim; d += block) store(&row[d], load(&row[d]) - sum * twice);
    }
    sync_threads();
  }
  // All lanes of a warp exchange, those past the end zeros.
  for (int d = thread_index(); d < dim + lane_index(); d += threads) {
    const float x = exchange_butterflies(d < dim ? load(&row[d]) : 0.0f, block / 2);
    if (d < dim) store(&row[d], x);
  }
  for (int stride = kWarpSize; stride < block; stride *= 2) {
    sync_threads();
    for (int i = thread_index(); i < dim / 2; i += threads) {
      const int d = i / stride * 2 * stride + i % stride;
      const float a = load(&row[d]), b = load(&row[d + stride]);
      store(&row[d], a + b);
      store(&row[d + stride], a - b);
    }
  }
  sync_threads();
}

// Channel `d` of a row that unrotate_row has rotated back.
SVDQ_DEVICE float unrotated(const float* row, int dim, int d) {
  return load(&row[d]) * (rotation_norm(rotation_block(dim)) * rotation_sign(d));
}

}  // namespace svdq::device
