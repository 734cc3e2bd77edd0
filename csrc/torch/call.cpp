#include "csrc/torch/call.h"

#include <vector>

#if defined(SVDQ_WITH_CUDA)
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/backend.h"
#endif
#if defined(SVDQ_WITH_EMULATION)
#include "csrc/emulator/backend.h"
#endif

namespace svdq::torch_binding {

#if defined(SVDQ_WITH_CUDA)

// The device's current stream, and scratch memory from torch's allocator, which takes it back in the
// order of the stream.
struct Call::Cuda {
  explicit Cuda(const at::Device& device) : guard(device) {
    const cudaDeviceProp& properties = *at::cuda::getCurrentDeviceProperties();
    TORCH_CHECK_NOT_IMPLEMENTED(
        properties.major >= 8, "svdq's CUDA kernels need compute capability 8.0 or newer, got ",
        properties.major, ".", properties.minor, " (", properties.name, ")");
    context.stream = at::cuda::getCurrentCUDAStream().stream();
    context.num_sms = properties.multiProcessorCount;
    context.max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
    context.owner = this;
    context.allocate = [](void* owner, int64_t bytes) {
      auto& self = *static_cast<Cuda*>(owner);
      const at::Device on(at::kCUDA, self.guard.current_device().index());
      self.scratch.push_back(at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(on)));
      return self.scratch.back().mutable_data_ptr();
    };
  }

  c10::cuda::CUDAGuard guard;
  GpuContext context;
  std::vector<at::Tensor> scratch;
};

#else

struct Call::Cuda {
  explicit Cuda(const at::Device&) {}
  GpuContext context;
};

#endif

namespace {

const Backend& find_backend(const at::Device& device) {
  if (device.is_cpu()) return current_backend();
  const Backend* backend = device.is_cuda() ? cuda_backend() : nullptr;
  TORCH_CHECK_VALUE(backend, "this build of svdq runs on cpu tensors alone, got tensors on ",
                    device);
  return *backend;
}

}  // namespace

Call::Call(const at::Device& device, int64_t numbers)
    : executor_(numbers), backend_(find_backend(device)), context_(executor_) {
  if (device.is_cpu()) return;
  cuda_ = std::make_unique<Cuda>(device);
  context_ = Context(cuda_->context);
}

Call::~Call() = default;

void add_backends() {
#if defined(SVDQ_WITH_EMULATION)
  add_backend(emulator::backend());
#endif
#if defined(SVDQ_WITH_CUDA)
  add_backend(cuda::backend());
#endif
}

}  // namespace svdq::torch_binding
