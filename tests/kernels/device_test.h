// One way to run a kernel in a test: g++ runs it under emulation in several thread orders, nvcc on
// a device. Arrays live where the kernel can reach them and nowhere else.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#if defined(__CUDACC__)
#include "csrc/cuda/stream.cuh"
#else
#include "csrc/emulator/stream.h"
#endif

namespace svdq::testing {

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

class DeviceMemory {
 public:
  DeviceMemory(size_t bytes, const void* from) : bytes_(bytes) {
    check_cuda(cudaMalloc(&data_, bytes ? bytes : 1), "cudaMalloc");
    if (from) check_cuda(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "upload");
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data() const { return data_; }
  void read(void* to) const {
    check_cuda(cudaMemcpy(to, data_, bytes_, cudaMemcpyDeviceToHost), "download");
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

#else

class DeviceMemory {
 public:
  DeviceMemory(size_t bytes, const void* from) : bytes_(bytes), memory_(bytes, from != nullptr) {
    if (bytes && from) std::memcpy(memory_.data(), from, bytes);
  }
  void* data() const { return memory_.data(); }
  void read(void* to) const {
    if (bytes_) std::memcpy(to, memory_.data(), bytes_);
  }

 private:
  size_t bytes_;
  emulator::Memory memory_;
};

#endif

// Numbers where kernels can reach them: copies of a vector, or `count` that nobody has written yet.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& from)
      : count_(from.size()), memory_(from.size() * sizeof(T), from.data()) {}
  explicit DeviceArray(size_t count) : count_(count), memory_(count * sizeof(T), nullptr) {}

  T* data() const { return static_cast<T*>(memory_.data()); }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    memory_.read(values.data());
    return values;
  }

 private:
  size_t count_;
  DeviceMemory memory_;
};

// Tests of kernels. Under emulation every test runs in three thread orders.
enum class Run { kForward, kReverse, kShuffled, kDevice };

inline std::string run_name(const ::testing::TestParamInfo<Run>& info) {
  const char* const names[] = {"Forward", "Reverse", "Shuffled", "Device"};
  return names[static_cast<int>(info.param)];
}

class KernelTest : public ::testing::TestWithParam<Run> {
 protected:
#if defined(__CUDACC__)
  using Stream = cuda::Stream;
  Stream& stream() { return stream_; }

  template <typename... Params>
  void launch(const char* name, const device::LaunchShape& shape, void (*kernel)(Params...),
              const typename device::Identity<Params>::type&... params) {
    stream_.launch(name, shape, kernel, params...);
    check_cuda(cudaDeviceSynchronize(), name);
  }

 private:
  static GpuContext context(std::vector<std::unique_ptr<DeviceMemory>>& memory) {
    cudaDeviceProp device;
    check_cuda(cudaGetDeviceProperties(&device, 0), "device properties");
    const auto allocate = [](void* owner, int64_t bytes) {
      auto& all = *static_cast<std::vector<std::unique_ptr<DeviceMemory>>*>(owner);
      all.push_back(std::make_unique<DeviceMemory>(static_cast<size_t>(bytes), nullptr));
      return all.back()->data();
    };
    return {nullptr, device.multiProcessorCount, static_cast<int>(device.sharedMemPerBlockOptin),
            allocate, &memory};
  }
  std::vector<std::unique_ptr<DeviceMemory>> memory_;
  Stream stream_{context(memory_), "test"};
#else
  using Stream = emulator::Stream;
  Stream& stream() { return stream_; }

  emulator::Options options() const {
    emulator::Options options;
    options.order = static_cast<emulator::Order>(GetParam());
    options.seed = 7;
    return options;
  }
  template <typename... Params>
  void launch(const char* name, const device::LaunchShape& shape, void (*kernel)(Params...),
              const std::type_identity_t<Params>&... params) {
    stream_.launch(name, shape, kernel, params...);
  }
  // Looks at the counters of each launch.
  virtual void observe(const char*, const emulator::Counters& counters) { counters_ = counters; }
  emulator::Counters counters_;  // of the latest launch

 private:
  Stream stream_{options(), [this](const char* name, const emulator::Counters& counters) {
                   observe(name, counters);
                 }};
#endif
};

#if defined(__CUDACC__)
#define SVDQ_KERNEL_TESTS(fixture)                                                      \
  INSTANTIATE_TEST_SUITE_P(, fixture, ::testing::Values(::svdq::testing::Run::kDevice), \
                           ::svdq::testing::run_name)
#else
#define SVDQ_KERNEL_TESTS(fixture)                                                      \
  INSTANTIATE_TEST_SUITE_P(                                                             \
      , fixture,                                                                        \
      ::testing::Values(::svdq::testing::Run::kForward, ::svdq::testing::Run::kReverse, \
                        ::svdq::testing::Run::kShuffled),                               \
      ::svdq::testing::run_name)
#endif

// A queue without read(): what compiles for it can be captured in a CUDA graph.
template <typename Stream>
class Blind {
 public:
  explicit Blind(Stream& stream) : queue_(stream) {}

  template <typename Kernel, typename... Params>
  void launch(const char* name, const device::LaunchShape& shape, Kernel kernel,
              const Params&... params) {
    queue_.launch(name, shape, kernel, params...);
  }
  template <typename T>
  T* allocate(int64_t count) {
    return queue_.template allocate<T>(count);
  }
  const gpu::DeviceLimits& limits() const { return queue_.limits(); }

 private:
  Stream& queue_;
};

}  // namespace svdq::testing
