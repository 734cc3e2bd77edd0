// The attend stage is instantiated for each class of head_dim in a file of its own, csrc/cuda/
// attend_*.cu, so that files compile side by side and nobody else compiles those kernels again.
#pragma once

#include "csrc/cuda/queue.cuh"
#include "csrc/gpu/attend.h"

namespace svdq::gpu {
extern template void attend_class<64, cuda::Queue>(const AttendParams&, const AttendCut*,
                                                   cuda::Queue&);
extern template void attend_class<128, cuda::Queue>(const AttendParams&, const AttendCut*,
                                                    cuda::Queue&);
extern template void attend_class<256, cuda::Queue>(const AttendParams&, const AttendCut*,
                                                    cuda::Queue&);
extern template void attend_class<512, cuda::Queue>(const AttendParams&, const AttendCut*,
                                                    cuda::Queue&);
}  // namespace svdq::gpu
