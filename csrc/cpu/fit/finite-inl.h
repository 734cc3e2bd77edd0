// The finite stage: one pass over keys or values that finds NaN, infinity and numbers above a limit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>

#include "csrc/core/parallel.h"
#include "csrc/core/scalar.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// The larger of max_bits and the largest bits without the sign of `count` numbers. Bits without a sign are in the order
// of their magnitudes; infinity and NaN come last.
template <typename Int>
inline Int largest_bits(const Int* numbers, int64_t count, Int max_bits) {
  typedef Int Vec __attribute__((vector_size(kVecBytes)));
  constexpr int kNumbers = kVecBytes / sizeof(Int);
  const Vec magnitude = Vec{} + std::numeric_limits<Int>::max();
  Vec found = Vec{} + max_bits;
  int64_t i = 0;
  for (; i + kNumbers <= count; i += kNumbers) {
    const Vec bits = load<Vec>(numbers + i) & magnitude;
    found = bits > found ? bits : found;
  }
  for (int n = 0; n < kNumbers; ++n) max_bits = std::max<Int>(max_bits, found[n]);
  for (; i < count; ++i)
    max_bits = std::max<Int>(max_bits, numbers[i] & std::numeric_limits<Int>::max());
  return max_bits;
}

// Bits of the largest number of a dtype up to `limit` > 0.
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
  const int64_t chunks = ceil_div(source.num_tokens, kTokens);
  const int32_t allowed = limit_bits(p.limit, source.dtype);
  std::atomic<bool> within{true};
  const auto check = [&]<typename Int>(int64_t task) {
    const int64_t first = task % chunks * kTokens;
    const int64_t count = std::min(kTokens, source.num_tokens - first);
    const Int* rows = static_cast<const Int*>(source.data) + task / chunks * source.head_stride +
                      first * source.token_stride;
    Int max_bits = 0;
    if (source.token_stride == head_dim) {
      max_bits = largest_bits(rows, count * head_dim, max_bits);
    } else {
      for (int64_t t = 0; t < count; ++t)
        max_bits = largest_bits(rows + t * source.token_stride, head_dim, max_bits);
    }
    if (max_bits > allowed) within.store(false, std::memory_order_relaxed);
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
