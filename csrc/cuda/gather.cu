#include "csrc/gpu/gather.h"

#include "csrc/cuda/queue.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void gather(const GatherParams& params, const GpuContext& context) {
  const Range range("svdq.gather");
  Queue queue(context);
  gpu::gather(params, queue);
}

}  // namespace svdq::cuda
