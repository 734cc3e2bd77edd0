#include "csrc/cuda/attend_classes.cuh"
#include "csrc/cuda/stages.h"

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
