#include "csrc/core/backend.h"

#include <atomic>
#include <cstdlib>

#include "csrc/core/error.h"

namespace svdq {

#if defined(__x86_64__)
const Backend& avx512_backend();
const Backend& avx2_backend();
#endif
const Backend& portable_backend();

namespace {

// In order of preference.
std::vector<const Backend*>& table() {
  static std::vector<const Backend*> rows = {
#if defined(__x86_64__)
      &avx512_backend(),
      &avx2_backend(),
#endif
      &portable_backend(),
  };
  return rows;
}

const Backend& find_backend(const std::string& name) {
  std::string names;
  for (const Backend* backend : available_backends()) {
    if (name == backend->name) return *backend;
    names += names.empty() ? backend->name : join(", ", backend->name);
  }
  throw Error(join("backend '", name, "' is not available; this machine runs: ", names));
}

std::atomic<const Backend*> chosen{nullptr};

}  // namespace

void add_backend(const Backend& backend) { table().push_back(&backend); }

std::vector<const Backend*> available_backends() {
  std::vector<const Backend*> found;
  for (const Backend* backend : table()) {
    if (backend->device == DeviceKind::kCpu && backend->available()) found.push_back(backend);
  }
  return found;
}

const Backend* cuda_backend() {
  for (const Backend* backend : table()) {
    if (backend->device == DeviceKind::kCuda) return backend;
  }
  return nullptr;
}

const Backend& current_backend() {
  if (const Backend* backend = chosen.load(std::memory_order_acquire)) return *backend;
  const char* forced = std::getenv("SVDQ_BACKEND");
  const Backend* backend = forced && *forced ? &find_backend(forced) : available_backends().front();
  chosen.store(backend, std::memory_order_release);
  return *backend;
}

void set_backend(const std::string& name) {
  chosen.store(&find_backend(name), std::memory_order_release);
}

}  // namespace svdq
