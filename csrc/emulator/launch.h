// Launching a kernel under emulation.
#pragma once

#include "csrc/emulator/shim.h"
#include "kernels/machine/device.cuh"

namespace svdq::emulator {

// Runs kernel(params...) over the grid of `shape`; throws Error.
template <typename... Params>
Counters launch(const Options& options, const char* name, const device::LaunchShape& shape,
                void (*kernel)(Params...), const std::type_identity_t<Params>&... params) {
  return run_grid(options, name, {shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads,
                  shape.smem_bytes, [&] { kernel(params...); });
}

}  // namespace svdq::emulator
