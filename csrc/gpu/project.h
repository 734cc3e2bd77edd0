// Queues what kernels need to read keys as rows.
#pragma once

#include "csrc/gpu/rope.h"
#include "kernels/pack/project.cuh"

namespace svdq::gpu {

// `num_chunks` runs of 64 positions from `first_position` on.
template <typename Stream>
device::TokenRows token_rows(const TokenSource& keys, const Rope& rope, int64_t first_position,
                             int64_t num_chunks, Stream& stream) {
  const auto rotates = rotations(rope, first_position, nullptr, 1, num_chunks, stream);
  return {keys, rope.rotary_pairs, rotates.slots, rotates.pages, device::aligned_rows(keys)};
}

}  // namespace svdq::gpu
