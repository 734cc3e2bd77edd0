// The stages of key sparsity, compiled for CUDA.
#include "csrc/gpu/select.h"
#include "csrc/gpu/gather.h"

#include "csrc/cuda/stream.cuh"

namespace svdq::gpu {

template void select(const SelectParams&, cuda::Stream&);
template void gather(const GatherParams&, cuda::Stream&);

}  // namespace svdq::gpu
