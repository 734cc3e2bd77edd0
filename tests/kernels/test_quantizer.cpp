// The kernels of the quantizer stage and the CPU backend against the formulas in double.
#include "tests/kernels/device_tokens.h"

#include <algorithm>
#include <limits>

#include "csrc/gpu/quantizer.h"
#include "tests/kernels/quantizer_reference.h"

namespace svdq {
namespace {

using reference::Row;
using testing::Bounded;
using testing::DeviceArray;
using testing::DeviceTokens;
using testing::full_range;
using testing::kFloatRounding;
using testing::Latents;
using testing::possible_ranges;
using testing::Random;
using testing::Range;
using testing::Tokens;

struct FitCase {
  int64_t num_tokens = 150;
  int head_dim = 64;
  RopeMode rope = RopeMode::kPost;
  DataType dtype = DataType::kFloat32;
  bool clip = true;
  testing::HeadBands bands = {{{4, 8, 4, 8}}, {{0, 4, 8, 16}}};
  int first_channel = 0;  // of the rows that are read; not 0: no vector may be
  int64_t position = 300;
  int64_t scratch = gpu::kScratchNumbers;
};

struct Fit {
  std::vector<uint16_t> basis;
  std::vector<float> scale, centred_mean;
};

class QuantizerKernels : public testing::KernelTest {
 protected:
  void prepare(const FitCase& c, uint64_t stream) {
    Random random(stream);
    layout_ = std::make_unique<Layout>(testing::layout_ints(c.rope, c.head_dim, c.bands));
    const int heads = layout_->num_heads(), dim = c.head_dim;
    frequencies_ = testing::inverse_frequencies(c.rope == RopeMode::kPre ? dim / 2 : 0);
    keys_ = std::make_unique<Tokens>(heads, c.num_tokens, dim + c.first_channel, c.dtype);
    keys_->fill_like_keys(random, 2.0);
    components_.resize(heads * dim * dim);
    for (float& x : components_) x = static_cast<float>(random.normal() / std::sqrt(dim));
    rows_.assign(heads, {});
    mean_.assign(heads * dim, 0);
    for (int h = 0; h < heads; ++h) {
      Row sum(dim);
      for (int64_t t = 0; t < c.num_tokens; ++t) {
        Row row(dim);
        for (int d = 0; d < dim; ++d) row[d] = keys_->get(h, t, d + c.first_channel);
        reference::rotate(row, rope(), -static_cast<double>(c.position + t));
        for (int d = 0; d < dim; ++d) sum[d] += row[d];
        rows_[h].push_back(row);
      }
      for (int d = 0; d < dim; ++d)
        mean_[h * dim + d] = static_cast<float>(sum[d] / static_cast<double>(c.num_tokens));
    }
  }

  Rope rope() const { return {frequencies_.data(), static_cast<int>(frequencies_.size())}; }

  QuantizerParams params(const FitCase& c) const {
    TokenSource source = keys_->source();
    source.data =
        static_cast<const uint8_t*>(source.data) + c.first_channel * testing::size_of(source.dtype);
    return {source, layout_->view(), rope(), c.position, c.clip, mean_.data(), components_.data()};
  }

  Fit on_device(const FitCase& c) {
    const DeviceTokens keys(*keys_, c.first_channel);
    const DeviceArray<float> frequencies(frequencies_), mean(mean_), components(components_),
        scale(static_cast<size_t>(layout_->rank())), centred_mean(mean_.size());
    const DeviceArray<uint16_t> basis(static_cast<size_t>(layout_->rank() * c.head_dim));
    QuantizerParams p = params(c);
    p.keys = keys.source();
    p.rope.inv_freq = frequencies.data();
    p.mean = mean.data();
    p.components = components.data();
    p.basis = basis.data();
    p.scale = scale.data();
    p.centred_mean = centred_mean.data();
    gpu::fit_quantizer(p, stream(), c.scratch);
    return {basis.read(), scale.read(), centred_mean.read()};
  }

  Fit on_cpu(const FitCase& c) const {
    Fit fit{std::vector<uint16_t>(layout_->rank() * c.head_dim),
            std::vector<float>(layout_->rank()), std::vector<float>(mean_.size())};
    QuantizerParams p = params(c);
    p.basis = fit.basis.data();
    p.scale = fit.scale.data();
    p.centred_mean = fit.centred_mean.data();
    current_backend().fit_quantizer(p, SerialExecutor());
    return fit;
  }

  // Latents of a channel: of all tokens, or of the sample that a search looks at.
  Latents latents(const FitCase& c, int h, const reference::Channel& channel,
                  const std::vector<uint16_t>& basis) const {
    const uint16_t* row = &basis[channel.row * c.head_dim];
    const float* mean = &mean_[h * c.head_dim];
    Latents l{{}, 0, static_cast<double>((1 << channel.width) - 1)};
    const int64_t runs = gpu::ceil_div(c.num_tokens, kPageTokens),
                  samples = c.clip ? std::min<int64_t>(runs, 64) : runs;
    double magnitude = 0;
    for (int64_t sample = 0; sample < samples; ++sample) {
      const int64_t first = sample * runs / samples * kPageTokens;
      for (int64_t t = first; t < std::min(first + kPageTokens, c.num_tokens); ++t) {
        const Row& key = rows_[h][t];
        l.x.push_back(reference::project(key, mean, row));
        double parts = 0;
        for (int d = 0; d < c.head_dim; ++d) {
          parts += (2 * std::fabs(key[d]) + std::fabs(double{mean[d]})) *
                   std::fabs(double{bfloat16_to_float(row[d])});
        }
        magnitude = std::max(magnitude, parts);
      }
    }
    // Turning back and centring cost under 24 roundings of the key (tests/kernels/test_pack.cpp).
    l.error = magnitude * (24 * kFloatRounding + testing::sum_rounding(c.head_dim));
    return l;
  }

  void check_fit(const FitCase& c, const Fit& fit) const {
    const int dim = c.head_dim;
    for (int h = 0; h < layout_->num_heads(); ++h) {
      Row centred(&mean_[h * dim], &mean_[h * dim] + dim), error(dim), magnitude(dim);
      const HeadPlan& head = layout_->view().heads[h];
      for (const reference::Channel& channel : reference::channels_of(head)) {
        const Latents l = latents(c, h, channel, fit.basis);
        const std::vector<Range> ranges =
            c.clip ? possible_ranges(l) : std::vector<Range>{full_range(l)};
        const double scale = fit.scale[channel.row];
        const auto is_it = [&](const Range& range) {
          return std::fabs(scale - range.scale.value) <= range.scale.error;
        };
        const auto found = std::find_if(ranges.begin(), ranges.end(), is_it);
        ASSERT_NE(found, ranges.end())
            << "head " << h << " channel " << channel.row << ": " << scale << " is none of "
            << ranges.size() << " ranges, " << ranges[0].scale.value << " the first";
        for (int d = 0; d < dim; ++d) {
          const double basis = bfloat16_to_float(fit.basis[channel.row * dim + d]);
          centred[d] += found->centre.value * basis;
          error[d] += found->centre.error * std::fabs(basis);
          magnitude[d] += std::fabs(found->centre.value * basis);
        }
        for (int d = 0; d < dim; ++d) {
          const int j = channel.row - head.first_channel;
          ASSERT_EQ(fit.basis[channel.row * dim + d],
                    float_to_bfloat16(components_[(h * dim + j) * dim + d]));
        }
      }
      for (int d = 0; d < dim; ++d) {
        const double rounding = testing::sum_rounding(head.rank() + 1) *
                                (magnitude[d] + std::fabs(double{mean_[h * dim + d]}));
        ASSERT_NEAR(fit.centred_mean[h * dim + d], centred[d], error[d] + rounding)
            << "head " << h << " channel " << d;
      }
    }
  }

  void check(const FitCase& c, uint64_t stream) {
    SCOPED_TRACE(::testing::Message() << c.num_tokens << " tokens, head_dim " << c.head_dim
                                      << ", clip " << c.clip << ", stream " << stream);
    prepare(c, stream);
    const Fit fit = on_device(c);
    check_fit(c, fit);
    SCOPED_TRACE("on the CPU");
    check_fit(c, on_cpu(c));
  }

  std::unique_ptr<Layout> layout_;
  std::vector<float> frequencies_, components_, mean_;
  std::unique_ptr<Tokens> keys_;
  std::vector<std::vector<Row>> rows_;  // [H][T], rotated back
};

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
