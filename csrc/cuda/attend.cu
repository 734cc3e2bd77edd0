// The attend, merge and decode_step stages, compiled for CUDA. The kernels of each class of head_dim are in a file of
// their own, attend_*.cu, so that nvcc compiles them side by side.
#include "csrc/cuda/attend_classes.cuh"

namespace svdq::gpu {

template void attend(const AttendParams&, cuda::Stream&);
template void decode_step(const DecodeStepParams&, cuda::Stream&);
template void merge(const MergeParams&, cuda::Stream&);

}  // namespace svdq::gpu
