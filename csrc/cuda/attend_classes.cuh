// The attend stage of each class of head_dim is compiled in a file of its own, attend_*.cu. A file that includes
// this header uses those.
#pragma once

#include "csrc/cuda/stream.cuh"
#include "csrc/gpu/step.h"

namespace svdq::gpu {

extern template void attend_class<64>(const AttendParams&, const AttendTiling*, cuda::Stream&,
                                      const StepParams*);
extern template void attend_class<128>(const AttendParams&, const AttendTiling*, cuda::Stream&,
                                       const StepParams*);
extern template void attend_class<256>(const AttendParams&, const AttendTiling*, cuda::Stream&,
                                       const StepParams*);
extern template void attend_class<512>(const AttendParams&, const AttendTiling*, cuda::Stream&,
                                       const StepParams*);

}  // namespace svdq::gpu
