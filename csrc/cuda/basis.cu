#include "csrc/gpu/basis.h"

#include "csrc/cuda/queue.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void covariance(const CovarianceParams& params, const GpuContext& context) {
  const Range range("svdq.covariance");
  Queue queue(context);
  gpu::covariance(params, queue);
}

void components(float* covariance, int num_heads, int head_dim, float* components, float* variance,
                const GpuContext& context) {
  const Range range("svdq.components");
  Queue queue(context);
  gpu::components(covariance, num_heads, head_dim, components, variance, queue);
}

}  // namespace svdq::cuda
