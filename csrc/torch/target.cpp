#include "csrc/torch/target.h"

#include <ATen/Parallel.h>

#include <tuple>

#include "csrc/torch/executor.h"

#if defined(SVDQ_WITH_CUDA)
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/stages.h"
#endif

namespace svdq::torch_binding {

#if defined(SVDQ_WITH_CUDA)

// A call on a device: its current stream, and scratch memory from torch's allocator, which takes
// it back in the order of the stream.
struct Target::Cuda {
  explicit Cuda(const at::Device& device) : guard(device) {
    const cudaDeviceProp& properties = *at::cuda::getCurrentDeviceProperties();
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

// Returns from the stage if it ran on a device.
#define SVDQ_ON_CUDA(call)                   \
  do {                                       \
    if (cuda_) {                             \
      const GpuContext& on = cuda_->context; \
      return call;                           \
    }                                        \
  } while (false)

#else

struct Target::Cuda {};
#define SVDQ_ON_CUDA(call) (void)0

#endif

Target::Target(const at::Device& device, int64_t numbers) : device_(device), numbers_(numbers) {
  if (device.is_cpu()) return;
#if defined(SVDQ_WITH_CUDA)
  cuda_ = std::make_unique<Cuda>(device);
#else
  TORCH_CHECK_VALUE(false, "this build of svdq runs on cpu tensors alone, got tensors on ", device);
#endif
}

Target::~Target() = default;

bool Target::all_within(const TokenSource& source, int num_heads, int head_dim, float limit) const {
  SVDQ_ON_CUDA(cuda::all_within(source, num_heads, head_dim, limit, on));
  return current_backend().all_within(source, num_heads, head_dim, limit, TorchExecutor(numbers_));
}

void Target::covariance(const CovarianceParams& params) const {
  SVDQ_ON_CUDA(cuda::covariance(params, on));
  current_backend().covariance(params, TorchExecutor(numbers_));
}

std::tuple<at::Tensor, at::Tensor> Target::components(at::Tensor& covariance) const {
#if defined(SVDQ_WITH_CUDA)
  if (cuda_) {
    const int64_t heads = covariance.size(0), dim = covariance.size(1);
    at::Tensor components = at::empty_like(covariance),
               variance = at::empty({heads, dim}, covariance.options());
    cuda::components(covariance.mutable_data_ptr<float>(), static_cast<int>(heads),
                     static_cast<int>(dim), components.mutable_data_ptr<float>(),
                     variance.mutable_data_ptr<float>(), cuda_->context);
    return {components, variance};
  }
#endif
  // LAPACK takes one matrix after the other: every thread some heads. Ascending eigenvalues,
  // eigenvectors in columns.
  const int64_t heads = covariance.size(0);
  std::vector<at::Tensor> some_values(heads), some_vectors(heads);
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd no_autograd;
    for (int64_t h = begin; h < end; ++h)
      std::tie(some_values[h], some_vectors[h]) = at::linalg_eigh(covariance[h]);
  });
  // Gathered here: another thread knows nothing of this one's inference mode.
  const at::Tensor values = at::stack(some_values), vectors = at::stack(some_vectors);
  at::Tensor components = vectors.transpose(1, 2).flip(1).contiguous();
  // The component of largest magnitude, the first of equals, is positive.
  const at::Tensor largest = components.abs().argmax(-1, true);
  components.mul_(at::where(components.gather(-1, largest) < 0, -1.0f, 1.0f));
  return {components, values.flip(1).clamp_min(0).contiguous()};
}

void Target::fit_quantizer(const QuantizerParams& params) const {
  SVDQ_ON_CUDA(cuda::fit_quantizer(params, on));
  current_backend().fit_quantizer(params, TorchExecutor(numbers_));
}

void Target::pack_keys(const PackKeysParams& params) const {
  SVDQ_ON_CUDA(cuda::pack_keys(params, on));
  current_backend().pack_keys(params, TorchExecutor(numbers_));
}

void Target::pack_values(const PackValuesParams& params) const {
  SVDQ_ON_CUDA(cuda::pack_values(params, on));
  current_backend().pack_values(params, TorchExecutor(numbers_));
}

void Target::select(const SelectParams& params) const {
  SVDQ_ON_CUDA(cuda::select(params, on));
  current_backend().select(params, TorchExecutor(numbers_));
}

void Target::gather(const GatherParams& params) const {
  SVDQ_ON_CUDA(cuda::gather(params, on));
  current_backend().gather(params, TorchExecutor(numbers_));
}

void Target::attend(const AttendParams& params) const {
  SVDQ_ON_CUDA(cuda::attend(params, on));
  current_backend().attend(params, TorchExecutor(numbers_));
}

void Target::merge(const MergeParams& params) const {
  SVDQ_ON_CUDA(cuda::merge(params, on));
  current_backend().merge(params, TorchExecutor(numbers_));
}

void Target::unpack_codes(const UnpackParams& params, uint8_t* codes) const {
  SVDQ_ON_CUDA(cuda::unpack_codes(params, codes, on));
  svdq::unpack_codes(params, TorchExecutor(numbers_), codes);
}

void Target::unpack_keys(const UnpackKeysParams& params) const {
  SVDQ_ON_CUDA(cuda::unpack_keys(params, on));
  svdq::unpack_keys(params, TorchExecutor(numbers_));
}

void Target::unpack_values(const UnpackParams& params, DataType dtype, float* values) const {
  SVDQ_ON_CUDA(cuda::unpack_values(params, dtype, values, on));
  svdq::unpack_values(params, TorchExecutor(numbers_), dtype, values);
}

}  // namespace svdq::torch_binding
