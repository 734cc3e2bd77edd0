// cuBLAS and cuSOLVER, as far as the basis stage needs them (csrc/gpu/covariance.h says what each call
// does). No header of theirs is included here, so that kernels compile without.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "csrc/core/gpu_context.h"

namespace svdq::cuda {

class LinearAlgebra {
 public:
  explicit LinearAlgebra(const GpuContext& context) : context_(context) {}
  LinearAlgebra(const LinearAlgebra&) = delete;
  LinearAlgebra& operator=(const LinearAlgebra&) = delete;
  ~LinearAlgebra();

  void add_gram(const float* rows, int heads, int64_t tokens, int dim, float* gram);
  // The solver may use memory of this object until the stream is waited for.
  void eigenvectors(float* matrices, float* values, int heads, int dim, int* info);

 private:
  struct Handles;
  struct Pool;

  Handles& handles();

  GpuContext context_;
  int device_ = 0;
  Handles* handles_ = nullptr;             // lent by the pool from the first call on
  void* workspace_ = nullptr;              // of cuBLAS, from the first call on
  std::vector<std::byte> host_workspace_;  // of cuSOLVER
};

}  // namespace svdq::cuda
