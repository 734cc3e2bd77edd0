// Interface that the stages of this folder are written against. A Stream is one of
//   svdq::cuda::Queue      kernels compiled by nvcc, queued on a stream (csrc/cuda/stream.cuh)
//   svdq::emulator::Queue  the same kernels compiled by g++ and emulated (csrc/emulator/stream.h)
// and has
//   launch(name, shape, kernel, params...)   queues a kernel
//   allocate<T>(count)                       uninitialised memory for what is queued from now on
//   read(host, device, count)                waits, and copies to the host
//   machine()
//
// Stages are templates over it, so one text plans the work for both. Memory that parameters point
// to lies on the device, except for `layout.heads` and the page tables of the pack and unpack stages,
// which lie on the host and travel as arguments.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/core/error.h"
#include "kernels/machine/math.h"
#include "kernels/pages/heads.cuh"
#include "kernels/pages/page_span.cuh"

namespace svdq::gpu {

struct DeviceLimits {
  int num_sms;
  int max_shared_bytes;  // of a block
};

using svdq::ceil_div;

// Arrays in shared memory are sized for one of these classes of head_dim. Calls
// fn.template operator()<class>().
template <typename Fn>
void with_dim_class(int head_dim, const Fn& fn) {
  if (head_dim <= 64) {
    fn.template operator()<64>();
  } else if (head_dim <= 128) {
    fn.template operator()<128>();
  } else if (head_dim <= 256) {
    fn.template operator()<256>();
  } else {
    fn.template operator()<512>();
  }
}

// Most numbers of a scratch buffer that can be filled piece by piece: 64 MiB of floats.
inline constexpr int64_t kScratchNumbers = int64_t{1} << 24;

// For data that kernels read 16 bytes at a time.
inline void check_aligned(const void* data, const char* name) {
  SVDQ_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
             " must start at a multiple of 16 bytes for CUDA kernels");
}

// A launch beyond what a device takes would fail with a code that names nothing.
inline void check_launch(const char* name, const device::LaunchShape& shape,
                         const DeviceLimits& limits) {
  constexpr int kLargestGrid = 65535;  // in y and z
  SVDQ_CHECK(shape.grid_x > 0 && shape.grid_y > 0 && shape.grid_z > 0 &&
                 shape.grid_y <= kLargestGrid && shape.grid_z <= kLargestGrid,
             name, " would take a grid of ", shape.grid_x, " x ", shape.grid_y, " x ", shape.grid_z,
             " blocks; CUDA takes up to ", kLargestGrid,
             " in y and z: fewer sequences, heads or tokens a call");
  SVDQ_CHECK(shape.smem_bytes <= limits.max_shared_bytes, name, " would take ", shape.smem_bytes,
             " bytes of shared memory a block, the device has ", limits.max_shared_bytes);
}

inline device::HeadTable head_table(const LayoutView& layout) {
  SVDQ_CHECK(layout.num_heads <= device::kMaxKvHeads, "the layout has ", layout.num_heads,
             " KV heads; CUDA kernels take up to ", device::kMaxKvHeads);
  return device::make_head_table(layout);
}

// Calls fn(ids, first, count) for runs of pages that a launch can take: pages first .. first +
// count - 1 of those that `num_tokens` tokens from `slot` on lie in.
template <typename Fn>
void for_each_page_chunk(const int32_t* page_table, int64_t slot, int64_t num_tokens,
                         const Fn& fn) {
  const int64_t pages = device::spanned_pages(slot, num_tokens);
  for (int64_t first = 0; first < pages; first += device::kMaxLaunchPages) {
    const int count = static_cast<int>(std::min<int64_t>(device::kMaxLaunchPages, pages - first));
    device::PageIds ids{};
    std::copy_n(page_table + slot / kPageTokens + first, count, ids.of);
    fn(ids, first, count);
  }
}

}  // namespace svdq::gpu
