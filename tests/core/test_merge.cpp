// The merge stage against the formula, empty sides included.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "tests/core/testing.h"

namespace svdq {
namespace {

class Merge : public testing::BackendTest {};

TEST_P(Merge, MatchesTheFormula) {
  const double infinity = std::numeric_limits<double>::infinity();
  const double pairs[][2] = {{0, 0},       {1.5, -2},      {-30, 30},      {700, 690},
                             {-900, -901}, {3, -infinity}, {-infinity, 3}, {-infinity, -infinity},
                             {0.25, 0.25}, {-100, 60},     {1e4, -1e4}};
  constexpr int kRows = std::size(pairs);
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    for (int dim : {16, 80, 512}) {
      testing::Random random(12000 + dim);
      const auto size = static_cast<size_t>(testing::size_of(dtype));
      std::vector<uint8_t> a(kRows * dim * size), b(a.size()), out(a.size(), 0xff);
      std::vector<float> lse_a, lse_b, lse(kRows, std::numeric_limits<float>::quiet_NaN());
      for (int row = 0; row < kRows; ++row) {
        lse_a.push_back(static_cast<float>(pairs[row][0]));
        lse_b.push_back(static_cast<float>(pairs[row][1]));
        for (int d = 0; d < dim; ++d) {
          // The output of an empty side may hold anything.
          const double nan = std::numeric_limits<double>::quiet_NaN();
          testing::write_number(&a[(row * dim + d) * size], dtype,
                                std::isinf(lse_a[row]) ? nan : random.normal());
          testing::write_number(&b[(row * dim + d) * size], dtype,
                                std::isinf(lse_b[row]) ? nan : random.normal());
        }
      }
      backend().merge({kRows, dim, dtype, a.data(), lse_a.data(), b.data(), lse_b.data(),
                       out.data(), lse.data()},
                      executor_);
      for (int row = 0; row < kRows; ++row) {
        const auto weight = [&](double of, double other) {  // of the union
          return std::isinf(of) ? 0 : std::isinf(other) ? 1 : 1 / (1 + std::exp(other - of));
        };
        const double weight_a = weight(lse_a[row], lse_b[row]),
                     weight_b = weight(lse_b[row], lse_a[row]);
        for (int d = 0; d < dim; ++d) {
          const double x =
              weight_a > 0 ? testing::read_number(&a[(row * dim + d) * size], dtype) : 0;
          const double y =
              weight_b > 0 ? testing::read_number(&b[(row * dim + d) * size], dtype) : 0;
          const double expected = weight_a * x + weight_b * y;
          // A handful of float operations, then the rounding of the output.
          const double tolerance =
              8 * testing::kFloatRounding * (weight_a * std::fabs(x) + weight_b * std::fabs(y)) +
              testing::rounding(dtype) * std::fabs(expected) + 0x1p-25;
          ASSERT_NEAR(testing::read_number(&out[(row * dim + d) * size], dtype), expected,
                      tolerance)
              << "row " << row;
        }
        if (weight_a + weight_b == 0) {
          ASSERT_EQ(lse[row], -std::numeric_limits<float>::infinity());
        } else {
          const double max_lse = std::max(lse_a[row], lse_b[row]),
                       min_lse = std::min(lse_a[row], lse_b[row]);
          const double expected = max_lse + std::log1p(std::exp(min_lse - max_lse));
          ASSERT_NEAR(lse[row], expected, 4 * testing::kFloatRounding * (1 + std::fabs(expected)))
              << "row " << row;
        }
      }
    }
  }
}

SVDQ_ON_EVERY_BACKEND(Merge);

}  // namespace
}  // namespace svdq
