// Constants and integer arithmetic that host and device share.
#pragma once

#include <cstdint>

#include "kernels/format.h"

namespace svdq {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// Both for n >= 0 and by, multiple > 0.
SVDQ_HOST_DEVICE constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
SVDQ_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

}  // namespace svdq
