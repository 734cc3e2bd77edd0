// The pack_keys stage: codes against the formula, byte for byte; other slots and pages stay.
#include <algorithm>
#include <limits>

#include "tests/core/page_pool.h"
#include "tests/core/reference.h"

namespace svdq {
namespace {

using reference::Row;
using testing::kFloatRounding;
using testing::PagePool;
using testing::Random;
using testing::Tokens;

class PackKeys : public testing::BackendTest {};

struct KeyCase {
  int64_t num_tokens;
  int64_t slot;
  int head_dim;
  int rotary_pairs;
  DataType dtype;
  testing::HeadBands bands;
};

std::vector<KeyCase> key_cases() {
  const testing::HeadBands mixed = {{{4, 8, 4, 16}}, {{0, 0, 0, 0}}, {{8, 4, 12, 0}}};
  std::vector<KeyCase> cases;
  for (int64_t num_tokens : testing::token_counts()) {
    cases.push_back({num_tokens, 0, 64, 32, DataType::kFloat32, mixed});
    cases.push_back({num_tokens, 37, 64, 0, DataType::kBFloat16, mixed});
  }
  for (int w = 0; w < kNumWidths; ++w) {  // each width alone, as wide as a head
    Bands bands{};
    bands.count[w] = 128;
    cases.push_back({70, 100, 128, 64, DataType::kFloat16, {bands, bands}});
  }
  cases.push_back({1, 191, 80, 40, DataType::kFloat16, {{{4, 20, 12, 8}}}});
  cases.push_back({64, 64, 96, 24, DataType::kBFloat16, {{{8, 24, 12, 24}}, {{0, 0, 0, 8}}}});
  cases.push_back({90, 63, 256, 128, DataType::kFloat32, {{{32, 64, 64, 96}}}});
  cases.push_back({65, 1, 512, 100, DataType::kBFloat16, {{{64, 64, 64, 64}}}});
  cases.push_back({66, 2, 16, 8, DataType::kFloat32, {{{4, 4, 0, 8}}}});
  return cases;
}

TEST_P(PackKeys, MatchesTheFormula) {
  uint64_t stream = 1000;
  for (const KeyCase& c : key_cases()) {
    SCOPED_TRACE(::testing::Message()
                 << c.num_tokens << " tokens from slot " << c.slot << ", head_dim " << c.head_dim);
    Random random(stream++);
    const RopeMode mode = c.rotary_pairs ? RopeMode::kPre : RopeMode::kPost;
    const Layout layout(testing::layout_ints(mode, c.head_dim, c.bands));
    const int num_heads = layout.num_heads();
    const std::vector<float> frequencies = testing::inverse_frequencies(c.rotary_pairs);
    const Rope rope{frequencies.data(), c.rotary_pairs};
    const int64_t position = 500 + c.slot;
    Tokens keys(num_heads, c.num_tokens, c.head_dim, c.dtype);
    keys.fill_like_keys(random, 2.0);
    std::vector<float> mean(num_heads * c.head_dim), scale(layout.rank());
    std::vector<uint16_t> basis(layout.rank() * c.head_dim);
    for (float& x : mean) x = static_cast<float>(random.normal());
    for (uint16_t& x : basis)
      x = float_to_bfloat16(static_cast<float>(random.normal() / std::sqrt(c.head_dim)));

    // Compute latents in double, and scales for which codes fill the whole range and are clamped on both sides.
    std::vector<std::vector<Row>> latents(num_heads);  // [H][channel][T]
    std::vector<double> largest(num_heads);            // norm of a key and the mean together
    for (int h = 0; h < num_heads; ++h) {
      const auto channels = reference::channels_of(layout.view().heads[h]);
      latents[h].resize(channels.size());
      for (int64_t t = 0; t < c.num_tokens; ++t) {
        const Row key = reference::unrotated_key(keys, h, t, c.head_dim, rope, position);
        double key_norm = 0, mean_norm = 0;
        for (int d = 0; d < c.head_dim; ++d) {
          key_norm += key[d] * key[d];
          mean_norm += std::pow(mean[h * c.head_dim + d], 2);
        }
        largest[h] = std::max(largest[h], std::sqrt(key_norm) + std::sqrt(mean_norm));
        for (size_t j = 0; j < channels.size(); ++j) {
          latents[h][j].push_back(reference::project(
              key, &mean[h * c.head_dim], &basis[int64_t{channels[j].row} * c.head_dim]));
        }
      }
      for (size_t j = 0; j < channels.size(); ++j) {
        double furthest = 0;
        for (double x : latents[h][j]) furthest = std::max(furthest, std::fabs(x));
        scale[channels[j].row] = static_cast<float>(1.6 * furthest / (1 << channels[j].width));
      }
    }

    PagePool pool(random, layout.k_page_bytes(), c.slot + c.num_tokens);
    const PagePool before = pool;
    backend().pack_keys({keys.source(),
                         layout.view(),
                         {rope, basis.data(), scale.data(), mean.data(), nullptr},
                         position,
                         pool.bytes.data(),
                         pool.table.data(),
                         c.slot},
                        executor_);

    std::vector<uint8_t> expected = before.bytes;
    int64_t unclear = 0, codes = 0;
    for (int h = 0; h < num_heads; ++h) {
      const auto channels = reference::channels_of(layout.view().heads[h]);
      for (size_t j = 0; j < channels.size(); ++j) {
        const reference::Channel& channel = channels[j];
        double norm = 0;
        for (int d = 0; d < c.head_dim; ++d)
          norm += std::pow(bfloat16_to_float(basis[channel.row * c.head_dim + d]), 2);
        // Largest error of the float latent, in codes: 20 roundings to unrotate and centre a key, the sum over D, then
        // the product with 1 / scale and the sum with mid.
        const double error = largest[h] * std::sqrt(norm) *
                                 (20 * kFloatRounding + testing::sum_rounding(c.head_dim)) /
                                 static_cast<double>(scale[channel.row]) +
                             4 * kFloatRounding * (1 << channel.width);
        const int max_code = (1 << channel.width) - 1;
        for (int64_t t = 0; t < c.num_tokens; ++t) {
          const int64_t slot = c.slot + t;
          const double unrounded =
              latents[h][j][t] / static_cast<double>(scale[channel.row]) + channel.mid();
          const CodeAddress address = channel.address(static_cast<int>(slot % kPageTokens));
          const int got = get_code(pool.page_of(slot), address, channel.width);
          const double low =
              std::clamp(std::round(unrounded - error), 0.0, static_cast<double>(max_code));
          const double high =
              std::clamp(std::round(unrounded + error), 0.0, static_cast<double>(max_code));
          ASSERT_TRUE(got >= low && got <= high)
              << "head " << h << " channel " << j << " token " << t << ": code " << got
              << ", exactly " << unrounded << " of " << channel.width << " bits";
          unclear += low != high;
          ++codes;
          put_code(expected.data() + (pool.page_of(slot) - pool.bytes.data()), address,
                   channel.width, got);
        }
      }
    }
    EXPECT_TRUE(testing::same_bytes(pool.bytes, expected))
        << "bits of other slots or pages changed";
    EXPECT_LE(unclear, codes / 50 + 2) << "the tolerance must not make the test blind";
  }
}

// If no operation rounds, every backend gives the same bytes, for ties and clamped codes too.
TEST_P(PackKeys, ExactArithmeticGivesTheSameBytesOnEveryBackend) {
  constexpr int kDim = 64;
  Random random(2000);
  const Layout layout(testing::layout_ints(RopeMode::kPost, kDim, {{{16, 16, 16, 16}}}));
  Tokens keys(1, 130, kDim, DataType::kFloat32);
  for (int64_t t = 0; t < 130; ++t) {
    for (int d = 0; d < kDim; ++d) keys.set(0, t, d, random.integer(-64, 64) / 4.0);
  }
  std::vector<uint16_t> basis(kDim * kDim, 0);
  std::vector<float> scale(kDim), mean(kDim);
  for (int d = 0; d < kDim; ++d) {
    basis[d * kDim + d] = float_to_bfloat16(1.0f);
    scale[d] = d % 2 ? 0.5f : 2.0f;
    mean[d] = static_cast<float>(random.integer(-8, 8)) / 4.0f;
  }
  PagePool pool(random, layout.k_page_bytes(), 130);
  std::vector<uint8_t> expected = pool.bytes;
  for (const reference::Channel& channel : reference::channels_of(layout.view().heads[0])) {
    for (int64_t t = 0; t < 130; ++t) {
      const double unrounded =
          (keys.get(0, t, channel.row) - mean[channel.row]) / scale[channel.row] + channel.mid();
      // std::nearbyint rounds ties to even.
      const int code =
          static_cast<int>(std::clamp(std::nearbyint(unrounded), 0.0, 2 * channel.mid()));
      put_code(expected.data() + (pool.page_of(t) - pool.bytes.data()),
               channel.address(t % kPageTokens), channel.width, code);
    }
  }
  backend().pack_keys({keys.source(),
                       layout.view(),
                       {{nullptr, 0}, basis.data(), scale.data(), mean.data(), nullptr},
                       0,
                       pool.bytes.data(),
                       pool.table.data(),
                       0},
                      executor_);
  EXPECT_TRUE(testing::same_bytes(pool.bytes, expected));
}

TEST_P(PackKeys, ChannelsWithoutRangeGetAMidCode) {
  const Layout layout(testing::layout_ints(RopeMode::kPost, 16, {{{4, 4, 0, 8}}}));
  Tokens keys(1, 1, 16, DataType::kFloat32);
  for (int d = 0; d < 16; ++d) keys.set(0, 0, d, 3.0);
  const std::vector<uint16_t> basis(16 * 16, float_to_bfloat16(1.0f));
  const std::vector<float> scale(16, 0.0f), mean(16, 0.0f);
  std::vector<uint8_t> page(layout.k_page_bytes(), 0);
  const int32_t table = 0;
  backend().pack_keys({keys.source(),
                       layout.view(),
                       {{nullptr, 0}, basis.data(), scale.data(), mean.data(), nullptr},
                       0,
                       page.data(),
                       &table,
                       0},
                      executor_);
  for (const reference::Channel& channel : reference::channels_of(layout.view().heads[0])) {
    const int code = get_code(page.data(), channel.address(0), channel.width);
    EXPECT_NEAR(code, channel.mid(), 0.5) << channel.width << " bits";
  }
}

SVDQ_ON_EVERY_BACKEND(PackKeys);

}  // namespace
}  // namespace svdq
