// The basis stage: covariance and channel ranges against plain loops in double, and the check of
// inputs.
#include <algorithm>
#include <array>
#include <limits>

#include "tests/core/reference.h"

namespace svdq {
namespace {

using reference::Row;
using testing::kFloatRounding;
using testing::Random;
using testing::Tokens;

class Basis : public testing::BackendTest {};

struct Moments {
  Row mean;                     // [D]
  std::vector<Row> covariance;  // [D][D]
  double largest;               // magnitude of a key
  double spread;                // largest distance from the mean
};

Moments moments_of(const std::vector<Row>& keys) {
  const size_t dim = keys[0].size();
  const auto count = static_cast<double>(keys.size());
  Moments m{Row(dim), std::vector<Row>(dim, Row(dim)), 0, 0};
  for (const Row& key : keys) {
    for (size_t d = 0; d < dim; ++d) m.mean[d] += key[d] / count;
  }
  for (const Row& key : keys) {
    for (size_t i = 0; i < dim; ++i) {
      m.largest = std::max(m.largest, std::fabs(key[i]));
      m.spread = std::max(m.spread, std::fabs(key[i] - m.mean[i]));
      for (size_t j = 0; j < dim; ++j) {
        m.covariance[i][j] += (key[i] - m.mean[i]) * (key[j] - m.mean[j]) / count;
      }
    }
  }
  return m;
}

std::vector<Row> unrotated_keys(const Tokens& keys, int h, int head_dim, const Rope& rope,
                                int64_t position) {
  std::vector<Row> rows;
  for (int64_t t = 0; t < keys.num_tokens(); ++t) {
    rows.push_back(reference::unrotated_key(keys, h, t, head_dim, rope, position));
  }
  return rows;
}

struct BasisCase {
  int64_t num_tokens;
  int head_dim;
  int rotary_pairs;
  DataType dtype;
  int64_t position;
};

std::vector<BasisCase> basis_cases() {
  std::vector<BasisCase> cases = {
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

TEST_P(Basis, CovarianceMatchesTheFormula) {
  constexpr int kHeads = 2;
  uint64_t stream = 100;
  for (const BasisCase& c : basis_cases()) {
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
      const Moments expected = moments_of(unrotated_keys(keys, h, c.head_dim, rope, c.position));
      // Turning a key back and taking a shift off costs under 20 roundings of the key. Products are
      // then summed, in float over at most 4096 tokens, about a shift that is no further from the
      // mean than the keys are.
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

// Orthonormal rows by Gram-Schmidt.
std::vector<float> random_components(Random& random, int num_heads, int head_dim) {
  std::vector<float> components;
  for (int h = 0; h < num_heads; ++h) {
    std::vector<Row> rows;
    while (static_cast<int>(rows.size()) < head_dim) {
      Row row(head_dim);
      for (double& x : row) x = random.normal();
      for (int pass = 0; pass < 2; ++pass) {
        for (const Row& other : rows) {
          double dot = 0;
          for (int d = 0; d < head_dim; ++d) dot += row[d] * other[d];
          for (int d = 0; d < head_dim; ++d) row[d] -= dot * other[d];
        }
      }
      double norm = 0;
      for (double x : row) norm += x * x;
      for (double& x : row) x /= std::sqrt(norm);
      rows.push_back(row);
      components.insert(components.end(), row.begin(), row.end());
    }
  }
  return components;
}

// A layout of two heads with every width, the inputs of fit_quantizer and what it gives.
struct Quantizer {
  static constexpr int kHeads = 2;
  static constexpr int kDim = 64;

  Quantizer(const Backend& backend, const Executor& executor, int64_t num_tokens, RopeMode mode,
            bool clip, uint64_t stream)
      : random(stream),
        layout(testing::layout_ints(mode, kDim, {{{4, 8, 4, 8}}, {{0, 4, 8, 16}}})),
        frequencies(testing::inverse_frequencies(mode == RopeMode::kPre ? kDim / 2 : 0)),
        rope{frequencies.data(), static_cast<int>(frequencies.size())},
        keys(kHeads, num_tokens, kDim, DataType::kFloat32),
        components(random_components(random, kHeads, kDim)),
        mean(kHeads * kDim),
        basis(layout.rank() * kDim, 0xffff),
        scale(layout.rank(), std::numeric_limits<float>::quiet_NaN()),
        centred_mean(kHeads * kDim, std::numeric_limits<float>::quiet_NaN()) {
    keys.fill_like_keys(random, 2.0);
    for (int h = 0; h < kHeads; ++h) {
      const Row centre = moments_of(unrotated_keys(keys, h, kDim, rope, kPosition)).mean;
      for (int d = 0; d < kDim; ++d) mean[h * kDim + d] = static_cast<float>(centre[d]);
    }
    backend.fit_quantizer({keys.source(), layout.view(), rope, kPosition, clip, mean.data(),
                           components.data(), basis.data(), scale.data(), centred_mean.data()},
                          executor);
  }

  // Latents of channel `channel` of head h, about the mean given.
  Row latents(int h, const reference::Channel& channel) const {
    Row found;
    for (const Row& key : unrotated_keys(keys, h, kDim, rope, kPosition)) {
      found.push_back(reference::project(key, &mean[h * kDim], &basis[channel.row * kDim]));
    }
    return found;
  }

  // What the latents may be wrong by: the key's and the sum's roundings, over channels of at most
  // this magnitude.
  double latent_error(int h) const {
    double largest = 0;
    for (int64_t t = 0; t < keys.num_tokens(); ++t) {
      for (int d = 0; d < kDim; ++d) largest = std::max(largest, std::fabs(keys.get(h, t, d)));
    }
    for (int d = 0; d < kDim; ++d)
      largest = std::max(largest, std::fabs(static_cast<double>(mean[h * kDim + d])));
    // A key and a row of the basis have norms of at most 2 sqrt(D) * largest and about 1.
    return 2 * std::sqrt(kDim) * largest * (20 * kFloatRounding + testing::sum_rounding(kDim));
  }

  // centre_j of each channel of head h, from the mean that came back.
  double centre(int h, const reference::Channel& channel) const {
    double sum = 0;
    for (int d = 0; d < kDim; ++d) {
      sum += (static_cast<double>(centred_mean[h * kDim + d]) -
              static_cast<double>(mean[h * kDim + d])) *
             static_cast<double>(bfloat16_to_float(basis[channel.row * kDim + d]));
    }
    return sum;
  }

  static constexpr int64_t kPosition = 300;
  Random random;
  Layout layout;
  std::vector<float> frequencies;
  Rope rope;
  Tokens keys;
  std::vector<float> components, mean;
  std::vector<uint16_t> basis;
  std::vector<float> scale, centred_mean;
};

constexpr RopeMode kModes[] = {RopeMode::kPre, RopeMode::kPost};

TEST_P(Basis, QuantizerRoundsTheLeadingComponents) {
  const Quantizer q(backend(), executor_, 65, RopeMode::kPre, true, 200);
  for (int h = 0; h < Quantizer::kHeads; ++h) {
    const HeadPlan& head = q.layout.view().heads[h];
    for (int j = 0; j < head.rank(); ++j) {
      for (int d = 0; d < Quantizer::kDim; ++d) {
        const float component = q.components[(h * Quantizer::kDim + j) * Quantizer::kDim + d];
        ASSERT_EQ(q.basis[(head.first_channel + j) * Quantizer::kDim + d],
                  float_to_bfloat16(component));
      }
    }
  }
}

TEST_P(Basis, QuantizerSpansMinToMaxWithoutClipping) {
  uint64_t stream = 300;
  for (int64_t num_tokens : testing::token_counts()) {
    for (RopeMode mode : kModes) {
      SCOPED_TRACE(::testing::Message()
                   << num_tokens << " tokens, mode " << static_cast<int>(mode));
      const Quantizer q(backend(), executor_, num_tokens, mode, false, stream++);
      for (int h = 0; h < Quantizer::kHeads; ++h) {
        const double error = q.latent_error(h);
        Row expected_mean(q.mean.begin() + h * Quantizer::kDim,
                          q.mean.begin() + (h + 1) * Quantizer::kDim);
        for (const reference::Channel& channel : reference::channels_of(q.layout.view().heads[h])) {
          const Row latents = q.latents(h, channel);
          const auto [low, high] = std::minmax_element(latents.begin(), latents.end());
          ASSERT_NEAR(q.scale[channel.row], (*high - *low) / ((1 << channel.width) - 1), 2 * error)
              << channel.row;
          for (int d = 0; d < Quantizer::kDim; ++d) {
            expected_mean[d] +=
                (*low + *high) / 2 *
                static_cast<double>(bfloat16_to_float(q.basis[channel.row * Quantizer::kDim + d]));
          }
        }
        // Errors of the centres meet orthonormal rows: their share in one channel is no more than
        // that of one centre.
        for (int d = 0; d < Quantizer::kDim; ++d) {
          ASSERT_NEAR(q.centred_mean[h * Quantizer::kDim + d], expected_mean[d], 2 * error)
              << "channel " << d;
        }
      }
    }
  }
}

// Fourth power of the error of coding latents in codes of this scale about this centre.
double coding_error(const Row& latents, double centre, double scale, int width) {
  const double top = (1 << width) - 1;
  double sum = 0;
  for (double x : latents) {
    const double code = std::clamp(std::round((x - centre) / scale + top / 2), 0.0, top);
    const double miss = x - centre - (code - top / 2) * scale;
    sum += std::pow(miss, 4);
  }
  return sum;
}

TEST_P(Basis, ClippingFindsTheRangeOfLeastError) {
  // Least mean fourth power of the error of uniform codes of 1, 2 and 4 bits for a normal variable of
  // variance 1, by integration: at half ranges of 1.00, 1.86 and 3.22 deviations.
  const auto least_error = [](int width) {
    return width == 1 ? 0.4254 : width == 2 ? 0.0486 : 0.000541;
  };
  uint64_t stream = 400;
  for (int64_t num_tokens :
       {int64_t{63}, int64_t{64}, int64_t{1000}, int64_t{4096}, int64_t{5000}}) {
    for (RopeMode mode : kModes) {
      const Quantizer q(backend(), executor_, num_tokens, mode, true, stream++);
      for (int h = 0; h < Quantizer::kHeads; ++h) {
        for (const reference::Channel& channel : reference::channels_of(q.layout.view().heads[h])) {
          SCOPED_TRACE(::testing::Message()
                       << num_tokens << " tokens, head " << h << ", " << channel.width << " bits");
          const Row latents = q.latents(h, channel);
          const double top = (1 << channel.width) - 1, count = static_cast<double>(latents.size());
          double mean = 0, squares = 0;
          for (double x : latents) mean += x / count;
          for (double x : latents) squares += (x - mean) * (x - mean) / count;
          const double found =
              coding_error(latents, q.centre(h, channel), q.scale[channel.row], channel.width);
          const auto [low, high] = std::minmax_element(latents.begin(), latents.end());
          // Rows of the basis are orthogonal up to bfloat16 only, so the centre read back is off by a
          // fraction of a step and the rounding errors are others. The squares of T errors that are
          // spread evenly over a step have a mean that is off by 0.9 / sqrt(T) of itself; allow four
          // times that.
          const double noise = 1 + 4 * 0.9 / std::sqrt(count);
          if (num_tokens <= 4096) {  // more are sampled, and a sample may miss the largest
            EXPECT_LE(found, noise * coding_error(latents, (*low + *high) / 2, (*high - *low) / top,
                                                  channel.width));
          }
          // Keys that were turned back are not normal.
          if (num_tokens < 1000 || channel.width == 8 || mode == RopeMode::kPre) continue;
          for (double multiple = 0.4; multiple < 7.5; multiple *= 1.25) {
            const double scale = 2 * multiple * std::sqrt(squares) / top;
            EXPECT_LE(found, noise * coding_error(latents, mean, scale, channel.width))
                << multiple << " deviations";
          }
          // At 4 bits a fifth of the error comes from the 0.7 % that are cut off: some thirty numbers
          // of 4096, whose share varies by tens of per cent.
          if (num_tokens >= 4096) {
            EXPECT_LE(found / count, 1.3 * least_error(channel.width) * squares);
          }
        }
      }
    }
  }
}

TEST_P(Basis, ConstantKeysHaveNoRange) {
  for (bool clip : {false, true}) {
    const Quantizer q(backend(), executor_, 1, RopeMode::kPost, clip, 500);
    for (float scale : q.scale) EXPECT_EQ(scale, 0.0f);
    // The mean moves so that decoding gives the key's share in the coded channels, whatever the
    // codes are.
    for (int h = 0; h < Quantizer::kHeads; ++h) {
      for (const reference::Channel& channel : reference::channels_of(q.layout.view().heads[h])) {
        // Rows of the basis are orthogonal up to bfloat16: rank of them share what is off.
        EXPECT_NEAR(q.centre(h, channel), q.latents(h, channel)[0],
                    0.02 * std::sqrt(Quantizer::kDim));
      }
    }
  }
}

TEST_P(Basis, AllWithinFindsEveryBadNumber) {
  constexpr int kHeads = 2, kDim = 80;
  const float infinity = std::numeric_limits<float>::infinity();
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    for (int64_t num_tokens : {1, 65, 2050}) {
      Random random(600);
      Tokens tokens(kHeads, num_tokens, kDim, dtype);
      tokens.fill_like_keys(random, 1.0);
      const float limit = 1024.0f;
      const auto ok = [&](float bound) {
        return backend().all_finite({tokens.source(), kHeads, kDim, bound}, executor_);
      };
      EXPECT_TRUE(ok(limit)) << "the gaps between rows are not part of the input";
      EXPECT_TRUE(ok(std::numeric_limits<float>::max()));
      for (float bad :
           {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity, 1032.0f, -1032.0f}) {
        for (const auto& [h, t, d] : {std::array<int64_t, 3>{0, 0, 0},
                                      {1, num_tokens - 1, kDim - 1},
                                      {0, num_tokens / 2, 41}}) {
          const double before = tokens.get(static_cast<int>(h), t, static_cast<int>(d));
          tokens.set(static_cast<int>(h), t, static_cast<int>(d), static_cast<double>(bad));
          EXPECT_FALSE(ok(limit)) << bad << " at " << h << ", " << t << ", " << d;
          tokens.set(static_cast<int>(h), t, static_cast<int>(d), static_cast<double>(-limit));
          EXPECT_TRUE(ok(limit)) << "the limit itself is allowed";
          tokens.set(static_cast<int>(h), t, static_cast<int>(d), before);
        }
      }
    }
  }
}

SVDQ_ON_EVERY_BACKEND(Basis);

}  // namespace
}  // namespace svdq
