// The pack_values stage: codes, scales and zero points against the formula; other slots and pages stay.
#include <algorithm>
#include <limits>

#include "tests/core/page_pool.h"
#include "tests/core/reference.h"

namespace svdq {
namespace {

using testing::kFloatRounding;
using testing::PagePool;
using testing::Random;
using testing::Tokens;

class PackValues : public testing::BackendTest {};

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

TEST_P(PackValues, MatchesTheFormula) {
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
    PagePool pool(random, layout.v_page_bytes(), c.slot + c.num_tokens);
    const PagePool before = pool;
    backend().pack_values(
        {values.source(), layout.view(), pool.bytes.data(), pool.table.data(), c.slot}, executor_);

    std::vector<uint8_t> expected = before.bytes;
    const double max_code = (1 << c.bits) - 1;
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
          // The zero point is rounded to half; so is the scale, after a rounded division. 2^-25 is half the distance of
          // subnormal numbers.
          ASSERT_NEAR(zero, low, 0x1p-11 * std::fabs(low) + 0x1p-25)
              << "head " << h << " token " << t << " group " << g;
          ASSERT_NEAR(scale, (high - low) / max_code,
                      0x1.01p-11 * (high - low) / max_code + 0x1p-25);
          std::memcpy(to + value.zero_offset() + at, page + value.zero_offset() + at, 2);
          std::memcpy(to + value.scale_offset() + at, page + value.scale_offset() + at, 2);
          for (int d = g * c.group_size; d < (g + 1) * c.group_size; ++d) {
            const double unrounded = scale > 0 ? (values.get(h, t, d) - zero) / scale : 0;
            const double error = 4 * kFloatRounding * (max_code + 1);
            const CodeAddress address = value_code_address(c.bits, d, slot);
            const int got = get_code(page + value.code_offset(), address, c.bits);
            ASSERT_GE(got, std::clamp(std::round(unrounded - error), 0.0, max_code))
                << "head " << h << " token " << t << " channel " << d;
            ASSERT_LE(got, std::clamp(std::round(unrounded + error), 0.0, max_code))
                << "head " << h << " token " << t << " channel " << d;
            put_code(to + value.code_offset(), address, c.bits, got);
          }
        }
      }
    }
    EXPECT_TRUE(testing::same_bytes(pool.bytes, expected))
        << "bits of other slots or pages changed";

    // No result depends on the order of operations: all backends must agree to the last bit.
    PagePool portable = before;
    const Backend& other = *available_backends().back();
    other.pack_values(
        {values.source(), layout.view(), portable.bytes.data(), portable.table.data(), c.slot},
        SerialExecutor());
    EXPECT_TRUE(testing::same_bytes(pool.bytes, portable.bytes))
        << backend().name << " and " << other.name << " differ";
  }
}

TEST_P(PackValues, UncompressedValuesAreCopied) {
  constexpr int kHeads = 3, kDim = 48;
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    const int bits = dtype == DataType::kFloat32 ? 32 : 16;
    const testing::HeadBands bands(kHeads, Bands{{4, 0, 0, 0}});
    const Layout layout(testing::layout_ints(RopeMode::kPost, kDim, bands, bits, kDim));
    Random random(4000);
    Tokens values(kHeads, 70, kDim, dtype);
    values.fill_like_keys(random, 1.0);
    PagePool pool(random, layout.v_page_bytes(), 100);
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

SVDQ_ON_EVERY_BACKEND(PackValues);

}  // namespace
}  // namespace svdq
