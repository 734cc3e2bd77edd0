// The avx2 backend: AVX2, FMA and F16C.
#if defined(__x86_64__)
#define SVDQ_TARGET 256
#define SVDQ_TARGET_NAME avx2
#include "csrc/cpu/backend-inl.h"
#include "csrc/cpu/isa.h"

namespace svdq {
const Backend& avx2_backend() {
  static constexpr Backend kRow = avx2::make_backend("avx2", cpu_has_avx2);
  return kRow;
}
}  // namespace svdq
#endif
