#include "csrc/gpu/unpack.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

void unpack_codes(const UnpackParams& params, uint8_t* codes, const GpuContext& context) {
  const Range range("svdq.unpack_codes");
  Stream stream(context);
  gpu::unpack_codes(params, codes, stream);
}

void unpack_keys(const UnpackKeysParams& params, const GpuContext& context) {
  const Range range("svdq.unpack_keys");
  Stream stream(context);
  gpu::unpack_keys(params, stream);
}

void unpack_values(const UnpackParams& params, DataType dtype, float* values,
                   const GpuContext& context) {
  const Range range("svdq.unpack_values");
  Stream stream(context);
  gpu::unpack_values(params, dtype, values, stream);
}

}  // namespace svdq::cuda
