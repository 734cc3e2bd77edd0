#include "csrc/core/backend.h"

#include <atomic>
#include <cstdlib>

#include "csrc/core/check.h"

namespace svdq {

#if defined(__x86_64__)
namespace avx512 {
extern const Backend kBackend;
}
namespace avx2 {
extern const Backend kBackend;
}
#endif
namespace portable {
extern const Backend kBackend;
}
#if defined(SVDQ_WITH_EMULATION)
namespace emulator {
extern const Backend kBackend;
}
#endif

namespace {

// In order of preference.
const Backend* const kBackends[] = {
#if defined(__x86_64__)
    &avx512::kBackend,
    &avx2::kBackend,
#endif
    &portable::kBackend,
#if defined(SVDQ_WITH_EMULATION)
    &emulator::kBackend,
#endif
};

const Backend& find_backend(const std::string& name) {
  std::string names;
  for (const Backend* backend : available_backends()) {
    if (name == backend->name) return *backend;
    names += names.empty() ? backend->name : join(", ", backend->name);
  }
  throw Error(join("backend '", name, "' is not available; this limits runs: ", names));
}

std::atomic<const Backend*> chosen{nullptr};

}  // namespace

std::vector<const Backend*> available_backends() {
  std::vector<const Backend*> found;
  for (const Backend* backend : kBackends) {
    if (backend->available()) found.push_back(backend);
  }
  return found;
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
