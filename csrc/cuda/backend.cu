#include "csrc/cuda/backend.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/gpu/backend.h"

#include <mutex>
#include <set>
#include <utility>

namespace svdq::cuda {

void allow_shared_memory(const void* kernel, int most_bytes, const char* name) {
  static std::mutex mutex;
  // Not destroyed: other threads may still launch when the program ends.
  static auto& done = *new std::set<std::pair<int, const void*>>;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  const std::lock_guard lock(mutex);
  if (done.contains({device, kernel})) return;
  // What a kernel has in static shared memory counts too.
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most_bytes - static_cast<int>(attributes.sharedSizeBytes)),
        name);
  done.insert({device, kernel});
}

const Backend& backend() {
  static constexpr Backend kRow =
      gpu::make_backend<Stream>("cuda", DeviceKind::kCuda, [] { return true; });
  return kRow;
}

}  // namespace svdq::cuda
