#include "csrc/gpu/select.h"

#include "csrc/cuda/queue.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void select(const SelectParams& params, const GpuContext& context) {
  const Range range("svdq.select");
  Queue queue(context);
  gpu::select(params, queue);
}

}  // namespace svdq::cuda
