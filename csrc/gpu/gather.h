// The gather stage on a GPU: one launch.
#pragma once

#include "csrc/gpu/stream.h"
#include "kernels/select/gather.cuh"

namespace svdq::gpu {

template <typename Stream>
void gather(const GatherParams& p, Stream& stream) {
  check_aligned(p.k_pages, "k_pages");
  check_aligned(p.v_pages, "v_pages");
  check_aligned(p.k_out, "k_out");
  check_aligned(p.v_out, "v_out");
  if (p.num_slots == 0) return;
  stream.launch("gather", device::gather_launch(p), device::gather_kernel, p, head_table(p.layout));
}

}  // namespace svdq::gpu
