// The covariance stage and its eigenvectors, compiled for CUDA; it needs cuBLAS and cuSOLVER.
#include "csrc/gpu/covariance.h"

#include "csrc/cuda/stream.cuh"

namespace svdq::gpu {

template void covariance(const CovarianceParams&, cuda::Stream&);
template void components(const ComponentsParams&, cuda::Stream&);

}  // namespace svdq::gpu
