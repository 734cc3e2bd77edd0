// The quantizer stage: channel ranges against plain loops in double.
#include <algorithm>
#include <limits>

#include "tests/core/moments.h"

namespace svdq {
namespace {

using reference::Row;
using testing::kFloatRounding;
using testing::Random;
using testing::Tokens;

class Quantizer : public testing::BackendTest {};

// Orthonormal basis vectors by Gram-Schmidt.
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

// A layout of two heads with every width, the inputs of fit_quantizer and its outputs.
struct FittedQuantizer {
  static constexpr int kHeads = 2;
  static constexpr int kDim = 64;

  FittedQuantizer(const Backend& backend, const Executor& executor, int64_t num_tokens,
                  RopeMode mode, bool clip, uint64_t stream)
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
      const Row centre =
          reference::moments_of(reference::unrotated_keys(keys, h, kDim, rope, kPosition)).mean;
      for (int d = 0; d < kDim; ++d) mean[h * kDim + d] = static_cast<float>(centre[d]);
    }
    backend.fit_quantizer({keys.source(), layout.view(), rope, kPosition, clip, mean.data(),
                           components.data(), basis.data(), scale.data(), centred_mean.data()},
                          executor);
  }

  // The component that a channel's row of the basis comes from.
  const float* component(int h, const reference::Channel& channel) const {
    const int j = channel.row - layout.view().heads[h].first_channel;
    return &components[(h * kDim + j) * kDim];
  }

  // Latents of channel `channel` of head h about the given mean.
  Row latents(int h, const reference::Channel& channel) const {
    Row found;
    for (const Row& key : reference::unrotated_keys(keys, h, kDim, rope, kPosition)) {
      found.push_back(reference::project(key, &mean[h * kDim], &basis[channel.row * kDim]));
    }
    return found;
  }

  // Largest error of a latent: the roundings of the key and of the sum, over channels of at most this magnitude.
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

  // Centre of a channel's range, from the returned mean.
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

// Square of the factor, by least squares, from a channel's component to its row.
double row_gain(const FittedQuantizer& q, const reference::Channel& channel,
                const float* component) {
  double product = 0, square = 0;
  for (int d = 0; d < FittedQuantizer::kDim; ++d) {
    const double x = component[d];
    product += x * double{bfloat16_to_float(q.basis[channel.row * FittedQuantizer::kDim + d])};
    square += x * x;
  }
  return std::pow(product / square, 2);
}

TEST_P(Quantizer, RoundsTheFirstComponents) {
  for (bool clip : {false, true}) {
    const FittedQuantizer q(backend(), executor_, 65, RopeMode::kPre, clip, 200);
    for (int h = 0; h < FittedQuantizer::kHeads; ++h) {
      for (const reference::Channel& channel : reference::channels_of(q.layout.view().heads[h])) {
        const float* component = q.component(h, channel);
        const bool scaled = clip && channel.width <= kUnbiasedWidth;
        const double gain = scaled ? row_gain(q, channel, component) : 1;
        EXPECT_GE(gain, 0.99 / kLargestGain);
        EXPECT_LE(gain, 1.01 * kLargestGain);
        for (int d = 0; d < FittedQuantizer::kDim; ++d) {
          const uint16_t number = q.basis[channel.row * FittedQuantizer::kDim + d];
          if (!scaled) {
            ASSERT_EQ(number, float_to_bfloat16(component[d]));
            continue;
          }
          // The factor found has a share of the roundings, at most a whole one.
          const double expected = std::sqrt(gain) * double{component[d]};
          ASSERT_NEAR(bfloat16_to_float(number), expected,
                      2.1 * testing::rounding(DataType::kBFloat16) * std::fabs(expected));
        }
      }
    }
  }
}

TEST_P(Quantizer, DecodedLatentsAreUnbiased) {
  uint64_t stream = 600;
  for (int64_t num_tokens : {int64_t{300}, int64_t{4096}}) {
    for (RopeMode mode : kModes) {
      const FittedQuantizer q(backend(), executor_, num_tokens, mode, true, stream++);
      for (int h = 0; h < FittedQuantizer::kHeads; ++h) {
        for (const reference::Channel& channel : reference::channels_of(q.layout.view().heads[h])) {
          if (channel.width > kUnbiasedWidth) continue;
          const double gain = row_gain(q, channel, q.component(h, channel)),
                       centre = q.centre(h, channel), scale = q.scale[channel.row],
                       mid = channel.mid();
          double square = 0, product = 0;
          for (double latent : q.latents(h, channel)) {
            const double x = latent - centre;
            const double code = std::clamp(std::round(x / scale + mid), 0.0, 2 * mid);
            square += x * x;
            product += x * (code - mid) * scale;
          }
          // Rows have the length of the root of the gain. Basis vectors are orthogonal up to bfloat16 only, so the
          // centre read back is wrong by a fraction of the scale, and some codes differ from those of the fit.
          EXPECT_NEAR(gain * product / square, 1, 0.02)
              << num_tokens << " tokens, head " << h << ", " << channel.width << " bits";
          // Codes of one bit lose a fifth of normal latents without the gain.
          if (channel.width == 1 && mode == RopeMode::kPost) {
            EXPECT_GT(gain, 1.1);
          }
        }
      }
    }
  }
}

TEST_P(Quantizer, SpansMinToMaxWithoutClipping) {
  uint64_t stream = 300;
  for (int64_t num_tokens : testing::token_counts()) {
    for (RopeMode mode : kModes) {
      SCOPED_TRACE(::testing::Message()
                   << num_tokens << " tokens, mode " << static_cast<int>(mode));
      const FittedQuantizer q(backend(), executor_, num_tokens, mode, false, stream++);
      for (int h = 0; h < FittedQuantizer::kHeads; ++h) {
        const double error = q.latent_error(h);
        Row expected_mean(q.mean.begin() + h * FittedQuantizer::kDim,
                          q.mean.begin() + (h + 1) * FittedQuantizer::kDim);
        for (const reference::Channel& channel : reference::channels_of(q.layout.view().heads[h])) {
          const Row latents = q.latents(h, channel);
          const auto [low, high] = std::minmax_element(latents.begin(), latents.end());
          ASSERT_NEAR(q.scale[channel.row], (*high - *low) / ((1 << channel.width) - 1), 2 * error)
              << channel.row;
          for (int d = 0; d < FittedQuantizer::kDim; ++d) {
            expected_mean[d] += (*low + *high) / 2 *
                                static_cast<double>(bfloat16_to_float(
                                    q.basis[channel.row * FittedQuantizer::kDim + d]));
          }
        }
        // Errors of the centres multiply orthonormal basis vectors: their share in one key channel is at most that of
        // one centre.
        for (int d = 0; d < FittedQuantizer::kDim; ++d) {
          ASSERT_NEAR(q.centred_mean[h * FittedQuantizer::kDim + d], expected_mean[d], 2 * error)
              << "channel " << d;
        }
      }
    }
  }
}

// Sum of the fourth powers of the errors of latents in codes of this scale about this centre.
double coding_error(const Row& latents, double centre, double scale, int width) {
  const double max_code = (1 << width) - 1;
  double sum = 0;
  for (double x : latents) {
    const double code = std::clamp(std::round((x - centre) / scale + max_code / 2), 0.0, max_code);
    const double miss = x - centre - (code - max_code / 2) * scale;
    sum += std::pow(miss, 4);
  }
  return sum;
}

TEST_P(Quantizer, ClippingFindsTheRangeOfSmallestError) {
  // Smallest mean fourth power of the error of uniform codes of 1, 2 and 4 bits for a normal variable of variance 1,
  // by integration: at half ranges of 1.00, 1.86 and 3.22 deviations.
  const auto smallest_error = [](int width) {
    return width == 1 ? 0.4254 : width == 2 ? 0.0486 : 0.000541;
  };
  uint64_t stream = 400;
  for (int64_t num_tokens :
       {int64_t{63}, int64_t{64}, int64_t{1000}, int64_t{4096}, int64_t{5000}}) {
    for (RopeMode mode : kModes) {
      const FittedQuantizer q(backend(), executor_, num_tokens, mode, true, stream++);
      for (int h = 0; h < FittedQuantizer::kHeads; ++h) {
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
          // Basis vectors are orthogonal up to bfloat16 only, so the centre read back is wrong by a fraction of the
          // scale and the rounding errors differ. The mean of the fourth powers of T errors that are uniform over the
          // scale has a relative deviation of 0.9 / sqrt(T); allow four times that.
          const double noise = 1 + 4 * 0.9 / std::sqrt(count);
          if (num_tokens <= 4096) {  // longer inputs are sampled, and a sample may miss the largest
            EXPECT_LE(found, noise * coding_error(latents, (*low + *high) / 2, (*high - *low) / top,
                                                  channel.width));
          }
          // Unrotated keys are not normal.
          if (num_tokens < 1000 || channel.width == 8 || mode == RopeMode::kPre) continue;
          for (double multiple = 0.4; multiple < 7.5; multiple *= 1.25) {
            const double scale = 2 * multiple * std::sqrt(squares) / top;
            EXPECT_LE(found, noise * coding_error(latents, mean, scale, channel.width))
                << multiple << " deviations";
          }
          // At 4 bits a fifth of the error comes from the 0.7 % that are clipped: some thirty numbers of 4096, whose
          // share varies by tens of per cent.
          if (num_tokens >= 4096) {
            EXPECT_LE(found / count, 1.3 * smallest_error(channel.width) * squares);
          }
        }
      }
    }
  }
}

TEST_P(Quantizer, ConstantKeysHaveNoRange) {
  for (bool clip : {false, true}) {
    const FittedQuantizer q(backend(), executor_, 1, RopeMode::kPost, clip, 500);
    for (float scale : q.scale) EXPECT_EQ(scale, 0.0f);
    // The mean moves so that decoding gives the key's share in the coded channels for any codes.
    for (int h = 0; h < FittedQuantizer::kHeads; ++h) {
      for (const reference::Channel& channel : reference::channels_of(q.layout.view().heads[h])) {
        // Basis vectors are orthogonal up to bfloat16; the error is spread over all of them.
        EXPECT_NEAR(q.centre(h, channel), q.latents(h, channel)[0],
                    0.02 * std::sqrt(FittedQuantizer::kDim));
      }
    }
  }
}

SVDQ_ON_EVERY_BACKEND(Quantizer);

}  // namespace
}  // namespace svdq
