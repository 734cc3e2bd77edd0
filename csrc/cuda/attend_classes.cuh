// The attend stage is instantiated for each class of head_dim in a file of its own, csrc/cuda/
// attend_*.cu, so that files compile side by side and nobody else compiles those kernels again.
#pragma once

#include "csrc/cuda/stream.cuh"
#include "csrc/gpu/attend.h"

namespace svdq::gpu {
extern template void attend_class<64, cuda::Stream>(const AttendParams&, const AttendTiling*,
                                                    cuda::Stream&);
extern template void attend_class<128, cuda::Stream>(const AttendParams&, const AttendTiling*,
                                                     cuda::Stream&);
extern template void attend_class<256, cuda::Stream>(const AttendParams&, const AttendTiling*,
                                                     cuda::Stream&);
extern template void attend_class<512, cuda::Stream>(const AttendParams&, const AttendTiling*,
                                                     cuda::Stream&);
}  // namespace svdq::gpu
