// Launching a kernel under emulation.
#pragma once

#include "csrc/emu/shim.h"
#include "kernels/device.cuh"

namespace svdq::emu {

// Runs kernel(params...) over the grid of `shape`; throws Error.
template <typename... Params>
Counters launch(const Options& options, const char* name, const device::LaunchShape& shape,
                void (*kernel)(Params...), const std::type_identity_t<Params>&... params) {
  return run_grid(options, name, {shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads,
                  shape.smem_bytes, [&] { kernel(params...); });
}

}  // namespace svdq::emu
