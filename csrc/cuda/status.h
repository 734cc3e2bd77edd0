// CUDA's error codes as the library's exception.
#pragma once

#include <cuda_runtime.h>

#include "csrc/core/error.h"

namespace svdq::cuda {

inline void check(cudaError_t status, const char* what) {
  SVDQ_CHECK(status == cudaSuccess, "CUDA: ", what, ": ", cudaGetErrorString(status));
}

}  // namespace svdq::cuda
