// The GPU's stages as a row of the CPU: the source of the CUDA kernels, emulated. It is slow, for tests
// and for finding out what a model would do on a GPU.
#pragma once

#include "csrc/core/backend.h"

namespace svdq::emulator {

const Backend& backend();

}  // namespace svdq::emulator
