// The attend stage for head_dim up to 512, in a file of its own so that files compile side by side.
#include "csrc/cuda/stream.cuh"
#include "csrc/gpu/attend.h"

namespace svdq::gpu {
template void attend_class<512, cuda::Stream>(const AttendParams&, const AttendTiling*,
                                              cuda::Stream&);
}  // namespace svdq::gpu
