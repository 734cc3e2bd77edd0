#include "csrc/gpu/quantizer.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void fit_quantizer(const QuantizerParams& params, const GpuContext& context) {
  const Range range("svdq.fit_quantizer");
  Stream stream(context);
  gpu::fit_quantizer(params, stream);
}

}  // namespace svdq::cuda
