// Queues what kernels need to read keys as rows.
#pragma once

#include "csrc/gpu/rotations.h"
#include "kernels/project.cuh"

namespace svdq::gpu {

// `num_runs` runs of 64 positions from `first_position` on.
template <typename Queue>
device::TokenRows token_rows(const TokenSource& keys, const Rope& rope, int64_t first_position,
                             int64_t num_runs, Queue& queue) {
  const auto turns = rotations(rope, first_position, nullptr, 1, num_runs, queue);
  return {keys, rope.half, turns.slots, turns.pages, device::aligned_rows(keys)};
}

}  // namespace svdq::gpu
