// The stages that pack and unpack, compiled for CUDA.
#include "csrc/gpu/pack.h"
#include "csrc/gpu/unpack.h"

#include "csrc/cuda/stream.cuh"

namespace svdq::gpu {

template void pack_keys(const PackKeysParams&, cuda::Stream&);
template void pack_values(const PackValuesParams&, cuda::Stream&);
template void unpack_codes(const UnpackCodesParams&, cuda::Stream&);
template void unpack_keys(const UnpackKeysParams&, cuda::Stream&);
template void unpack_values(const UnpackValuesParams&, cuda::Stream&);

}  // namespace svdq::gpu
