#include "csrc/gpu/gather.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void gather(const GatherParams& params, const GpuContext& context) {
  const Range range("svdq.gather");
  Stream stream(context);
  gpu::gather(params, stream);
}

}  // namespace svdq::cuda
