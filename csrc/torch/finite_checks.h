// Checks that tokens are finite before they are fitted or stored.
#pragma once

#include <limits>
#include <string>

#include "csrc/torch/call.h"
#include "csrc/torch/tensor_checks.h"

namespace svdq::torch_binding {

inline constexpr float kLargestHalf = 65504.0f;

inline void check_within(const Checker& check, const TokenSource& source, const char* name,
                         int64_t heads, int64_t dim, float limit) {
  const Call call(check.device(), heads * dim * source.num_tokens);
  // While decoding, the host does not wait for a device. Kernels give numbers that are not finite code 0, or
  // a NaN scale to their values.
  if (check.device().is_cuda() && source.num_tokens <= kPageTokens) return;
  check.require(
      call(&Backend::all_finite, {source, static_cast<int>(heads), static_cast<int>(dim), limit}),
      std::string(name) + (limit == kLargestHalf
                               ? " must be finite and at most 65504 in magnitude to be packed"
                               : " must be finite, got NaN or infinite numbers"));
}

inline void check_finite(const Checker& check, const TokenSource& source, const char* name,
                         int64_t heads, int64_t dim) {
  check_within(check, source, name, heads, dim, std::numeric_limits<float>::max());
}

}  // namespace svdq::torch_binding
