// The portable backend: the compiler's vectors of 16 bytes, on any processor.
#define SVDQ_TARGET 128
#define SVDQ_TARGET_NAME portable
#include "csrc/cpu/backend-inl.h"

namespace svdq {
const Backend& portable_backend() {
  static constexpr Backend kRow = portable::make_backend("portable", [] { return true; });
  return kRow;
}
}  // namespace svdq
