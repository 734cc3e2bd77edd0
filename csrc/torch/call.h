// A call of stages for tensors of one device: the backend's row and what it needs of torch.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <memory>
#include <type_traits>

#include "csrc/core/backend.h"
#include "csrc/torch/executor.h"

namespace svdq::torch_binding {

class Call {
 public:
  // For tensors on `device`: the CPU row in use, on torch's threads, which are woken only for `numbers`
  // worth it; or the row of CUDA, on torch's current stream. Throws ValueError where this build has no
  // row for the device.
  explicit Call(const at::Device& device, int64_t numbers = std::numeric_limits<int64_t>::max());
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Backend& backend() const { return backend_; }

  // Runs a stage: call(&Backend::attend, params).
  template <typename Result, typename Params>
  Result operator()(Result (*Backend::*stage)(const Params&, const Context&),
                    const std::type_identity_t<Params>& params) const {
    return (backend_.*stage)(params, context_);
  }

 private:
  struct Cuda;

  TorchExecutor executor_;
  std::unique_ptr<Cuda> cuda_;  // null on the CPU
  const Backend& backend_;
  Context context_;
};

// Adds the rows that this build links to the table; once, when the library is loaded.
void add_backends();

}  // namespace svdq::torch_binding
