// Helpers of all tests: seeds, inputs with gaps between rows, an executor in another order, layouts by short names.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "csrc/core/backend.h"
#include "csrc/core/error.h"
#include "csrc/core/layout.h"
#include "csrc/core/scalar.h"

namespace svdq::testing {

// Relative rounding errors of float and of numbers stored as a dtype: half a unit in the last place.
inline constexpr double kFloatRounding = 0x1p-24;
inline double rounding(DataType dtype) {
  return dtype == DataType::kFloat32    ? kFloatRounding
         : dtype == DataType::kBFloat16 ? 0x1p-8
                                        : 0x1p-11;
}

// Rounding errors of a sum of n terms are nearly independent and add up like a random walk: to less than
// 6 * sqrt(n) roundings of the sum of the magnitudes.
inline double sum_rounding(int64_t n) {
  return 6 * std::sqrt(static_cast<double>(n)) * kFloatRounding;
}

// A number from the environment, to search for failures with other seeds and sizes.
inline int64_t environment_number(const char* name, int64_t fallback) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoll(text) : fallback;
}

class Random {
 public:
  // `stream` differs by test; the environment variable SVDQ_TEST_SEED changes all of them.
  explicit Random(uint64_t stream)
      : engine_(1000003 * static_cast<uint64_t>(environment_number("SVDQ_TEST_SEED", 1)) + stream) {
  }

  double normal() { return normal_(engine_); }
  int integer(int first, int last) {
    return std::uniform_int_distribution<int>(first, last)(engine_);
  }
  void fill(std::vector<uint8_t>& bytes) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(engine_());
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// Lengths near the page size and one of many pages; SVDQ_TEST_TOKENS adds another.
inline std::vector<int64_t> token_counts() {
  std::vector<int64_t> counts = {1, 63, 64, 65, 4097};
  if (const int64_t extra = environment_number("SVDQ_TEST_TOKENS", 0)) counts.push_back(extra);
  return counts;
}

inline int64_t size_of(DataType dtype) { return dtype == DataType::kFloat32 ? 4 : 2; }

inline double read_number(const uint8_t* from, DataType dtype) {
  if (dtype == DataType::kFloat32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  return dtype == DataType::kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

inline void write_number(uint8_t* to, DataType dtype, double number) {
  const float value = static_cast<float>(number);
  const uint16_t bits =
      dtype == DataType::kBFloat16 ? float_to_bfloat16(value) : float_to_half(value);
  dtype == DataType::kFloat32 ? std::memcpy(to, &value, 4) : std::memcpy(to, &bits, 2);
}

// Keys or values [H, T, D] with tokens outermost and a gap of NaN after each row, to detect wrong strides and reads past
// a row.
class Tokens {
 public:
  Tokens(int num_heads, int64_t num_tokens, int head_dim, DataType dtype)
      : num_heads_(num_heads),
        num_tokens_(num_tokens),
        stride_(head_dim + kGap),
        dtype_(dtype),
        bytes_(static_cast<size_t>(num_heads * num_tokens * stride_ * size_of(dtype)), 0xff) {}

  double get(int h, int64_t t, int d) const { return read_number(&bytes_[place(h, t, d)], dtype_); }
  void set(int h, int64_t t, int d, double number) {
    write_number(&bytes_[place(h, t, d)], dtype_, number);
  }

  // Normal numbers about a mean per channel, with standard deviations that fall along the channels.
  void fill_like_keys(Random& random, double mean) {
    const int64_t dim = stride_ - kGap;
    for (int h = 0; h < num_heads_; ++h) {
      for (int d = 0; d < dim; ++d) {
        const double centre = mean * random.normal(),
                     deviation = std::exp(-3.0 * d / static_cast<double>(dim));
        for (int64_t t = 0; t < num_tokens_; ++t)
          set(h, t, d, centre + deviation * random.normal());
      }
    }
  }

  int64_t num_tokens() const { return num_tokens_; }
  TokenSource source() const {
    return {bytes_.data(), dtype_, stride_, num_heads_ * stride_, num_tokens_};
  }

 private:
  static constexpr int64_t kGap = 24;

  size_t place(int h, int64_t t, int d) const {
    return static_cast<size_t>(((t * num_heads_ + h) * stride_ + d) * size_of(dtype_));
  }

  int64_t num_heads_;
  int64_t num_tokens_;
  int64_t stride_;
  DataType dtype_;
  std::vector<uint8_t> bytes_;
};

// Runs the tasks in reverse order, on three workers in rotation: results must not depend on either.
class ShuffledExecutor : public Executor {
 public:
  int workers() const override { return 3; }
  void run(int64_t num_tasks, void (*fn)(void*, int64_t, int), void* context) const override {
    for (int64_t task = num_tasks - 1; task >= 0; --task)
      fn(context, task, static_cast<int>(task % 3));
  }
};

using HeadBands = std::vector<Bands>;  // one per head

// Bits of the values of each head; heads past the last one begin again.
class ValueBits {
 public:
  ValueBits(int bits) : bits_{bits} {}
  ValueBits(std::initializer_list<int> bits) : bits_(bits) {}
  ValueBits(std::vector<int> bits) : bits_(std::move(bits)) {}
  int of(size_t head) const { return bits_[head % bits_.size()]; }
  bool packed() const { return bits_[0] <= 4; }

 private:
  std::vector<int> bits_;
};

// `pre` is for hybrid layouts, whose post-RoPE channels are `heads`; empty: no pre-RoPE channels.
inline std::vector<int64_t> layout_ints(RopeMode rope, int head_dim, const HeadBands& heads,
                                        const ValueBits& v_bits = 4, const HeadBands& pre = {}) {
  const ValueCoding coding = v_bits.packed() ? ValueCoding::kPlain : ValueCoding::kNumbers;
  std::vector<int64_t> ints = {kFormatVersion,
                               static_cast<int64_t>(heads.size()),
                               head_dim,
                               static_cast<int64_t>(rope),
                               static_cast<int64_t>(KeyCoding::kPlain),
                               static_cast<int64_t>(coding)};
  for (size_t h = 0; h < heads.size(); ++h) {
    const Bands own = rope == RopeMode::kPre ? heads[h] : pre.empty() ? Bands{} : pre[h];
    for (int count : own.count) ints.push_back(count);
    for (int count : heads[h].count) ints.push_back(rope == RopeMode::kPre ? 0 : count);
    ints.push_back(v_bits.of(h));
  }
  return ints;
}

// Inverse frequencies of rotary_pairs pairs, as in language models.
inline std::vector<float> inverse_frequencies(int rotary_pairs) {
  std::vector<float> frequencies;
  for (int i = 0; i < rotary_pairs; ++i)
    frequencies.push_back(static_cast<float>(std::pow(1e5, -double(i) / rotary_pairs)));
  return frequencies;
}

// Compares pages; the message has the first difference and the number of different bytes.
inline ::testing::AssertionResult same_bytes(const std::vector<uint8_t>& got,
                                             const std::vector<uint8_t>& expected) {
  if (got.size() != expected.size()) {
    return ::testing::AssertionFailure() << got.size() << " bytes instead of " << expected.size();
  }
  size_t first = got.size(), count = 0;
  for (size_t i = got.size(); i-- > 0;) {
    if (got[i] != expected[i]) first = i, ++count;
  }
  if (count == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << count << " of " << got.size() << " bytes differ, first byte " << first << ": "
         << int{got[first]} << " instead of " << int{expected[first]};
}

// Tests of a stage run on every backend of this machine.
class BackendTest : public ::testing::TestWithParam<const Backend*> {
 protected:
  const Backend& backend() const { return *GetParam(); }
  ShuffledExecutor executor_;
};

inline std::string backend_name(const ::testing::TestParamInfo<const Backend*>& info) {
  return info.param->name;
}

#define SVDQ_ON_EVERY_BACKEND(fixture)                                                      \
  INSTANTIATE_TEST_SUITE_P(Cpu, fixture, ::testing::ValuesIn(::svdq::available_backends()), \
                           ::svdq::testing::backend_name)

}  // namespace svdq::testing
