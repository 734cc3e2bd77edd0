// The kernels of the pack stage against the CPU backend: the same bytes.
#include "tests/kernels/device_test.h"

#include "csrc/gpu/pack.h"
#include "tests/core/reference.h"
#include "tests/kernels/chosen_case.h"

namespace svdq {
namespace {

using testing::DeviceArray;
using testing::Random;
using testing::Tokens;

struct PackCase {
  RopeMode rope = RopeMode::kPost;
  int head_dim = 64;
  testing::HeadBands bands = {{{4, 8, 4, 8}}, {{0, 12, 4, 16}}};
  testing::ValueBits v_bits = 4;
  DataType dtype = DataType::kFloat32;
  int64_t slot = 0;
  int64_t num_tokens = 150;
  int64_t position = 1000;  // of the first token
};

class PackKernels : public testing::KernelTest {
 protected:
  template <typename T>
  static DeviceArray<uint8_t> bytes_of(const T* data, int64_t count) {
    const auto* from = reinterpret_cast<const uint8_t*>(data);
    return DeviceArray<uint8_t>(std::vector<uint8_t>(from, from + count * sizeof(T)));
  }

  // Pages scattered in a pool, full of bytes that only the slots in question may lose.
  void prepare(const PackCase& c, int64_t page_bytes) {
    table_.clear();
    const int64_t pages = device::spanned_pages(0, c.slot + c.num_tokens);
    for (int64_t page = pages; page-- > 0;) table_.push_back(static_cast<int32_t>(2 * page + 1));
    pages_.resize((2 * pages + 1) * page_bytes);
    random_.fill(pages_);
    tokens_ = std::make_unique<Tokens>(static_cast<int>(c.bands.size()), c.num_tokens, c.head_dim,
                                       c.dtype);
    tokens_->fill_like_keys(random_, 2);
  }

  // The source on the device; its strides stay.
  TokenSource upload(const PackCase& c) {
    const TokenSource source = tokens_->source();
    const int64_t bytes = source.num_tokens * source.token_stride * testing::size_of(c.dtype);
    source_ = std::make_unique<DeviceArray<uint8_t>>(
        bytes_of(static_cast<const uint8_t*>(source.data), bytes).read());
    TokenSource device = source;
    device.data = source_->data();
    return device;
  }

  void check_keys(const PackCase& c, uint64_t seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    random_ = Random(seed);
    const Layout layout(testing::layout_ints(c.rope, c.head_dim, c.bands));
    prepare(c, layout.k_page_bytes());
    const std::vector<float> inv_freq =
        testing::inverse_frequencies(c.rope == RopeMode::kPre ? c.head_dim / 2 : 0);
    const int half = static_cast<int>(inv_freq.size());
    std::vector<uint16_t> basis(layout.rank() * c.head_dim);
    for (uint16_t& x : basis)
      x = float_to_bfloat16(static_cast<float>(random_.normal() / std::sqrt(c.head_dim)));
    std::vector<float> scale(layout.rank()), mean(layout.num_heads() * c.head_dim);
    for (float& x : scale) x = static_cast<float>(0.02 + 0.01 * random_.integer(0, 30));
    for (float& x : mean) x = static_cast<float>(random_.normal());

    PackKeysParams p{tokens_->source(),
                     layout.view(),
                     {{inv_freq.data(), half}, basis.data(), scale.data(), mean.data(), nullptr},
                     c.position,
                     pages_.data(),
                     table_.data(),
                     c.slot};
    const auto before = pages_;
    const auto d_basis = bytes_of(basis.data(), static_cast<int64_t>(basis.size()));
    const DeviceArray<float> d_scale(scale), d_mean(mean);
    const DeviceArray<uint8_t> d_pages(before);
    const DeviceArray<float> d_freq(inv_freq);
    std::vector<float> errors(layout.num_heads() * c.num_tokens);
    const DeviceArray<float> d_errors(errors.size());
    p.errors = errors.data();
    p.errors_stride = c.num_tokens;
    PackKeysParams d = p;
    d.errors = d_errors.data();
    d.keys = upload(c);
    d.codec.rope.inv_freq = d_freq.data();
    d.codec.basis = reinterpret_cast<const uint16_t*>(d_basis.data());
    d.codec.scale = d_scale.data();
    d.codec.mean = d_mean.data();
    d.pages = d_pages.data();
    gpu::pack_keys(d, stream());
    const auto got = d_pages.read();
    current_backend().pack_keys(p, SerialExecutor());
    if (c.rope == RopeMode::kPost) {
      EXPECT_TRUE(testing::same_bytes(got, pages_));
      expect_errors_alike(c, layout.rank(), d_errors.read(), errors);
    } else {
      expect_codes_near_ties(c, layout, p, got);
    }
  }

  // Squared errors of the same codes: the CPU takes them off a key in the order of the channels, the
  // kernels decode first.
  void expect_errors_alike(const PackCase& c, int rank, const std::vector<float>& got,
                           const std::vector<float>& expected) {
    for (size_t i = 0; i < expected.size(); ++i) {
      double norm = 0;
      for (int d = 0; d < c.head_dim; ++d)
        norm += std::pow(tokens_->get(static_cast<int>(i / c.num_tokens), i % c.num_tokens, d), 2);
      const double length = std::sqrt(double{expected[i]});
      const double off =
          (rank + 30) * testing::kFloatRounding * (2 * std::sqrt(norm) + length + 20);
      ASSERT_NEAR(got[i], expected[i],
                  2 * off * length + off * off + c.head_dim * testing::kFloatRounding * expected[i])
          << "head " << i / c.num_tokens << " token " << i % c.num_tokens;
    }
  }

  // Turning back leaves compilers the choice of which products to fuse, so keys may differ by
  // roundings: then codes differ by one, where the exact number lies between them.
  void expect_codes_near_ties(const PackCase& c, const Layout& layout, const PackKeysParams& p,
                              const std::vector<uint8_t>& got) {
    for (int h = 0; h < layout.num_heads(); ++h) {
      const auto channels = reference::channels_of(layout.view().heads[h]);
      for (int64_t t = 0; t < c.num_tokens; ++t) {
        const int64_t slot = c.slot + t, page = table_[slot / kPageTokens] * layout.k_page_bytes();
        const reference::Row key =
            reference::unrotated_key(*tokens_, h, t, c.head_dim, p.codec.rope, c.position);
        for (const auto& channel : channels) {
          const CodeAddress place = channel.address(slot % kPageTokens);
          const int code = get_code(&got[page], place, channel.width),
                    expected = get_code(&pages_[page], place, channel.width);
          if (code == expected) continue;
          double magnitude = 0;
          for (int d = 0; d < c.head_dim; ++d) {
            magnitude +=
                (std::fabs(key[d]) * 2 + std::fabs(double{p.codec.mean[h * c.head_dim + d]})) *
                std::fabs(double{bfloat16_to_float(p.codec.basis[channel.row * c.head_dim + d])});
          }
          const double scale = double{p.codec.scale[channel.row]};
          const double exact = reference::project(key, p.codec.mean + h * c.head_dim,
                                                  p.codec.basis + channel.row * c.head_dim) /
                                   scale +
                               channel.mid();
          // Cosines and sines are off by 2^-22, as the test of rotations says; two of them make one
          // of up to 2 sqrt(2) times that, and a key takes both, with a few roundings besides those
          // of the projection.
          const double slack =
              magnitude / scale *
                  (24 * testing::kFloatRounding + testing::sum_rounding(c.head_dim)) +
              4 * testing::kFloatRounding * 256;
          ASSERT_EQ(std::abs(code - expected), 1) << "head " << h << " token " << t;
          ASSERT_NEAR(exact, (code + expected) / 2.0, slack) << "head " << h << " token " << t;
        }
      }
    }
  }

  void check_values(const PackCase& c, uint64_t seed) {
    SCOPED_TRACE(::testing::Message() << "values, seed " << seed);
    random_ = Random(seed);
    const Layout layout(testing::layout_ints(RopeMode::kPost, c.head_dim, c.bands, c.v_bits));
    prepare(c, layout.v_page_bytes());
    PackValuesParams p{tokens_->source(), layout.view(), pages_.data(), table_.data(), c.slot};
    const DeviceArray<uint8_t> d_pages(pages_);
    PackValuesParams d = p;
    d.values = upload(c);
    d.pages = d_pages.data();
    gpu::pack_values(d, stream());
    current_backend().pack_values(p, SerialExecutor());
    EXPECT_TRUE(testing::same_bytes(d_pages.read(), pages_));
  }

  Random random_{1};
  std::vector<int32_t> table_;
  std::vector<uint8_t> pages_;
  std::unique_ptr<Tokens> tokens_;
  std::unique_ptr<DeviceArray<uint8_t>> source_;
};

TEST_P(PackKernels, EverySpan) {
  uint64_t seed = 0;
  for (int64_t slot : {0, 1, 63, 64, 100}) {
    for (int64_t tokens : {1, 63, 64, 130}) {
      PackCase c;
      c.slot = slot;
      c.num_tokens = tokens;
      check_keys(c, ++seed);
      check_values(c, ++seed);
    }
  }
}

TEST_P(PackKernels, EveryHeadDim) {
  for (int head_dim : {16, 64, 80, 96, 128, 256, 512}) {
    PackCase c;
    c.head_dim = head_dim;
    c.num_tokens = 20;
    c.slot = 60;
    c.bands = {{{4, 4, 0, 8}}, {{0, 8, 4, 0}}};
    check_keys(c, 100 + head_dim);
    for (int bits : kValueBits) {
      c.v_bits = {bits, 3};
      check_values(c, 200 + 10 * head_dim + bits);
    }
  }
}

TEST_P(PackKernels, EveryDtype) {
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    PackCase c;
    c.dtype = dtype;
    check_keys(c, 300 + static_cast<int>(dtype));
    for (int bits : {2, 3, 4, dtype == DataType::kFloat32 ? 32 : 16}) {
      c.v_bits = bits;
      check_values(c, 310 + 3 * bits + static_cast<int>(dtype));
    }
  }
}

TEST_P(PackKernels, BeforeRope) {
  for (int64_t position : {0, 1000, 200000}) {
    PackCase c;
    c.rope = RopeMode::kPre;
    c.position = position;
    c.slot = position == 0 ? 0 : 37;
    check_keys(c, 400 + position);
  }
}

// A case of the environment's.
TEST_P(PackKernels, Chosen) {
  const testing::ChosenCase chosen;
  const PackCase c = {chosen.rope(),  chosen.head_dim(), chosen.bands(),  chosen.v_bits(),
                      chosen.dtype(), chosen.slot(),     chosen.tokens(), chosen.position()};
  check_keys(c, 20000 + chosen.seed());
  check_values(c, 30000 + chosen.seed());
}

// Rotations of the device against double.
TEST_P(PackKernels, Rotations) {
  const std::vector<float> inv_freq = testing::inverse_frequencies(20);
  const DeviceArray<float> d_freq(inv_freq);
  const DeviceArray<int32_t> first(std::vector<int32_t>{5, 1000000});
  constexpr int kPages = 3;
  const DeviceArray<device::Floats2> offsets(64 * 20), bases(2 * kPages * 20);
  const device::RotationParams p{{d_freq.data(), 20}, 64,          first.data(), 2, kPages,
                                 offsets.data(),      bases.data()};
  launch("rotations", device::rotations_launch(p), device::rotations_kernel, p);
  const auto slots = offsets.read(), pages = bases.read();
  const auto check = [&](const device::Floats2& got, int64_t position, int i) {
    // The angle is below pi after whole rotates are taken off, and rounded to float: 2^-23; sines add
    // two roundings.
    const double angle = static_cast<double>(position) * double{inv_freq[i]};
    ASSERT_NEAR(got.x, std::cos(angle), 0x1p-22) << position << " pair " << i;
    ASSERT_NEAR(got.y, std::sin(angle), 0x1p-22) << position << " pair " << i;
  };
  for (int i = 0; i < 20; ++i) {
    for (int slot = 0; slot < 64; ++slot) check(slots[slot * 20 + i], slot, i);
    for (int n = 0; n < 2 * kPages; ++n)
      check(pages[n * 20 + i], 64 + (n / kPages ? 1000000 : 5) + n % kPages * 64, i);
  }
}

SVDQ_KERNEL_TESTS(PackKernels);

}  // namespace
}  // namespace svdq
