#include "csrc/gpu/quantizer.h"

#include "csrc/cuda/queue.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void fit_quantizer(const QuantizerParams& params, const GpuContext& context) {
  const Range range("svdq.fit_quantizer");
  Queue queue(context);
  gpu::fit_quantizer(params, queue);
}

}  // namespace svdq::cuda
