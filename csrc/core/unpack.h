// Reading pages back, for inspection: plain loops on get_code, the definition of the format.
#pragma once

#include "csrc/core/parallel.h"
#include "kernels/params.h"

namespace svdq {

// codes [num_tokens, R] uint8.
void unpack_codes(const UnpackParams& params, const Executor& executor, uint8_t* codes);

// Decodes the keys of a layout that codes one space; codec.post_mean is not read.
void unpack_keys(const UnpackKeysParams& params, const Executor& executor);

// values [H, num_tokens, D] float; `dtype` is that of exact values.
void unpack_values(const UnpackParams& params, const Executor& executor, DataType dtype,
                   float* values);

}  // namespace svdq
