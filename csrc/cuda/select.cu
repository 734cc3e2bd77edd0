#include "csrc/gpu/select.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void select(const SelectParams& params, const GpuContext& context) {
  const Range range("svdq.select");
  Stream stream(context);
  gpu::select(params, stream);
}

}  // namespace svdq::cuda
