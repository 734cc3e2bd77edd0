// The kernels that read pages back against the core's plain loops: the same codes and values, and
// keys up to rounding.
#include "tests/kernels/device_test.h"

#include "csrc/core/unpack.h"
#include "csrc/gpu/unpack.h"
#include "tests/core/reference.h"

namespace svdq {
namespace {

using testing::DeviceArray;
using testing::kFloatRounding;
using testing::Random;

struct UnpackCase {
  RopeMode rope = RopeMode::kPost;
  int head_dim = 64;
  testing::HeadBands bands = {{{4, 8, 4, 8}}, {{0, 12, 4, 16}}, {{0, 0, 0, 8}}};
  testing::ValueBits v_bits = {4, 3, 2};
  DataType dtype = DataType::kFloat32;  // of exact values
  int64_t slot = 37;
  int64_t num_tokens = testing::environment_number("SVDQ_TEST_TOKENS", 130);
  int64_t position = 1000;  // of the first slot read
};

class UnpackKernels : public testing::KernelTest {
 protected:
  // Pages of random codes, scattered in a pool; scales that are numbers, or normal numbers where exact values lie.
  void prepare(const UnpackCase& c, uint64_t stream) {
    random_ = Random(stream);
    layout_ = std::make_unique<Layout>(testing::layout_ints(c.rope, c.head_dim, c.bands, c.v_bits));
    const int64_t pages = device::spanned_pages(0, c.slot + c.num_tokens);
    table_.clear();
    for (int64_t page = 0; page < pages; ++page)
      table_.push_back(static_cast<int32_t>(2 * (pages - 1 - page) + 1));
    k_pages_.resize(2 * pages * layout_->k_page_bytes());
    v_pages_.resize(2 * pages * layout_->v_page_bytes());
    random_.fill(k_pages_);
    random_.fill(v_pages_);
    for (int64_t page = 0; page < 2 * pages; ++page) {
      for (int h = 0; h < layout_->num_heads(); ++h) {
        const HeadPlan& head = layout_->view().heads[h];
        uint8_t* values = &v_pages_[page * layout_->v_page_bytes() + head.v_offset];
        const int64_t size = testing::size_of(c.dtype);
        for (int at = 0; at < head.value.scale_bytes(); ++at)
          values[at] = static_cast<uint8_t>(random_.integer(0, kLargestScale));
        for (int64_t at = 0; !head.value.packed() && at < head.value.page_bytes(); at += size)
          testing::write_number(values + at, c.dtype, random_.normal());
      }
    }
  }

  UnpackParams params(const UnpackCase& c, const uint8_t* pages) const {
    return {layout_->view(), pages, table_.data(), c.slot, c.num_tokens};
  }

  void check_codes(const UnpackCase& c) {
    const int64_t count = c.num_tokens * layout_->rank();
    const DeviceArray<uint8_t> pages(k_pages_), codes(static_cast<size_t>(count));
    gpu::unpack_codes({params(c, pages.data()), codes.data()}, stream());
    std::vector<uint8_t> expected(count);
    unpack_codes({params(c, k_pages_.data()), expected.data()}, SerialExecutor());
    EXPECT_TRUE(testing::same_bytes(codes.read(), expected));
  }

  void check_values(const UnpackCase& c) {
    const int64_t count = layout_->num_heads() * c.num_tokens * c.head_dim;
    const DeviceArray<uint8_t> pages(v_pages_);
    const DeviceArray<float> values(static_cast<size_t>(count));
    gpu::unpack_values({params(c, pages.data()), c.dtype, values.data()}, stream());
    std::vector<float> expected(count);
    unpack_values({params(c, v_pages_.data()), c.dtype, expected.data()}, SerialExecutor());
    if (!layout_->packs_values()) {
      EXPECT_EQ(values.read(), expected);
      return;
    }
    // Codes times scales are exact. Rotating back leaves the length of a row, and each of at most 16 steps rounds
    // its numbers.
    const std::vector<float> got = values.read();
    for (int64_t row = 0; row < count / c.head_dim; ++row) {
      double square = 0;
      for (int64_t i = row * c.head_dim; i < (row + 1) * c.head_dim; ++i)
        square += double{expected[i]} * double{expected[i]};
      const double error = std::sqrt(square) * 16 * kFloatRounding;
      for (int64_t i = row * c.head_dim; i < (row + 1) * c.head_dim; ++i)
        ASSERT_NEAR(got[i], expected[i], error) << "row " << row << " channel " << i % c.head_dim;
    }
  }

  void check_keys(const UnpackCase& c) {
    const int rank = layout_->rank(), heads = layout_->num_heads(), dim = c.head_dim;
    const auto inv_freq = testing::inverse_frequencies(c.rope == RopeMode::kPre ? dim / 2 - 3 : 0);
    std::vector<uint16_t> basis(rank * dim);
    for (uint16_t& x : basis)
      x = float_to_bfloat16(static_cast<float>(random_.normal() / std::sqrt(dim)));
    std::vector<float> scale(rank), mean(heads * dim);
    for (float& x : scale) x = static_cast<float>(0.02 + 0.01 * random_.integer(0, 30));
    for (float& x : mean) x = static_cast<float>(random_.normal());

    const int64_t count = heads * c.num_tokens * dim;
    const DeviceArray<uint8_t> pages(k_pages_);
    const DeviceArray<float> d_scale(scale), d_mean(mean), d_freq(inv_freq),
        keys(static_cast<size_t>(count));
    const DeviceArray<uint16_t> d_basis(basis);
    const Rope rope{inv_freq.data(), static_cast<int>(inv_freq.size())};
    const KeyCodec d_codec{
        {d_freq.data(), rope.rotary_pairs}, d_basis.data(), d_scale.data(), d_mean.data(), nullptr};
    gpu::unpack_keys({params(c, pages.data()), d_codec, c.position, keys.data()}, stream());
    const std::vector<float> got = keys.read();
    std::vector<float> expected(count);
    const KeyCodec codec{rope, basis.data(), scale.data(), mean.data(), nullptr};
    unpack_keys({params(c, k_pages_.data()), codec, c.position, expected.data()}, SerialExecutor());

    for (int h = 0; h < heads; ++h) {
      const auto channels = reference::channels_of(layout_->view().heads[h]);
      // Bound on the error of a channel: the rounding of each latent and of the sum.
      reference::Row error(dim);
      for (int d = 0; d < dim; ++d) {
        double magnitude = std::fabs(double{mean[h * dim + d]});
        for (const auto& channel : channels) {
          magnitude += channel.mid() * double{scale[channel.row]} *
                       std::fabs(double{bfloat16_to_float(basis[channel.row * dim + d])});
        }
        error[d] = magnitude * (kFloatRounding + testing::sum_rounding(channels.size() + 1));
        // Cosines and sines are off by 2^-22, two of them make one of up to 2 sqrt(2) times that,
        // and a few roundings of the product; all as shares of the key's own channels.
        if (rope.rotary_pairs > 0) error[d] += magnitude * 24 * kFloatRounding;
      }
      for (int64_t t = 0; t < c.num_tokens; ++t) {
        for (int d = 0; d < dim; ++d) {
          const int64_t at = (h * c.num_tokens + t) * dim + d;
          const int pair = d < rope.rotary_pairs       ? d + rope.rotary_pairs
                           : d < 2 * rope.rotary_pairs ? d - rope.rotary_pairs
                                                       : d;
          ASSERT_NEAR(got[at], expected[at], error[d] + (pair == d ? 0 : error[pair]))
              << "head " << h << " token " << t << " channel " << d;
        }
      }
    }
  }

  void check(const UnpackCase& c, uint64_t stream) {
    SCOPED_TRACE(::testing::Message() << "stream " << stream);
    prepare(c, stream);
    check_codes(c);
    check_keys(c);
    check_values(c);
  }

  Random random_{1};
  std::unique_ptr<Layout> layout_;
  std::vector<int32_t> table_;
  std::vector<uint8_t> k_pages_, v_pages_;
};

TEST_P(UnpackKernels, EverySpan) {
  uint64_t stream = 700;
  for (int64_t slot : {0, 63, 100}) {
    for (int64_t tokens : {0, 1, 64, 91}) {
      UnpackCase c;
      c.slot = slot;
      c.num_tokens = tokens;
      check(c, ++stream);
    }
  }
}

TEST_P(UnpackKernels, EveryHeadDim) {
  for (int head_dim : {16, 64, 80, 96, 128, 256, 512}) {
    for (RopeMode rope : {RopeMode::kPre, RopeMode::kPost}) {
      UnpackCase c;
      c.rope = rope;
      c.head_dim = head_dim;
      c.num_tokens = head_dim > 128 ? 5 : 20;
      c.slot = 60;
      c.v_bits = rope == RopeMode::kPre ? testing::ValueBits{2, 3} : testing::ValueBits{3, 4};
      c.bands = {{{4, 4, 0, 8}}, {{0, 8, 4, 0}}};
      check(c, 720 + head_dim);
    }
  }
}

TEST_P(UnpackKernels, EveryValueDtype) {
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    UnpackCase c;
    c.dtype = dtype;
    c.v_bits = dtype == DataType::kFloat32 ? 32 : 16;
    prepare(c, 740 + static_cast<int>(dtype));
    check_values(c);
  }
}

TEST_P(UnpackKernels, BeforeRope) {
  for (int64_t position : {0, 1000, 200000}) {
    UnpackCase c;
    c.rope = RopeMode::kPre;
    c.position = position;
    prepare(c, 750 + position);
    check_keys(c);
  }
}

// More pages than one launch takes.
TEST_P(UnpackKernels, ManyPages) {
  UnpackCase c;
  c.head_dim = 16;
  c.bands = {{{0, 0, 0, 8}}};
  c.slot = 70;
  c.num_tokens = kPageTokens * device::kMaxLaunchPages + 1;
  prepare(c, 760);
  check_codes(c);
}

SVDQ_KERNEL_TESTS(UnpackKernels);

}  // namespace
}  // namespace svdq
