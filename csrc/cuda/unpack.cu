#include "csrc/gpu/unpack.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void unpack_codes(const UnpackParams& params, uint8_t* codes, const GpuContext& context) {
  const Range range("svdq.unpack_codes");
  Stream stream(context);
  gpu::unpack_codes(params, codes, stream);
}

void unpack_keys(const UnpackParams& params, const Rope& rope, int64_t position,
                 const uint16_t* basis, const float* scale, const float* mean, float* keys,
                 const GpuContext& context) {
  const Range range("svdq.unpack_keys");
  Stream stream(context);
  gpu::unpack_keys(params, rope, position, basis, scale, mean, keys, stream);
}

void unpack_values(const UnpackParams& params, DataType dtype, float* values,
                   const GpuContext& context) {
  const Range range("svdq.unpack_values");
  Stream stream(context);
  gpu::unpack_values(params, dtype, values, stream);
}

}  // namespace svdq::cuda
