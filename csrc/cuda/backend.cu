#include "csrc/cuda/backend.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/gpu/backend.h"

namespace svdq::cuda {

const Backend& backend() {
  static constexpr Backend kRow =
      gpu::make_backend<Stream>("cuda", DeviceKind::kCuda, [] { return true; });
  return kRow;
}

}  // namespace svdq::cuda
