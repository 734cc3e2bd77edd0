// Reading pages back, for inspection: plain loops on get_code, the definition of the format.
#pragma once

#include "csrc/core/parallel.h"
#include "kernels/params.h"

namespace svdq {

void unpack_codes(const UnpackCodesParams& params, const Executor& executor);

// Decodes the keys of a layout that codes one space; codec.post_mean is not read.
void unpack_keys(const UnpackKeysParams& params, const Executor& executor);

void unpack_values(const UnpackValuesParams& params, const Executor& executor);

}  // namespace svdq
