// A case of the quantizer stage: its inputs, fits by the kernels and by the CPU backend, and their check against the
// ranges that the formulas in double allow.
#pragma once

#include "tests/kernels/device_tokens.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "csrc/gpu/quantizer.h"
#include "tests/kernels/quantizer_reference.h"

namespace svdq::testing {

struct FitCase {
  int64_t num_tokens = 150;
  int head_dim = 64;
  RopeMode rope = RopeMode::kPost;
  DataType dtype = DataType::kFloat32;
  bool clip = true;
  HeadBands bands = {{{4, 8, 4, 8}}, {{0, 4, 8, 16}}};
  int first_channel = 0;  // of the rows that are read; not 0: no vector may be
  int64_t position = 300;
  int64_t scratch = gpu::kScratchNumbers;
};

inline Bounded product(const Bounded& a, const Bounded& b) {
  const double value = a.value * b.value;
  return {value, std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error +
                     kFloatRounding * std::fabs(value)};
}

struct Fit {
  std::vector<uint16_t> basis;
  std::vector<float> scale, centred_mean;
};

class QuantizerTest : public KernelTest {
 protected:
  void prepare(const FitCase& c, uint64_t stream) {
    Random random(stream);
    layout_ = std::make_unique<Layout>(layout_ints(c.rope, c.head_dim, c.bands));
    const int heads = layout_->num_heads(), dim = c.head_dim;
    frequencies_ = inverse_frequencies(c.rope == RopeMode::kPre ? dim / 2 : 0);
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
        static_cast<const uint8_t*>(source.data) + c.first_channel * size_of(source.dtype);
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

  // The component that a channel's row of the basis comes from.
  const float* component(const FitCase& c, int h, const reference::Channel& channel) const {
    const int j = channel.row - layout_->view().heads[h].first_channel;
    return &components_[(h * c.head_dim + j) * c.head_dim];
  }

  // Latents of a channel along its rounded component: of all tokens, or of the sample that a search looks at.
  Latents latents(const FitCase& c, int h, const reference::Channel& channel) const {
    std::vector<uint16_t> row(c.head_dim);
    for (int d = 0; d < c.head_dim; ++d) row[d] = float_to_bfloat16(component(c, h, channel)[d]);
    const float* mean = &mean_[h * c.head_dim];
    Latents l{{}, 0, static_cast<double>((1 << channel.width) - 1)};
    const int64_t runs = gpu::ceil_div(c.num_tokens, kPageTokens),
                  samples = c.clip ? std::min<int64_t>(runs, 64) : runs;
    double magnitude = 0;
    for (int64_t sample = 0; sample < samples; ++sample) {
      const int64_t first = sample * runs / samples * kPageTokens;
      for (int64_t t = first; t < std::min(first + kPageTokens, c.num_tokens); ++t) {
        const Row& key = rows_[h][t];
        l.x.push_back(reference::project(key, mean, row.data()));
        double parts = 0;
        for (int d = 0; d < c.head_dim; ++d) {
          parts += (2 * std::fabs(key[d]) + std::fabs(double{mean[d]})) *
                   std::fabs(double{bfloat16_to_float(row[d])});
        }
        magnitude = std::max(magnitude, parts);
      }
    }
    // Turning back and centring cost under 24 roundings of the key (tests/kernels/test_pack.cpp).
    l.error = magnitude * (24 * kFloatRounding + sum_rounding(c.head_dim));
    return l;
  }

  // Are scale and row of the channel those of the range?
  bool has_range(const FitCase& c, const Fit& fit, int h, const reference::Channel& channel,
                 const Range& range) const {
    const Bounded scale = product(range.scale, range.root);
    if (std::fabs(double{fit.scale[channel.row]} - scale.value) > scale.error) return false;
    for (int d = 0; d < c.head_dim; ++d) {
      const uint16_t number = fit.basis[channel.row * c.head_dim + d];
      const float before = component(c, h, channel)[d];
      const Bounded expected = product({before, 0}, range.root);
      const double rounding =
          testing::rounding(DataType::kBFloat16) * (std::fabs(expected.value) + expected.error);
      const bool exact = range.root.value == 1 && range.root.error == 0;
      if (exact ? number != float_to_bfloat16(before)
                : std::fabs(double{bfloat16_to_float(number)} - expected.value) >
                      expected.error + rounding) {
        return false;
      }
    }
    return true;
  }

  // A root is at least that of 1/2, so its inverse is off by twice its error.
  static Bounded stored_centre(const Range& range) {
    return product(range.centre, {1 / range.root.value, 2 * range.root.error});
  }

  void check_fit(const FitCase& c, const Fit& fit) const {
    const int dim = c.head_dim;
    for (int h = 0; h < layout_->num_heads(); ++h) {
      Row centred(&mean_[h * dim], &mean_[h * dim] + dim), error(dim), magnitude(dim);
      const HeadPlan& head = layout_->view().heads[h];
      for (const reference::Channel& channel : reference::channels_of(head)) {
        const Latents l = latents(c, h, channel);
        const std::vector<Range> ranges =
            c.clip ? possible_ranges(l) : std::vector<Range>{full_range(l)};
        const auto is_it = [&](const Range& range) { return has_range(c, fit, h, channel, range); };
        const auto found = std::find_if(ranges.begin(), ranges.end(), is_it);
        ASSERT_NE(found, ranges.end())
            << "head " << h << " channel " << channel.row << ": scale " << fit.scale[channel.row]
            << " and row are of none of " << ranges.size() << " ranges, "
            << product(ranges[0].scale, ranges[0].root).value << " the first";
        Bounded centre = stored_centre(*found);
        // Where rounding decides about codes and with them the gain, more than one range may fit.
        for (auto other = found; other != ranges.end();
             other = std::find_if(other + 1, ranges.end(), is_it)) {
          const Bounded another = stored_centre(*other);
          centre.error =
              std::max(centre.error, std::fabs(another.value - centre.value) + another.error);
        }
        for (int d = 0; d < dim; ++d) {
          const double basis = bfloat16_to_float(fit.basis[channel.row * dim + d]);
          centred[d] += centre.value * basis;
          error[d] += centre.error * std::fabs(basis);
          magnitude[d] += std::fabs(centre.value * basis);
        }
      }
      for (int d = 0; d < dim; ++d) {
        const double rounding =
            sum_rounding(head.rank() + 1) * (magnitude[d] + std::fabs(double{mean_[h * dim + d]}));
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

}  // namespace svdq::testing
