#include "csrc/gpu/pack.h"

#include "csrc/cuda/queue.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void pack_keys(const PackKeysParams& params, const GpuContext& context) {
  const Range range("svdq.pack_keys");
  Queue queue(context);
  gpu::pack_keys(params, queue);
}

void pack_values(const PackValuesParams& params, const GpuContext& context) {
  const Range range("svdq.pack_values");
  Queue queue(context);
  gpu::pack_values(params, queue);
}

}  // namespace svdq::cuda
