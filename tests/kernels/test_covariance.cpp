// The kernels of the basis stage: covariance against plain loops in double and against the CPU
// backend, components against what eigenvectors are.
#include "tests/kernels/device_tokens.h"

#include <algorithm>

#include "csrc/gpu/covariance.h"
#include "tests/core/reference.h"

namespace svdq {
namespace {

using reference::Row;
using testing::DeviceArray;
using testing::DeviceTokens;
using testing::kFloatRounding;
using testing::Random;
using testing::Tokens;

constexpr int kHeads = 2;

struct BasisCase {
  int64_t num_tokens;
  int head_dim;
  int rotary_pairs;
  DataType dtype;
  int64_t position;
  int first_channel = 0;  // of the rows that are read; not 0: no vector may be
  int64_t scratch = gpu::kScratchNumbers;
};

class BasisKernels : public testing::KernelTest {
 protected:
  // Results of the stage, by head: mean, then covariance.
  struct Moments {
    std::vector<float> mean, covariance;
  };

  Moments on_device(const BasisCase& c, const Tokens& keys, const std::vector<float>& inv_freq) {
    const DeviceTokens source(keys, c.first_channel);
    const DeviceArray<float> frequencies(inv_freq), mean(kHeads * c.head_dim),
        covariance(kHeads * c.head_dim * c.head_dim);
    gpu::covariance({source.source(), kHeads, c.head_dim, Rope{frequencies.data(), c.rotary_pairs},
                     c.position, mean.data(), covariance.data()},
                    stream());
    return {mean.read(), covariance.read()};
  }

  void check(const BasisCase& c, uint64_t stream) {
    SCOPED_TRACE(::testing::Message()
                 << c.num_tokens << " tokens, head_dim " << c.head_dim << ", stream " << stream);
    Random random(stream);
    const int dim = c.head_dim;
    Tokens keys(kHeads, c.num_tokens, dim + c.first_channel, c.dtype);
    keys.fill_like_keys(random, 5.0);
    const std::vector<float> inv_freq = testing::inverse_frequencies(c.rotary_pairs);
    const Rope rope{inv_freq.data(), c.rotary_pairs};
    const Moments got = on_device(c, keys, inv_freq);

    for (int h = 0; h < kHeads; ++h) {
      std::vector<Row> rows;
      for (int64_t t = 0; t < c.num_tokens; ++t) {
        Row row(dim);
        for (int d = 0; d < dim; ++d) row[d] = keys.get(h, t, d + c.first_channel);
        reference::rotate(row, rope, -static_cast<double>(c.position + t));
        rows.push_back(row);
      }
      check_head(c, rows, &got.mean[h * dim], &got.covariance[h * dim * dim]);
    }
  }

  // The bounds are those of the CPU backend (tests/core/test_basis.cpp); products are summed in float
  // over all tokens.
  static void check_head(const BasisCase& c, const std::vector<Row>& rows, const float* mean,
                         const float* covariance) {
    const int dim = c.head_dim;
    const auto count = static_cast<double>(c.num_tokens);
    Row centre(dim);
    double largest = 0, spread = 0;
    for (const Row& row : rows) {
      for (int d = 0; d < dim; ++d) centre[d] += row[d] / count;
    }
    for (const Row& row : rows) {
      for (int d = 0; d < dim; ++d) {
        largest = std::max(largest, std::fabs(row[d]));
        spread = std::max(spread, std::fabs(row[d] - centre[d]));
      }
    }
    const double key_error = 20 * kFloatRounding * largest,
                 summing = testing::sum_rounding(c.num_tokens);
    const double tolerance = 2 * key_error * spread + summing * spread * spread;
    for (int i = 0; i < dim; ++i) {
      ASSERT_NEAR(mean[i], centre[i], key_error + summing * spread) << "channel " << i;
      for (int j = i; j < dim; ++j) {
        double expected = 0;
        for (const Row& row : rows) expected += (row[i] - centre[i]) * (row[j] - centre[j]);
        ASSERT_NEAR(covariance[i * dim + j], expected / count, tolerance)
            << "channels " << i << ", " << j;
        ASSERT_EQ(covariance[i * dim + j], covariance[j * dim + i]) << "not symmetric";
      }
    }
  }
};

TEST_P(BasisKernels, CovarianceOfEveryHeadDim) {
  uint64_t stream = 800;
  check({129, 16, 8, DataType::kFloat16, 1}, ++stream);
  check({70, 64, 32, DataType::kFloat32, 7}, ++stream);
  check({130, 80, 40, DataType::kBFloat16, 0}, ++stream);
  check({66, 128, 64, DataType::kBFloat16, 200000}, ++stream);
  check({30, 256, 0, DataType::kBFloat16, 64}, ++stream);
  check({20, 512, 12, DataType::kFloat32, 0}, ++stream);
}

TEST_P(BasisKernels, CovarianceOfEveryCount) {
  uint64_t stream = 820;
  for (int64_t num_tokens : {1, 2, 63, 64, 65, 200}) {
    check({num_tokens, 32, 0, DataType::kFloat32, 0}, ++stream);
    check({num_tokens, 32, 12, DataType::kBFloat16, 1000}, ++stream);  // 12: no vector of pairs
  }
}

TEST_P(BasisKernels, CovarianceOfRowsThatNoVectorStartsAt) {
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16})
    check({67, 48, 16, dtype, 5, 1}, 840 + static_cast<uint64_t>(dtype));
}

// Several products add to the matrix, the last of a few tokens.
TEST_P(BasisKernels, CovarianceInPieces) {
  for (int64_t runs : {1, 2, 3}) {
    check({64 * 5 + 3, 32, 16, DataType::kBFloat16, 9, 0, runs * 64 * kHeads * 32 + 1},
          844 + static_cast<uint64_t>(runs));
  }
}

TEST_P(BasisKernels, CovarianceOfManyTokens) {
  check({testing::environment_number("SVDQ_TEST_TOKENS", 4096 + 70), 16, 8, DataType::kBFloat16, 3},
        850);
}

TEST_P(BasisKernels, CovarianceAgreesWithTheCpu) {
  const BasisCase c{300, 64, 32, DataType::kBFloat16, 17};
  Random random(860);
  Tokens keys(kHeads, c.num_tokens, c.head_dim, c.dtype);
  keys.fill_like_keys(random, 5.0);
  const std::vector<float> inv_freq = testing::inverse_frequencies(c.rotary_pairs);
  const Moments got = on_device(c, keys, inv_freq);
  Moments expected = got;
  current_backend().covariance({keys.source(),
                                kHeads,
                                c.head_dim,
                                {inv_freq.data(), c.rotary_pairs},
                                c.position,
                                expected.mean.data(),
                                expected.covariance.data()},
                               SerialExecutor());
  double largest = 0;
  for (float x : expected.mean) largest = std::max(largest, std::fabs(double{x}));
  // Both are within the bounds above, with keys within 6 deviations, of at most 1, of a mean.
  const double key_error = 20 * kFloatRounding * (largest + 6),
               summing = testing::sum_rounding(c.num_tokens);
  for (size_t i = 0; i < got.mean.size(); ++i)
    ASSERT_NEAR(got.mean[i], expected.mean[i], 2 * (key_error + summing * 6)) << i;
  for (size_t i = 0; i < got.covariance.size(); ++i) {
    ASSERT_NEAR(got.covariance[i], expected.covariance[i], 2 * (2 * key_error * 6 + summing * 36))
        << i;
  }
}

TEST_P(BasisKernels, ComponentsAreTheEigenvectors) {
  for (int dim : {16, 80, 128}) {
    SCOPED_TRACE(::testing::Message() << "head_dim " << dim);
    Random random(870 + dim);
    // Half the rank, so that some eigenvalues are zero and may come out below.
    std::vector<float> matrices(kHeads * dim * dim);
    for (int h = 0; h < kHeads; ++h) {
      std::vector<Row> rows(dim / 2, Row(dim));
      for (Row& row : rows) {
        for (int d = 0; d < dim; ++d) row[d] = std::exp(-3.0 * d / dim) * random.normal();
      }
      for (int i = 0; i < dim; ++i) {
        for (int j = 0; j < dim; ++j) {
          double sum = 0;
          for (const Row& row : rows) sum += row[i] * row[j];
          matrices[(h * dim + i) * dim + j] = static_cast<float>(sum);
        }
      }
    }
    const DeviceArray<float> covariance(matrices), d_components(matrices.size()),
        d_variance(kHeads * dim);
    gpu::components({covariance.data(), kHeads, dim, d_components.data(), d_variance.data()},
                    stream());
    const auto components = d_components.read(), variance = d_variance.read();
    for (int h = 0; h < kHeads; ++h) {
      const float* matrix = &matrices[h * dim * dim];
      const float* rows = &components[h * dim * dim];
      const float* values = &variance[h * dim];
      // A backward stable solver in float is off by a few times dim roundings of the largest
      // eigenvalue; 8 leave room for its way of counting.
      const double error = 8 * dim * kFloatRounding;
      for (int i = 0; i < dim; ++i) {
        ASSERT_GE(values[i], 0.0f);
        ASSERT_LE(values[i], values[std::max(i - 1, 0)]) << "variances fall";
        for (int j = 0; j <= i; ++j) {
          double dot = 0;
          for (int d = 0; d < dim; ++d)
            dot += double{rows[i * dim + d]} * double{rows[j * dim + d]};
          ASSERT_NEAR(dot, i == j, error) << "rows " << i << ", " << j;
        }
        int largest = 0;
        for (int d = 0; d < dim; ++d) {
          double product = 0;
          for (int k = 0; k < dim; ++k)
            product += double{matrix[d * dim + k]} * double{rows[i * dim + k]};
          ASSERT_NEAR(product, double{values[i]} * double{rows[i * dim + d]},
                      2 * error * double{values[0]})
              << "component " << i << " channel " << d;
          if (std::fabs(rows[i * dim + d]) > std::fabs(rows[i * dim + largest])) largest = d;
        }
        ASSERT_GT(rows[i * dim + largest], 0.0f) << "component " << i;
      }
    }
  }
}

// The kernel alone, on rows whose largest numbers are equal.
TEST_P(BasisKernels, SignsFollowTheFirstOfEquals) {
  constexpr int kDim = 48;
  std::vector<float> vectors(kDim * kDim, 0.25f), values(kDim);
  for (int i = 0; i < kDim; ++i) {
    values[i] = static_cast<float>(i - 3);
    vectors[i * kDim + i] = i % 2 ? -2.0f : 2.0f;
    vectors[i * kDim + (i + 33) % kDim] = i % 3 ? 2.0f : -2.0f;
  }
  const DeviceArray<float> from(vectors), rising(values), components(vectors.size()),
      variance(values.size());
  const ComponentsParams p{from.data(), 1, kDim, components.data(), variance.data()};
  launch("components", device::components_launch(p), device::components_kernel, p, rising.data());
  const auto got = components.read(), falling = variance.read();
  for (int i = 0; i < kDim; ++i) {
    const float* row = &vectors[(kDim - 1 - i) * kDim];
    const int first = static_cast<int>(
        std::find_if(row, row + kDim, [](float x) { return std::fabs(x) == 2.0f; }) - row);
    const float sign = row[first] < 0 ? -1.0f : 1.0f;
    EXPECT_EQ(falling[i], std::max(0.0f, values[kDim - 1 - i]));
    for (int d = 0; d < kDim; ++d) ASSERT_EQ(got[i * kDim + d], sign * row[d]) << i << ", " << d;
  }
}

#if !defined(__CUDACC__)  // what cuSOLVER makes of NaN is its own affair
TEST_P(BasisKernels, SolverFailureNamesTheHead) {
  constexpr int kDim = 16;
  std::vector<float> matrices(kHeads * kDim * kDim, 0.0f);
  matrices[kDim * kDim + 1] = matrices[kDim * kDim + kDim] = std::nanf("");
  const DeviceArray<float> covariance(matrices), components(matrices.size()),
      variance(kHeads * kDim);
  try {
    gpu::components({covariance.data(), kHeads, kDim, components.data(), variance.data()},
                    stream());
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("head 1"), std::string::npos) << error.what();
  }
}
#endif

SVDQ_KERNEL_TESTS(BasisKernels);

}  // namespace
}  // namespace svdq
