// The pack stage: codes of keys and values against the formula, byte for byte, and what must stay
// as it was.
#include <algorithm>
#include <limits>

#include "tests/core/reference.h"

namespace svdq {
namespace {

using reference::Row;
using testing::kFloatRounding;
using testing::Random;
using testing::Tokens;

class Pack : public testing::BackendTest {};

// Pages of a sequence scattered over a pool of random bytes.
struct Pool {
  Pool(Random& random, int64_t page_bytes, int64_t num_slots) : page_bytes(page_bytes) {
    const int64_t pages = (num_slots + kPageTokens - 1) / kPageTokens;
    for (int64_t i = 0; i < pages; ++i)
      table.push_back(static_cast<int32_t>((pages - 1 - i) * 2 + 1));
    bytes.resize((2 * pages + 1) * page_bytes);
    random.fill(bytes);
  }

  const uint8_t* page_of(int64_t slot) const { return page_of(slot, bytes); }
  const uint8_t* page_of(int64_t slot, const std::vector<uint8_t>& all) const {
    return all.data() + table[slot / kPageTokens] * page_bytes;
  }

  int64_t page_bytes;
  std::vector<int32_t> table;
  std::vector<uint8_t> bytes;
};

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

TEST_P(Pack, KeyCodesMatchTheFormula) {
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

    // Latents in double, and scales so that codes reach over the whole range and beyond on both
    // sides.
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

    Pool pool(random, layout.k_page_bytes(), c.slot + c.num_tokens);
    const Pool before = pool;
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
        // What the float latent may be off, in codes: 20 roundings turn and centre a key, then
        // comes the sum over D, then the product with 1 / scale and the sum with mid.
        const double error = largest[h] * std::sqrt(norm) *
                                 (20 * kFloatRounding + testing::sum_rounding(c.head_dim)) /
                                 static_cast<double>(scale[channel.row]) +
                             4 * kFloatRounding * (1 << channel.width);
        const int top = (1 << channel.width) - 1;
        for (int64_t t = 0; t < c.num_tokens; ++t) {
          const int64_t slot = c.slot + t;
          const double exact =
              latents[h][j][t] / static_cast<double>(scale[channel.row]) + channel.mid();
          const CodeAddress place = channel.place(static_cast<int>(slot % kPageTokens));
          const int got = get_code(pool.page_of(slot), place, channel.width);
          const double low = std::clamp(std::round(exact - error), 0.0, static_cast<double>(top));
          const double high = std::clamp(std::round(exact + error), 0.0, static_cast<double>(top));
          ASSERT_TRUE(got >= low && got <= high)
              << "head " << h << " channel " << j << " token " << t << ": code " << got
              << ", exactly " << exact << " of " << channel.width << " bits";
          unclear += low != high;
          ++codes;
          put_code(expected.data() + (pool.page_of(slot) - pool.bytes.data()), place, channel.width,
                   got);
        }
      }
    }
    EXPECT_TRUE(testing::same_bytes(pool.bytes, expected))
        << "bits of other slots or pages changed";
    EXPECT_LE(unclear, codes / 50 + 2) << "the tolerance must not make the test blind";
  }
}

// Where every operation is exact, every backend gives the same bytes, ties and clamping included.
TEST_P(Pack, ExactArithmeticGivesTheSameBytesOnEveryBackend) {
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
  Pool pool(random, layout.k_page_bytes(), 130);
  std::vector<uint8_t> expected = pool.bytes;
  for (const reference::Channel& channel : reference::channels_of(layout.view().heads[0])) {
    for (int64_t t = 0; t < 130; ++t) {
      const double exact =
          (keys.get(0, t, channel.row) - mean[channel.row]) / scale[channel.row] + channel.mid();
      // std::nearbyint rounds ties to even.
      const int code = static_cast<int>(std::clamp(std::nearbyint(exact), 0.0, 2 * channel.mid()));
      put_code(expected.data() + (pool.page_of(t) - pool.bytes.data()),
               channel.place(t % kPageTokens), channel.width, code);
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

TEST_P(Pack, ChannelsWithoutRangeGetTheMiddleCode) {
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
    const int code = get_code(page.data(), channel.place(0), channel.width);
    EXPECT_NEAR(code, channel.mid(), 0.5) << channel.width << " bits";
  }
}

struct ValueCase {
  int64_t num_tokens;
  int64_t slot;
  int head_dim;
  int bits;
  int group_size;
  DataType dtype;
};

std::vector<ValueCase> value_cases() {
  std::vector<ValueCase> cases = {
      {70, 5, 80, 4, 16, DataType::kBFloat16},    {70, 0, 80, 2, 80, DataType::kFloat16},
      {130, 64, 96, 4, 48, DataType::kFloat32},   {3, 62, 256, 2, 64, DataType::kBFloat16},
      {65, 127, 128, 4, 128, DataType::kFloat16}, {64, 1, 512, 2, 32, DataType::kFloat32},
      {67, 9, 16, 4, 16, DataType::kFloat32},
  };
  for (int64_t num_tokens : testing::token_counts()) {
    cases.push_back({num_tokens, 0, 64, 4, 64, DataType::kBFloat16});
    cases.push_back({num_tokens, 33, 64, 2, 32, DataType::kFloat32});
  }
  return cases;
}

TEST_P(Pack, ValueCodesMatchTheFormula) {
  constexpr int kHeads = 2;
  uint64_t stream = 3000;
  for (const ValueCase& c : value_cases()) {
    SCOPED_TRACE(::testing::Message() << c.num_tokens << " tokens from slot " << c.slot
                                      << ", head_dim " << c.head_dim << ", " << c.bits << " bits");
    Random random(stream++);
    const testing::HeadBands bands(kHeads, Bands{{4, 0, 0, 0}});
    const Layout layout(
        testing::layout_ints(RopeMode::kPost, c.head_dim, bands, c.bits, c.group_size));
    const ValueLayout& value = layout.value();
    Tokens values(kHeads, c.num_tokens, c.head_dim, c.dtype);
    values.fill_like_keys(random, 1.0);
    // One group of equal numbers, one that ends at zero.
    for (int d = 0; d < c.group_size; ++d) {
      values.set(0, 0, d, 1.25);
      values.set(1, 0, d, d * -0.125);
    }
    Pool pool(random, layout.v_page_bytes(), c.slot + c.num_tokens);
    const Pool before = pool;
    backend().pack_values(
        {values.source(), layout.view(), pool.bytes.data(), pool.table.data(), c.slot}, executor_);

    std::vector<uint8_t> expected = before.bytes;
    const double top = (1 << c.bits) - 1;
    for (int h = 0; h < kHeads; ++h) {
      for (int64_t t = 0; t < c.num_tokens; ++t) {
        const int slot = static_cast<int>((c.slot + t) % kPageTokens);
        const uint8_t* page = pool.page_of(c.slot + t) + h * value.page_bytes();
        uint8_t* to = expected.data() + (page - pool.bytes.data());
        for (int g = 0; g < value.groups(); ++g) {
          double low = values.get(h, t, g * c.group_size), high = low;
          for (int d = g * c.group_size; d < (g + 1) * c.group_size; ++d) {
            low = std::min(low, values.get(h, t, d));
            high = std::max(high, values.get(h, t, d));
          }
          const int64_t at = (g * kPageTokens + slot) * 2;
          const double zero = reference::read_half(page + value.zero_offset() + at);
          const double scale = reference::read_half(page + value.scale_offset() + at);
          // Rounded to half, once for zero and after a rounded division for scale; 2^-25 is half a
          // subnormal step.
          ASSERT_NEAR(zero, low, 0x1p-11 * std::fabs(low) + 0x1p-25)
              << "head " << h << " token " << t << " group " << g;
          ASSERT_NEAR(scale, (high - low) / top, 0x1.01p-11 * (high - low) / top + 0x1p-25);
          std::memcpy(to + value.zero_offset() + at, page + value.zero_offset() + at, 2);
          std::memcpy(to + value.scale_offset() + at, page + value.scale_offset() + at, 2);
          for (int d = g * c.group_size; d < (g + 1) * c.group_size; ++d) {
            const double exact = scale > 0 ? (values.get(h, t, d) - zero) / scale : 0;
            const double error = 4 * kFloatRounding * (top + 1);
            const CodeAddress place = value_code_address(c.bits, d, slot);
            const int got = get_code(page + value.code_offset(), place, c.bits);
            ASSERT_GE(got, std::clamp(std::round(exact - error), 0.0, top))
                << "head " << h << " token " << t << " channel " << d;
            ASSERT_LE(got, std::clamp(std::round(exact + error), 0.0, top))
                << "head " << h << " token " << t << " channel " << d;
            put_code(to + value.code_offset(), place, c.bits, got);
          }
        }
      }
    }
    EXPECT_TRUE(testing::same_bytes(pool.bytes, expected))
        << "bits of other slots or pages changed";

    // Nothing here depends on the order of operations: all backends must agree to the last bit.
    Pool portable = before;
    const Backend& other = *available_backends().back();
    other.pack_values(
        {values.source(), layout.view(), portable.bytes.data(), portable.table.data(), c.slot},
        SerialExecutor());
    EXPECT_TRUE(testing::same_bytes(pool.bytes, portable.bytes))
        << backend().name << " and " << other.name << " differ";
  }
}

TEST_P(Pack, ExactValuesAreCopied) {
  constexpr int kHeads = 3, kDim = 48;
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    const int bits = dtype == DataType::kFloat32 ? 32 : 16;
    const testing::HeadBands bands(kHeads, Bands{{4, 0, 0, 0}});
    const Layout layout(testing::layout_ints(RopeMode::kPost, kDim, bands, bits, kDim));
    Random random(4000);
    Tokens values(kHeads, 70, kDim, dtype);
    values.fill_like_keys(random, 1.0);
    Pool pool(random, layout.v_page_bytes(), 100);
    std::vector<uint8_t> expected = pool.bytes;
    for (int h = 0; h < kHeads; ++h) {
      for (int64_t t = 0; t < 70; ++t) {
        const int64_t page =
            pool.page_of(30 + t) - pool.bytes.data() + h * layout.value().page_bytes();
        for (int d = 0; d < kDim; ++d) {
          testing::write_number(&expected[page + ((30 + t) % kPageTokens * kDim + d) * bits / 8],
                                dtype, values.get(h, t, d));
        }
      }
    }
    backend().pack_values(
        {values.source(), layout.view(), pool.bytes.data(), pool.table.data(), 30}, executor_);
    EXPECT_TRUE(testing::same_bytes(pool.bytes, expected));
  }
}

SVDQ_ON_EVERY_BACKEND(Pack);

}  // namespace
}  // namespace svdq
