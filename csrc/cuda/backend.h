// The row of CUDA devices.
#pragma once

#include "csrc/core/backend.h"

namespace svdq::cuda {

const Backend& backend();

}  // namespace svdq::cuda
