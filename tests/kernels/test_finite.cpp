// The kernel that checks inputs: every bad number is found, wherever it is, and nothing else.
#include "tests/kernels/device_tokens.h"

#include <array>
#include <limits>

#include "csrc/gpu/finite.h"

namespace svdq {
namespace {

using testing::DeviceTokens;
using testing::Random;
using testing::Tokens;

constexpr int kHeads = 3;
constexpr float kLimit = 1024.0f;
constexpr float kLargest = std::numeric_limits<float>::max();

class FiniteKernels : public testing::KernelTest {
 protected:
  bool within(const Tokens& tokens, int head_dim, float limit, int first_channel = 0) {
    const DeviceTokens device(tokens, first_channel);
    return gpu::all_finite({device.source(), kHeads, head_dim, limit}, stream());
  }
};

TEST_P(FiniteKernels, FindEveryBadNumber) {
  constexpr int kDim = 80;
  const float infinity = std::numeric_limits<float>::infinity();
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    for (int64_t num_tokens : {1, 65}) {
      SCOPED_TRACE(::testing::Message() << num_tokens << " tokens");
      Random random(600);
      Tokens tokens(kHeads, num_tokens, kDim, dtype);
      tokens.fill_like_keys(random, 1.0);
      EXPECT_TRUE(within(tokens, kDim, kLimit)) << "the gaps between rows are not part of it";
      EXPECT_TRUE(within(tokens, kDim, kLargest));
      const auto bad_numbers = {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity,
                                1032.0f, -1032.0f};
      const std::array<std::array<int64_t, 3>, 3> places = {
          {{0, 0, 0}, {kHeads - 1, num_tokens - 1, kDim - 1}, {1, num_tokens / 2, 41}}};
      for (const auto& [h, t, d] : places) {
        const int head = static_cast<int>(h), channel = static_cast<int>(d);
        const double before = tokens.get(head, t, channel);
        for (float bad : bad_numbers) {
          tokens.set(head, t, channel, double{bad});
          EXPECT_FALSE(within(tokens, kDim, kLimit))
              << bad << " at " << h << ", " << t << ", " << d;
          EXPECT_EQ(within(tokens, kDim, kLargest), std::isfinite(bad)) << bad;
        }
        for (double good : {double{kLimit}, -double{kLimit}}) {
          tokens.set(head, t, channel, good);
          EXPECT_TRUE(within(tokens, kDim, kLimit)) << "the limit itself is allowed";
        }
        tokens.set(head, t, channel, before);
      }
    }
  }
}

// Rows that start off a vector's alignment, and the channels before and after them left out.
TEST_P(FiniteKernels, ReadNothingBesideTheRows) {
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16}) {
    for (int head_dim : {16, 512}) {
      Random random(610);
      const int64_t num_tokens = testing::environment_number("SVDQ_TEST_TOKENS", 67);
      Tokens tokens(kHeads, num_tokens, head_dim + 2, dtype);
      tokens.fill_like_keys(random, 1.0);
      for (int64_t t = 0; t < num_tokens; ++t) {
        for (int h = 0; h < kHeads; ++h) {
          tokens.set(h, t, 0, double{kLargest});
          tokens.set(h, t, head_dim + 1, double{kLargest});
        }
      }
      EXPECT_TRUE(within(tokens, head_dim, kLimit, 1)) << head_dim;
      EXPECT_FALSE(within(tokens, head_dim, kLimit, 0)) << head_dim;
      tokens.set(kHeads - 1, num_tokens - 1, head_dim, double{kLargest});
      EXPECT_FALSE(within(tokens, head_dim, kLimit, 1)) << head_dim;
    }
  }
}

TEST_P(FiniteKernels, NothingIsWithin) {
  EXPECT_TRUE(within(Tokens(kHeads, 0, 64, DataType::kFloat32), 64, kLimit));
}

#if !defined(__CUDACC__)
// Aligned rows move in whole sectors, each once.
TEST_P(FiniteKernels, ReadCoalesced) {
  Random random(620);
  Tokens tokens(kHeads, 64, 104, DataType::kBFloat16);  // a stride of whole sectors
  tokens.fill_like_keys(random, 1.0);
  EXPECT_TRUE(within(tokens, 64, kLimit));
  EXPECT_EQ(counters_.wasted_sectors(16), 0);
}
#endif

SVDQ_KERNEL_TESTS(FiniteKernels);

}  // namespace
}  // namespace svdq
