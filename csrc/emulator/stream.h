// Runs the stages of csrc/gpu under emulation.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "csrc/emulator/launch.h"
#include "csrc/emulator/linalg.h"
#include "csrc/gpu/stream.h"

namespace svdq::emulator {

class Stream {
 public:
  // Told after each launch what it counted.
  using Observer = std::function<void(const char* name, const emulator::Counters&)>;

  explicit Stream(const emulator::Options& options, Observer observer = nullptr)
      : options_(options), observer_(std::move(observer)) {}

  template <typename... Params>
  void launch(const char* name, const device::LaunchShape& shape, void (*kernel)(Params...),
              const std::type_identity_t<Params>&... params) {
    static_assert((sizeof(Params) + ... + 0) <= 4096 - 8 * sizeof...(Params), "CUDA's limit");
    gpu::check_launch(name, shape, limits_);
    const emulator::Counters counters = emulator::launch(options_, name, shape, kernel, params...);
    if (observer_) observer_(name, counters);
  }

  // Bytes that nobody has written yet may not be read.
  template <typename T>
  T* allocate(int64_t count) {
    memory_.push_back(std::make_unique<emulator::Memory>(count * sizeof(T), false));
    return static_cast<T*>(memory_.back()->data());
  }

  template <typename T>
  void read(T* host, const T* device, int64_t count) {
    std::memcpy(host, device, count * sizeof(T));
  }

  // In place of cuBLAS and cuSOLVER (csrc/gpu/covariance.h).
  void add_gram(const float* rows, int heads, int64_t tokens, int dim, float* gram) {
    emulator::add_gram(rows, heads, tokens, dim, gram, options_.check_global);
  }
  void eigenvectors(float* matrices, float* values, int heads, int dim, int* info) {
    emulator::eigenvectors(matrices, values, heads, dim, info, options_.check_global);
  }

  // The smallest device that any target gives.
  const gpu::DeviceLimits& limits() const { return limits_; }

 private:
  emulator::Options options_;
  Observer observer_;
  gpu::DeviceLimits limits_{2, 101376};
  std::vector<std::unique_ptr<emulator::Memory>> memory_;
};

}  // namespace svdq::emulator
