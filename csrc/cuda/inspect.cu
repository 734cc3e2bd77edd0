#include "csrc/gpu/inspect.h"

#include "csrc/cuda/queue.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void unpack_codes(const UnpackParams& params, uint8_t* codes, const GpuContext& context) {
  const Range range("svdq.unpack_codes");
  Queue queue(context);
  gpu::unpack_codes(params, codes, queue);
}

void unpack_keys(const UnpackParams& params, const Rope& rope, int64_t position,
                 const uint16_t* basis, const float* scale, const float* mean, float* keys,
                 const GpuContext& context) {
  const Range range("svdq.unpack_keys");
  Queue queue(context);
  gpu::unpack_keys(params, rope, position, basis, scale, mean, keys, queue);
}

void unpack_values(const UnpackParams& params, DataType dtype, float* values,
                   const GpuContext& context) {
  const Range range("svdq.unpack_values");
  Queue queue(context);
  gpu::unpack_values(params, dtype, values, queue);
}

}  // namespace svdq::cuda
