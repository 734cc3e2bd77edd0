#include "csrc/gpu/attend.h"

#include "csrc/cuda/queue.cuh"
#include "csrc/cuda/stages.h"

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

namespace svdq::cuda {

void attend(const AttendParams& params, const GpuContext& context) {
  const Range range("svdq.attend");
  Queue queue(context);
  gpu::attend(params, queue);
}

void merge(const MergeParams& params, const GpuContext& context) {
  const Range range("svdq.merge");
  Queue queue(context);
  gpu::merge(params, queue);
}

}  // namespace svdq::cuda
