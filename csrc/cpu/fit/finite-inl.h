// The finite stage: a pass over keys or values that finds NaN, infinity and numbers that are too large.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

#include "csrc/core/parallel.h"
#include "csrc/core/scalar.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Largest bits but for the sign of `count` numbers, a whole number of vectors. Bits without a sign
// are in the order of their magnitudes, and infinity and NaN come last.
template <typename Int>
inline Int largest_bits(const Int* numbers, int64_t count, Int most) {
  typedef Int Vec __attribute__((vector_size(kVecBytes)));
  constexpr int kNumbers = kVecBytes / sizeof(Int);
  const Vec magnitude = Vec{} + std::numeric_limits<Int>::max();
  Vec found = Vec{} + most;
  int64_t i = 0;
  for (; i + kNumbers <= count; i += kNumbers) {
    const Vec bits = load<Vec>(numbers + i) & magnitude;
    found = bits > found ? bits : found;
  }
  for (int n = 0; n < kNumbers; ++n) most = std::max<Int>(most, found[n]);
  for (; i < count; ++i) most = std::max<Int>(most, numbers[i] & std::numeric_limits<Int>::max());
  return most;
}

// The bits of the largest number of a dtype that is no larger than `limit` > 0.
inline int32_t limit_bits(float limit, DataType dtype) {
  const uint32_t bits = float_to_bits(limit);
  if (dtype == DataType::kFloat32) return static_cast<int32_t>(bits);
  if (dtype == DataType::kBFloat16) return static_cast<int32_t>(bits >> 16);
  uint16_t half = float_to_half(std::min(limit, 65504.0f));
  if (half_to_float(half) > limit) --half;
  return half;
}

inline bool all_finite(const FiniteParams& p, const Executor& executor) {
  const TokenSource& source = p.tokens;
  const int head_dim = p.head_dim;
  constexpr int64_t kTokens = 1024;
  const int64_t chunks = (source.num_tokens + kTokens - 1) / kTokens;
  const int32_t allowed = limit_bits(p.limit, source.dtype);
  std::atomic<bool> within{true};
  const auto check = [&]<typename Int>(int64_t task) {
    const int64_t first = task % chunks * kTokens;
    const int64_t count = std::min(kTokens, source.num_tokens - first);
    const Int* rows = static_cast<const Int*>(source.data) + task / chunks * source.head_stride +
                      first * source.token_stride;
    Int most = 0;
    if (source.token_stride == head_dim) {
      most = largest_bits(rows, count * head_dim, most);
    } else {
      for (int64_t t = 0; t < count; ++t)
        most = largest_bits(rows + t * source.token_stride, head_dim, most);
    }
    if (most > allowed) within.store(false, std::memory_order_relaxed);
  };
  for_each_task(executor, p.num_heads * chunks, [&](int64_t task, int) {
    if (source.dtype == DataType::kFloat32) {
      check.template operator()<int32_t>(task);
    } else {
      check.template operator()<int16_t>(task);
    }
  });
  return within.load();
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
