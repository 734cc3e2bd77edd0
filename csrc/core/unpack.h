// Reading pages back, for inspection: plain loops on get_code, the definition of the format.
#pragma once

#include "csrc/core/parallel.h"
#include "kernels/params.h"

namespace svdq {

// codes [num_tokens, R] uint8.
void unpack_codes(const UnpackParams& params, const Executor& executor, uint8_t* codes);

// keys [H, num_tokens, D] float, rotated by `rope` where the layout codes keys before RoPE;
// `position` is that of the first slot read. basis [R, D] bfloat16, scale [R], mean [H, D].
void unpack_keys(const UnpackParams& params, const Executor& executor, const Rope& rope,
                 int64_t position, const uint16_t* basis, const float* scale, const float* mean,
                 float* keys);

// values [H, num_tokens, D] float; `dtype` is that of exact values.
void unpack_values(const UnpackParams& params, const Executor& executor, DataType dtype,
                   float* values);

}  // namespace svdq
