// Queues the tables of rotations that other stages read.
#pragma once

#include "csrc/gpu/queue.h"
#include "kernels/rotations.cuh"

namespace svdq::gpu {

// Rotations for `num_pages` pages of `batch` sequences; slot 0 of sequence b has position
// `position` + first_position[b]. Null where rope.half == 0.
template <typename Queue>
device::RotationParams rotations(const Rope& rope, int64_t position, const int32_t* first_position,
                                 int batch, int64_t num_pages, Queue& queue) {
  device::RotationParams p{rope, position, first_position, batch, static_cast<int>(num_pages)};
  if (rope.half == 0) return p;
  p.slots = queue.template allocate<device::Floats2>(int64_t{kPageTokens} * rope.half);
  p.pages = queue.template allocate<device::Floats2>(batch * num_pages * rope.half);
  queue.launch("rotations", device::rotations_launch(p), device::rotations_kernel, p);
  return p;
}

}  // namespace svdq::gpu
