// The covariance stage against plain loops in double.
#include <algorithm>
#include <limits>

#include "tests/core/moments.h"

namespace svdq {
namespace {

using testing::kFloatRounding;
using testing::Random;
using testing::Tokens;

class Covariance : public testing::BackendTest {};

struct CovarianceCase {
  int64_t num_tokens;
  int head_dim;
  int rotary_pairs;
  DataType dtype;
  int64_t position;
};

std::vector<CovarianceCase> covariance_cases() {
  std::vector<CovarianceCase> cases = {
      {130, 80, 40, DataType::kBFloat16, 0}, {130, 96, 12, DataType::kFloat16, 100000},
      {70, 128, 64, DataType::kFloat32, 7},  {66, 256, 128, DataType::kBFloat16, 64},
      {65, 512, 0, DataType::kFloat32, 0},   {129, 16, 8, DataType::kFloat16, 1},
  };
  for (int64_t num_tokens : testing::token_counts()) {
    cases.push_back({num_tokens, 64, 0, DataType::kFloat32, 0});
    cases.push_back({num_tokens, 64, 32, DataType::kBFloat16, 1000});
  }
  return cases;
}

TEST_P(Covariance, MatchesTheFormula) {
  constexpr int kHeads = 2;
  uint64_t stream = 100;
  for (const CovarianceCase& c : covariance_cases()) {
    SCOPED_TRACE(::testing::Message() << c.num_tokens << " tokens, head_dim " << c.head_dim);
    Random random(stream++);
    Tokens keys(kHeads, c.num_tokens, c.head_dim, c.dtype);
    keys.fill_like_keys(random, 5.0);
    const std::vector<float> frequencies = testing::inverse_frequencies(c.rotary_pairs);
    const Rope rope{frequencies.data(), c.rotary_pairs};
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> mean(kHeads * c.head_dim, nan),
        covariance(kHeads * c.head_dim * c.head_dim, nan);
    backend().covariance(
        {keys.source(), kHeads, c.head_dim, rope, c.position, mean.data(), covariance.data()},
        executor_);

    for (int h = 0; h < kHeads; ++h) {
      const reference::Moments expected =
          reference::moments_of(reference::unrotated_keys(keys, h, c.head_dim, rope, c.position));
      // Unrotating a key and subtracting a shift costs under 20 roundings of the key. Products are then summed, in
      // float over at most 4096 tokens, about a shift that is as close to the mean as the keys are.
      const double key_error = 20 * kFloatRounding * expected.largest;
      const double summing = testing::sum_rounding(std::min<int64_t>(c.num_tokens, 4096));
      const double mean_tolerance = key_error + summing * expected.spread;
      const double tolerance =
          2 * key_error * expected.spread + summing * expected.spread * expected.spread;
      for (int i = 0; i < c.head_dim; ++i) {
        ASSERT_NEAR(mean[h * c.head_dim + i], expected.mean[i], mean_tolerance)
            << "head " << h << " channel " << i;
        for (int j = 0; j < c.head_dim; ++j) {
          const float got = covariance[(h * c.head_dim + i) * c.head_dim + j];
          ASSERT_NEAR(got, expected.covariance[i][j], tolerance)
              << "head " << h << " channels " << i << ", " << j;
          ASSERT_EQ(got, covariance[(h * c.head_dim + j) * c.head_dim + i]) << "not symmetric";
        }
      }
    }
  }
}

SVDQ_ON_EVERY_BACKEND(Covariance);

}  // namespace
}  // namespace svdq
