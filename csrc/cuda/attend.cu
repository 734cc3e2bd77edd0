// The attend and merge stages, compiled for CUDA. The kernels of each class of head_dim are in a file of
// their own, attend_*.cu, so that nvcc compiles them side by side.
#include "csrc/gpu/attend.h"

#include "csrc/cuda/stream.cuh"

namespace svdq::gpu {

extern template void attend_class<64>(const AttendParams&, const AttendTiling*, cuda::Stream&);
extern template void attend_class<128>(const AttendParams&, const AttendTiling*, cuda::Stream&);
extern template void attend_class<256>(const AttendParams&, const AttendTiling*, cuda::Stream&);
extern template void attend_class<512>(const AttendParams&, const AttendTiling*, cuda::Stream&);

template void attend(const AttendParams&, cuda::Stream&);
template void merge(const MergeParams&, cuda::Stream&);

}  // namespace svdq::gpu
