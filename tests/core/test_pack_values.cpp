// The pack_values stage: codes and scales against the formula; other slots and pages stay.
#include <algorithm>
#include <numeric>
#include <string>

#include "tests/core/page_pool.h"
#include "tests/core/reference.h"

namespace svdq {
namespace {

using testing::kFloatRounding;
using testing::PagePool;
using testing::Random;
using testing::sum_rounding;
using testing::Tokens;

class PackValues : public testing::BackendTest {};

struct ValueCase {
  int64_t num_tokens;
  int64_t slot;
  int head_dim;
  testing::ValueBits bits;
  DataType dtype;
};

constexpr int kHeads = 2;

std::vector<ValueCase> value_cases() {
  std::vector<ValueCase> cases = {
      {70, 5, 80, 4, DataType::kBFloat16},        {70, 0, 80, 2, DataType::kFloat16},
      {130, 64, 96, {3, 4}, DataType::kFloat32},  {3, 62, 256, {2, 3}, DataType::kBFloat16},
      {65, 127, 128, {4, 3}, DataType::kFloat16}, {64, 1, 512, {3, 2}, DataType::kFloat32},
      {67, 9, 16, {3, 4}, DataType::kFloat32},
  };
  for (int64_t num_tokens : testing::token_counts()) {
    cases.push_back({num_tokens, 0, 64, 4, DataType::kBFloat16});
    cases.push_back({num_tokens, 33, 64, {2, 3}, DataType::kFloat32});
  }
  return cases;
}

Layout value_layout(int head_dim, const testing::ValueBits& bits) {
  const testing::HeadBands bands(kHeads, Bands{{4, 0, 0, 0}});
  return Layout(testing::layout_ints(RopeMode::kPost, head_dim, bands, bits));
}

double dot(const reference::Row& a, const reference::Row& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// The codes of slot `slot` against the formula: steps of the root mean square, then the scale without bias along
// the token.
void expect_token(const reference::Row& rotated, const ValueLayout& value, const uint8_t* page,
                  int slot) {
  const int dim = value.head_dim, blocks = dim / rotation_block(dim);
  const double square = dot(rotated, rotated);
  const double mid = mid_code(value.bits);
  const double step = static_cast<double>(value_step(value.bits)) * std::sqrt(square / dim);
  // Rotating rounds a number by a few units of the token's length, a fraction of a step; the rest rounds the sum.
  const double error =
      kFloatRounding * (8 * (mid + 1) + 16 * std::sqrt(1.0 * blocks * dim) *
                                            std::sqrt(square / dim) / std::max(step, 0x1p-140));
  reference::Row codes(dim);
  for (int d = 0; d < dim; ++d) {
    const double unrounded = (step > 0 ? rotated[d] / step : 0) + mid;
    const int got = get_value_code(page, value, d, slot);
    ASSERT_GE(got, std::clamp(std::nearbyint(unrounded - error), 0.0, 2 * mid)) << "channel " << d;
    ASSERT_LE(got, std::clamp(std::nearbyint(unrounded + error), 0.0, 2 * mid)) << "channel " << d;
    codes[d] = got - mid;
  }
  const double scale = step > 0 ? square / dot(rotated, codes) : 0;
  const auto byte = [&](double x) {
    return scale_byte(float_to_half(static_cast<float>(std::min(x, 65504.0))));
  };
  const double near = sum_rounding(dim) + 8 * kFloatRounding;
  ASSERT_GE(page[slot], byte(scale * (1 - near)));
  ASSERT_LE(page[slot], byte(scale * (1 + near)));
}

reference::Row token_of(const Tokens& values, int h, int64_t t, int head_dim) {
  reference::Row row(head_dim);
  for (int d = 0; d < head_dim; ++d) row[d] = values.get(h, t, d);
  return row;
}

TEST_P(PackValues, MatchesTheFormula) {
  uint64_t stream = 3000;
  for (const ValueCase& c : value_cases()) {
    SCOPED_TRACE(::testing::Message()
                 << c.num_tokens << " tokens from slot " << c.slot << ", head_dim " << c.head_dim
                 << ", " << c.bits.of(0) << " and " << c.bits.of(1) << " bits");
    Random random(stream++);
    const Layout layout = value_layout(c.head_dim, c.bits);
    Tokens values(kHeads, c.num_tokens, c.head_dim, c.dtype);
    values.fill_like_keys(random, 1.0);
    // A token of equal numbers, and one of zeros.
    for (int d = 0; d < c.head_dim; ++d) {
      values.set(0, 0, d, 1.25);
      values.set(1, 0, d, 0);
    }
    PagePool pool(random, layout.v_page_bytes(), c.slot + c.num_tokens);
    const PagePool before = pool;
    backend().pack_values(
        {values.source(), layout.view(), pool.bytes.data(), pool.table.data(), c.slot}, executor_);

    std::vector<uint8_t> expected = before.bytes;
    for (int h = 0; h < kHeads; ++h) {
      const HeadPlan& head = layout.view().heads[h];
      for (int64_t t = 0; t < c.num_tokens; ++t) {
        SCOPED_TRACE(::testing::Message() << "head " << h << " token " << t);
        const int slot = static_cast<int>((c.slot + t) % kPageTokens);
        const uint8_t* page = pool.page_of(c.slot + t) + head.v_offset;
        expect_token(reference::rotate_value(token_of(values, h, t, c.head_dim)), head.value, page,
                     slot);
        if (HasFatalFailure()) return;
        uint8_t* to = expected.data() + (page - pool.bytes.data());
        to[slot] = page[slot];
        for (int d = 0; d < c.head_dim; ++d) {
          testing::put_value_code(to, head.value, d, slot,
                                  get_value_code(page, head.value, d, slot));
        }
      }
    }
    EXPECT_TRUE(testing::same_bytes(pool.bytes, expected))
        << "bits of other slots or pages changed";

    // The order of operations is one for all: backends with fused multiply-adds agree to the last bit.
    const Backend& other = *available_backends().front();
    if (std::string(backend().name) == "portable") continue;
    PagePool first = before;
    other.pack_values(
        {values.source(), layout.view(), first.bytes.data(), first.table.data(), c.slot},
        SerialExecutor());
    EXPECT_TRUE(testing::same_bytes(pool.bytes, first.bytes))
        << backend().name << " and " << other.name << " differ";
  }
}

// Mean of (rounded scale - scale) / scale where the logarithm of the scale is uniform: rounding to nearest is even
// in the scale, not in its logarithm. Over the cell of each mantissa r, from r - 1/2 to r + 1/2, it is the integral
// of (r - s) / s^2.
double mean_of_rounding() {
  double sum = 0;
  for (double r = 8; r < 16; ++r) {
    const double low = r == 8 ? r - 0.25 : r - 0.5,
                 high = r + 0.5;  // half as wide below a power of two
    sum += r * (1 / low - 1 / high) - std::log(high / low);
  }
  return sum / std::log(2);
}

// Decoded values say as much along a token as the token does: the scale is the one without bias there, rounded to 3
// bits of mantissa. So a deviation neither comes from the codes nor adds up over the tokens that attention sums.
TEST_P(PackValues, AreExactAlongTheTokenButForTheScale) {
  constexpr int64_t kTokens = 6000;
  uint64_t stream = 3500;
  for (int head_dim : {64, 80, 128}) {
    for (int bits : kValueBits) {
      SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", " << bits << " bits");
      Random random(stream++);
      const Layout layout = value_layout(head_dim, bits);
      Tokens values(kHeads, kTokens, head_dim, DataType::kFloat32);
      values.fill_like_keys(random, 1.0);
      // Lengths over several powers of two, so that scales take every mantissa.
      for (int64_t t = 0; t < kTokens; ++t) {
        const double length = std::exp2(0.01 * random.integer(-300, 300));
        for (int h = 0; h < kHeads; ++h) {
          for (int d = 0; d < head_dim; ++d) values.set(h, t, d, length * values.get(h, t, d));
        }
      }
      PagePool pool(random, layout.v_page_bytes(), kTokens);
      backend().pack_values(
          {values.source(), layout.view(), pool.bytes.data(), pool.table.data(), 0}, executor_);
      double sum = 0, squares = 0;
      for (int h = 0; h < kHeads; ++h) {
        const HeadPlan& head = layout.view().heads[h];
        for (int64_t t = 0; t < kTokens; ++t) {
          const int slot = static_cast<int>(t % kPageTokens);
          const uint8_t* page = pool.page_of(t) + head.v_offset;
          const double scale = reference::value_scale(page, slot);
          ASSERT_GE(scale, 0x1p-14);
          const reference::Row x = token_of(values, h, t, head_dim);
          const reference::Row codes = reference::value_codes(head.value, page, slot);
          const double along = scale * dot(x, reference::unrotate_value(codes)) / dot(x, x) - 1;
          ASSERT_LE(std::fabs(along), 0x1p-4 + sum_rounding(head_dim)) << "token " << t;
          sum += along;
          squares += along * along;
        }
      }
      const double n = kHeads * kTokens;
      EXPECT_NEAR(sum / n, mean_of_rounding(), 4 * std::sqrt(squares / n / n));
    }
  }
}

TEST_P(PackValues, UncompressedValuesAreCopied) {
  constexpr int kDim = 48;
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    const int bits = dtype == DataType::kFloat32 ? 32 : 16;
    const Layout layout = value_layout(kDim, bits);
    Random random(4000);
    Tokens values(kHeads, 70, kDim, dtype);
    values.fill_like_keys(random, 1.0);
    PagePool pool(random, layout.v_page_bytes(), 100);
    std::vector<uint8_t> expected = pool.bytes;
    for (int h = 0; h < kHeads; ++h) {
      for (int64_t t = 0; t < 70; ++t) {
        const int64_t page =
            pool.page_of(30 + t) - pool.bytes.data() + layout.view().heads[h].v_offset;
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
