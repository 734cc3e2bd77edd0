// The stages that fit, compiled for CUDA.
#include "csrc/gpu/finite.h"
#include "csrc/gpu/quantizer.h"

#include "csrc/cuda/stream.cuh"

namespace svdq::gpu {

template bool all_finite(const FiniteParams&, cuda::Stream&);
template void fit_quantizer(const QuantizerParams&, cuda::Stream&);

}  // namespace svdq::gpu
