// The avx512 backend: AVX-512 F, BW, DQ, VL and VNNI.
#if defined(__x86_64__)
#define SVDQ_TARGET 512
#define SVDQ_TARGET_NAME avx512
#include "csrc/cpu/backend-inl.h"
#include "csrc/cpu/isa.h"

namespace svdq {
const Backend& avx512_backend() {
  static constexpr Backend kRow = avx512::make_backend("avx512", cpu_has_avx512);
  return kRow;
}
}  // namespace svdq
#endif
