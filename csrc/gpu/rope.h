// Queues the tables of rotations that other stages read.
#pragma once

#include "csrc/gpu/stream.h"
#include "kernels/machine/rope.cuh"

namespace svdq::gpu {

// Rotations for `num_pages` pages of `batch` sequences; slot 0 of sequence b has position
// `position` + first_position[b]. Null where rope.half == 0.
template <typename Stream>
device::RotationParams rotations(const Rope& rope, int64_t position, const int32_t* first_position,
                                 int batch, int64_t num_pages, Stream& stream) {
  device::RotationParams p{rope, position, first_position, batch, static_cast<int>(num_pages)};
  if (rope.rotary_pairs == 0) return p;
  p.slots = stream.template allocate<device::Floats2>(int64_t{kPageTokens} * rope.rotary_pairs);
  p.pages = stream.template allocate<device::Floats2>(batch * num_pages * rope.rotary_pairs);
  stream.launch("rotations", device::rotations_launch(p), device::rotations_kernel, p);
  return p;
}

}  // namespace svdq::gpu
