#include "csrc/cuda/attend_classes.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void attend(const AttendParams& params, const GpuContext& context) {
  const Range range("svdq.attend");
  Stream stream(context);
  gpu::attend(params, stream);
}

void merge(const MergeParams& params, const GpuContext& context) {
  const Range range("svdq.merge");
  Stream stream(context);
  gpu::merge(params, stream);
}

}  // namespace svdq::cuda
