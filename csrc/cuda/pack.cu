#include "csrc/gpu/pack.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void pack_keys(const PackKeysParams& params, const GpuContext& context) {
  const Range range("svdq.pack_keys");
  Stream stream(context);
  gpu::pack_keys(params, stream);
}

void pack_values(const PackValuesParams& params, const GpuContext& context) {
  const Range range("svdq.pack_values");
  Stream stream(context);
  gpu::pack_values(params, stream);
}

}  // namespace svdq::cuda
