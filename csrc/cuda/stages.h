// The stages on CUDA devices, one function each: what csrc/torch calls for CUDA tensors. All queue
// their work on context.stream and return; parameters as in kernels/params.h, with pointers to
// device memory except for `layout.heads` and the page tables of the pack and unpack stages. They
// throw svdq::Error for what the device cannot run.
#pragma once

#include "csrc/gpu/context.h"
#include "kernels/params.h"

namespace svdq::cuda {

// Is every number finite and at most `limit` in magnitude? Waits for the answer.
bool all_within(const TokenSource& source, int num_heads, int head_dim, float limit,
                const GpuContext& context);
void covariance(const CovarianceParams& params, const GpuContext& context);
// Eigenvectors of covariance [H, D, D], which is overwritten, as components [H, D, D], rows by
// falling variance [H, D]. Waits for the solver's report.
void components(float* covariance, int num_heads, int head_dim, float* components, float* variance,
                const GpuContext& context);
void fit_quantizer(const QuantizerParams& params, const GpuContext& context);
void pack_keys(const PackKeysParams& params, const GpuContext& context);
void pack_values(const PackValuesParams& params, const GpuContext& context);
// What these write is described in csrc/core/unpack.h.
void unpack_codes(const UnpackParams& params, uint8_t* codes, const GpuContext& context);
void unpack_keys(const UnpackKeysParams& params, const GpuContext& context);
void unpack_values(const UnpackParams& params, DataType dtype, float* values,
                   const GpuContext& context);
void select(const SelectParams& params, const GpuContext& context);
void gather(const GatherParams& params, const GpuContext& context);
void attend(const AttendParams& params, const GpuContext& context);
void merge(const MergeParams& params, const GpuContext& context);

}  // namespace svdq::cuda
