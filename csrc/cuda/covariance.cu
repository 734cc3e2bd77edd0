#include "csrc/gpu/covariance.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void covariance(const CovarianceParams& params, const GpuContext& context) {
  const Range range("svdq.covariance");
  Stream stream(context);
  gpu::covariance(params, stream);
}

void components(float* covariance, int num_heads, int head_dim, float* components, float* variance,
                const GpuContext& context) {
  const Range range("svdq.components");
  Stream stream(context);
  gpu::components(covariance, num_heads, head_dim, components, variance, stream);
}

}  // namespace svdq::cuda
