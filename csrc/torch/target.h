// What runs the stages of an operator: the CPU backend in use, or the CUDA device that the tensors
// lie on.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <memory>
#include <vector>

#include "csrc/core/backend.h"
#include "csrc/core/unpack.h"
#include "csrc/gpu/context.h"

namespace svdq::torch_binding {

class Target {
 public:
  // For tensors on `device`. Threads of the CPU are woken only for `numbers` worth it.
  explicit Target(const at::Device& device, int64_t numbers = std::numeric_limits<int64_t>::max());
  ~Target();
  Target(const Target&) = delete;
  Target& operator=(const Target&) = delete;

  bool is_cuda() const { return device_.is_cuda(); }

  // The stages (kernels/params.h). On CUDA they queue work on torch's current stream and return,
  // except all_within and components, which wait for
  // an answer.
  bool all_within(const TokenSource& source, int num_heads, int head_dim, float limit) const;
  void covariance(const CovarianceParams& params) const;
  // Eigenvectors as rows [H, D, D] by falling eigenvalue [H, D], of `covariance` [H, D, D], which
  // may be overwritten.
  std::tuple<at::Tensor, at::Tensor> components(at::Tensor& covariance) const;
  void fit_quantizer(const QuantizerParams& params) const;
  void pack_keys(const PackKeysParams& params) const;
  void pack_values(const PackValuesParams& params) const;
  void select(const SelectParams& params) const;
  void gather(const GatherParams& params) const;
  void attend(const AttendParams& params) const;
  void merge(const MergeParams& params) const;
  void unpack_codes(const UnpackParams& params, uint8_t* codes) const;
  void unpack_keys(const UnpackKeysParams& params) const;
  void unpack_values(const UnpackParams& params, DataType dtype, float* values) const;

 private:
  struct Cuda;

  at::Device device_;
  int64_t numbers_;
  std::unique_ptr<Cuda> cuda_;  // null on the CPU
};

}  // namespace svdq::torch_binding
