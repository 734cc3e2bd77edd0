// Runs the stages of csrc/gpu on a CUDA stream. Included by .cu files alone.
#pragma once

#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include "csrc/core/backend.h"
#include "csrc/cuda/status.h"
#include "csrc/cuda/linalg.h"
#include "csrc/core/gpu_context.h"
#include "csrc/gpu/stream.h"

namespace svdq::cuda {

// A stage as profilers show it.
class Range {
 public:
  explicit Range(const char* stage) { nvtxRangePushA(stage); }
  ~Range() { nvtxRangePop(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

// Lets a kernel have as much shared memory as a block may, once for each device.
void allow_shared_memory(const void* kernel, int most_bytes, const char* name);

class Stream {
 public:
  // The stream of `context`; `stage` is shown by profilers as long as this object lives.
  Stream(const Context& context, const char* stage)
      : range_(stage),
        context_(context.gpu()),
        limits_{context_.num_sms, context_.max_shared_bytes},
        linear_algebra_(context_) {}

  template <typename... Params>
  void launch(const char* name, const device::LaunchShape& shape, void (*kernel)(Params...),
              const typename device::Identity<Params>::type&... params) {
    static_assert((sizeof(Params) + ... + 0) <= 4096 - 8 * sizeof...(Params), "CUDA's limit");
    gpu::check_launch(name, shape, limits_);
    constexpr int kWithoutAsking = 48 * 1024;  // of shared memory
    if (shape.smem_bytes > kWithoutAsking) {
      allow_shared_memory(reinterpret_cast<const void*>(kernel), limits_.max_shared_bytes, name);
    }
    const dim3 grid(shape.grid_x, shape.grid_y, shape.grid_z);
    kernel<<<grid, shape.threads, shape.smem_bytes, handle()>>>(params...);
    check(cudaGetLastError(), name);
  }

  template <typename T>
  T* allocate(int64_t count) {
    return static_cast<T*>(
        context_.allocate(context_.owner, count * static_cast<int64_t>(sizeof(T))));
  }

  template <typename T>
  void read(T* host, const T* from, int64_t count) {
    check(cudaMemcpyAsync(host, from, count * sizeof(T), cudaMemcpyDeviceToHost, handle()), "read");
    check(cudaStreamSynchronize(handle()), "read");
  }

  void add_gram(const float* rows, int heads, int64_t tokens, int dim, float* gram) {
    linear_algebra_.add_gram(rows, heads, tokens, dim, gram);
  }
  void eigenvectors(float* matrices, float* values, int heads, int dim, int* info) {
    linear_algebra_.eigenvectors(matrices, values, heads, dim, info);
  }

  const gpu::DeviceLimits& limits() const { return limits_; }
  cudaStream_t handle() const { return static_cast<cudaStream_t>(context_.stream); }

 private:
  Range range_;
  GpuContext context_;
  gpu::DeviceLimits limits_;
  LinearAlgebra linear_algebra_;
};

}  // namespace svdq::cuda
