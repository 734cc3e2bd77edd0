// The kernels of the quantizer stage and the CPU backend against the formulas in double.
#include "tests/kernels/quantizer_test.h"

namespace svdq {
namespace {

using reference::Row;
using testing::Fit;
using testing::FitCase;
using testing::possible_ranges;

class QuantizerKernels : public testing::QuantizerTest {};

TEST_P(QuantizerKernels, EveryHeadDim) {
  uint64_t stream = 900;
  for (int head_dim : {16, 64, 80, 128, 256, 512}) {
    FitCase c;
    c.head_dim = head_dim;
    c.num_tokens = head_dim < 128 ? 100 : 21;
    c.bands = {{{4, 4, 0, 8}}, {{0, 8, 4, 0}}, {{0, 0, 0, 0}}};
    for (bool clip : {false, true}) {
      c.clip = clip;
      c.rope = clip == (head_dim % 32 == 0) ? RopeMode::kPre : RopeMode::kPost;
      check(c, ++stream);
    }
  }
}

TEST_P(QuantizerKernels, EveryCount) {
  uint64_t stream = 920;
  for (int64_t num_tokens : {1, 2, 63, 64, 65, 300}) {
    for (bool clip : {false, true}) {
      FitCase c;
      c.num_tokens = num_tokens;
      c.head_dim = 32;
      c.clip = clip;
      c.bands = {{{4, 4, 4, 8}}, {{0, 4, 8, 8}}};
      check(c, ++stream);
    }
  }
}

TEST_P(QuantizerKernels, EveryDtypeBeforeRope) {
  uint64_t stream = 940;
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    for (int first_channel : {0, 1}) {
      FitCase c;
      c.dtype = dtype;
      c.rope = RopeMode::kPre;
      c.first_channel = first_channel;
      c.position = 100000;
      c.clip = first_channel == 0;
      check(c, ++stream);
    }
  }
}

// A sample of the runs is searched, all of them are spanned.
TEST_P(QuantizerKernels, ManyTokens) {
  for (bool clip : {false, true}) {
    FitCase c;
    c.num_tokens = testing::environment_number("SVDQ_TEST_TOKENS", 64 * 70 + 5);
    c.head_dim = 16;
    c.clip = clip;
    c.dtype = DataType::kBFloat16;
    c.bands = {{{0, 4, 4, 8}}};
    check(c, 960 + clip);
  }
}

// Decoded latents are unbiased along the latents, as their means are in the middle of the codes. Rows have no channels
// of keys in common, so that each centre can be read back from the mean.
TEST_P(QuantizerKernels, DecodedLatentsAreUnbiased) {
  FitCase c;
  c.num_tokens = 2000;
  c.bands = {{{4, 4, 4, 8}}, {{0, 4, 8, 8}}};
  prepare(c, 990);
  const int dim = c.head_dim;
  for (size_t i = 0; i < components_.size(); ++i) {
    const size_t row = i / dim % dim;
    if (i % 32 != row % 32) components_[i] = 0;
  }
  const Fit device = on_device(c), cpu = on_cpu(c);
  check_fit(c, device);
  for (int h = 0; h < layout_->num_heads(); ++h) {
    for (const reference::Channel& channel : reference::channels_of(layout_->view().heads[h])) {
      if (channel.width > kUnbiasedWidth) continue;
      SCOPED_TRACE(::testing::Message() << "head " << h << " channel " << channel.row);
      double gains[2];
      for (const Fit* fit : {&device, &cpu}) {
        const uint16_t* row = &fit->basis[channel.row * dim];
        double length = 0, before = 0, square = 0, product = 0;
        for (int d = 0; d < dim; ++d) {
          length += std::pow(double{bfloat16_to_float(row[d])}, 2);
          before += std::pow(double{component(c, h, channel)[d]}, 2);
        }
        const double scale = fit->scale[channel.row], mid = channel.mid();
        for (const Row& key : rows_[h]) {
          // The latent along the row, and the row's multiple that it is decoded to.
          const double x = reference::project(key, &fit->centred_mean[h * dim], row);
          const double code = std::clamp(std::round(x / scale + mid), 0.0, 2 * mid);
          square += x * x;
          product += x * (code - mid) * scale * length;
        }
        // The fit's latents are along the rounded component, these along the row: each is off by up to one rounding of
        // its parts, and the length of the row by up to two.
        EXPECT_NEAR(product / square / before, 1, 4 * testing::rounding(DataType::kBFloat16));
        gains[fit == &cpu] = length / before;
      }
      // Without the gain, codes of one bit lose a fifth of normal latents.
      if (channel.width == 1) {
        EXPECT_GT(gains[0], 1.1);
      }
      // Rounding may settle a draw between ranges, and no more than a draw between bfloat16 numbers otherwise.
      if (possible_ranges(latents(c, h, channel)).size() == 1) {
        EXPECT_NEAR(gains[0], gains[1], testing::rounding(DataType::kBFloat16) * gains[1]);
      }
    }
  }
}

// Searches that take one head or two at a time, past heads without channels.
TEST_P(QuantizerKernels, HeadByHead) {
  for (int64_t channels : {1, 28}) {
    FitCase c;
    c.num_tokens = 64;
    c.head_dim = 32;
    c.bands = {{{0, 0, 0, 0}}, {{4, 0, 0, 8}}, {{0, 4, 4, 8}},
               {{0, 0, 0, 0}}, {{4, 4, 4, 0}}, {{0, 0, 0, 0}}};
    c.scratch = channels * 64;
    check(c, 950 + static_cast<uint64_t>(channels));
  }
}

// All keys alike: no range, and a mean that gives them back in the coded channels.
TEST_P(QuantizerKernels, ConstantKeysHaveNoRange) {
  for (bool clip : {false, true}) {
    FitCase c;
    c.clip = clip;
    c.num_tokens = 70;
    prepare(c, 970);
    for (int64_t t = 1; t < c.num_tokens; ++t) {
      for (int h = 0; h < 2; ++h) {
        for (int d = 0; d < c.head_dim; ++d) keys_->set(h, t, d, keys_->get(h, 0, d));
        rows_[h][t] = rows_[h][0];
      }
    }
    const Fit fit = on_device(c);
    for (float scale : fit.scale) EXPECT_EQ(scale, 0.0f);
    if (!clip) check_fit(c, fit);
  }
}

// The same numbers at each call, whatever the order of threads.
TEST_P(QuantizerKernels, Deterministic) {
  FitCase c;
  c.num_tokens = 500;
  c.head_dim = 16;
  c.bands = {{{4, 4, 0, 8}}};
  prepare(c, 980);
  const Fit once = on_device(c), again = on_device(c);
  EXPECT_EQ(once.scale, again.scale);
  EXPECT_EQ(once.centred_mean, again.centred_mean);
}

SVDQ_KERNEL_TESTS(QuantizerKernels);

}  // namespace
}  // namespace svdq
