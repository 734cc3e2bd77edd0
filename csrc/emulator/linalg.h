// Plain loops that the emulated stream runs in place of cuBLAS and cuSOLVER. With `checked`, memory is
// checked as it is for kernels.
#pragma once

#include <cstdint>

namespace svdq::emulator {

// gram [heads, dim, dim] += rows^T rows; rows [heads, tokens, dim].
void add_gram(const float* rows, int heads, int64_t tokens, int dim, float* gram, bool checked);

// Symmetric matrices [heads, dim, dim] become their eigenvectors, one a row, by rising eigenvalue;
// values [heads, dim], info [heads]. Like cuSOLVER, info is not 0 where there are none.
void eigenvectors(float* matrices, float* values, int heads, int dim, int* info, bool checked);

}  // namespace svdq::emulator
