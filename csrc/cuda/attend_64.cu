// The attend stage for head_dim up to 64, compiled for CUDA.
#include "csrc/gpu/step.h"

#include "csrc/cuda/stream.cuh"

namespace svdq::gpu {

template void attend_class<64>(const AttendParams&, const AttendTiling*, cuda::Stream&,
                               const StepParams*);

}  // namespace svdq::gpu
