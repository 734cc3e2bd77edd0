// The row of a backend whose stages are those of this folder, made once for CUDA and the emulator. The
// stages are declared here alone: each is instantiated where its kernels are compiled.
#pragma once

#include "csrc/core/backend.h"

namespace svdq::gpu {

template <typename Stream>
bool all_finite(const FiniteParams& params, Stream& stream);
template <typename Stream>
void covariance(const CovarianceParams& params, Stream& stream);
template <typename Stream>
void components(const ComponentsParams& params, Stream& stream);
template <typename Stream>
void fit_quantizer(const QuantizerParams& params, Stream& stream);
template <typename Stream>
void pack_keys(const PackKeysParams& params, Stream& stream);
template <typename Stream>
void pack_values(const PackValuesParams& params, Stream& stream);
template <typename Stream>
void unpack_codes(const UnpackCodesParams& params, Stream& stream);
template <typename Stream>
void unpack_keys(const UnpackKeysParams& params, Stream& stream);
template <typename Stream>
void unpack_values(const UnpackValuesParams& params, Stream& stream);
template <typename Stream>
void select(const SelectParams& params, Stream& stream);
template <typename Stream>
void gather(const GatherParams& params, Stream& stream);
template <typename Stream>
void attend(const AttendParams& params, Stream& stream);
template <typename Stream>
void merge(const MergeParams& params, Stream& stream);
template <typename Stream>
void decode_step(const DecodeStepParams& params, Stream& stream);

// `Stream(context, name)` opens the stream of a call; profilers show the stage by that name.
template <typename Stream>
constexpr Backend make_backend(const char* name, DeviceKind device, bool (*available)()) {
  return {
      .name = name,
      .device = device,
      .available = available,
#define SVDQ_STAGE(Params, stage)                       \
  .stage = [](const Params& params, const Context& c) { \
    Stream stream(c, "svdq." #stage);                   \
    return gpu::stage(params, stream);                  \
  }
      SVDQ_STAGE(FiniteParams, all_finite),
      SVDQ_STAGE(CovarianceParams, covariance),
      SVDQ_STAGE(ComponentsParams, components),
      SVDQ_STAGE(QuantizerParams, fit_quantizer),
      SVDQ_STAGE(PackKeysParams, pack_keys),
      SVDQ_STAGE(PackValuesParams, pack_values),
      SVDQ_STAGE(UnpackCodesParams, unpack_codes),
      SVDQ_STAGE(UnpackKeysParams, unpack_keys),
      SVDQ_STAGE(UnpackValuesParams, unpack_values),
      SVDQ_STAGE(SelectParams, select),
      SVDQ_STAGE(GatherParams, gather),
      SVDQ_STAGE(AttendParams, attend),
      SVDQ_STAGE(MergeParams, merge),
      SVDQ_STAGE(DecodeStepParams, decode_step),
#undef SVDQ_STAGE
  };
}

}  // namespace svdq::gpu
