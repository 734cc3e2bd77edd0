// Ranges of a channel's codes and their gains in double, with bounds on what sums in float may have made of them: which
// ranges may win a search when sums are rounded.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tests/core/reference.h"
#include "tests/core/testing.h"

namespace svdq::testing {

using reference::Row;

// A number in double and what float may have made of it.
struct Bounded {
  double value, error;
};

// The range of a channel's codes, and the root of the gain that makes its decoded latents unbiased.
struct Range {
  Bounded centre, scale;
  Bounded root = {1, 0};
};

// Latents of one channel that ranges come from, and what the kernels' may differ by.
struct Latents {
  Row x;
  double error;
  double top;  // highest code
};

inline Range full_range(const Latents& l) {
  const auto [least, most] = std::minmax_element(l.x.begin(), l.x.end());
  const double centre = (*least + *most) / 2, scale = (*most - *least) / l.top;
  return {{centre, l.error + 2 * kFloatRounding * std::max(std::fabs(*least), std::fabs(*most))},
          {scale, 2 * l.error / l.top + 4 * kFloatRounding * scale}};
}

// What a latent minus its centre, or a decoded one, may be off by in a range.
inline double latent_off(const Latents& l, const Range& range) {
  double largest = 0;
  for (double x : l.x) largest = std::max(largest, std::fabs(x - range.centre.value));
  return l.error + range.centre.error + l.top / 2 * range.scale.error +
         4 * kFloatRounding * (largest + l.top * range.scale.value);
}

// Fourth power of the error of coding the latents in a range. Codes change where both are as far off, so the sum
// is continuous in all it depends on, and each miss is off by what its parts are.
inline Bounded coding_error(const Latents& l, const Range& range) {
  const double centre = range.centre.value, scale = range.scale.value, mid = l.top / 2;
  const double off = latent_off(l, range);
  double sum = 0, most = 0;
  for (double x : l.x) {
    const double code =
        scale > 0 ? std::clamp(std::round((x - centre) / scale + mid), 0.0, l.top) : mid;
    const double miss = std::fabs(x - centre - (code - mid) * scale);
    sum += std::pow(miss, 4);
    most += std::pow(miss + off, 4);
  }
  // The unit and three products round the power by eight roundings.
  const double rounding =
      testing::sum_rounding(static_cast<int64_t>(l.x.size())) + 8 * kFloatRounding;
  return {sum, most - sum + rounding * sum};
}

// Root of <x, x> / <x, decoded>, between the inverse of the largest gain and it. A decoded latent jumps where its code
// changes, so those within what they may be off by of such a place count with either code.
inline Bounded root_gain(const Latents& l, const Range& range) {
  const double scale = range.scale.value, mid = l.top / 2, off = latent_off(l, range);
  double square = 0, square_error = 0, product = 0, product_error = 0, magnitude = 0;
  for (double latent : l.x) {
    const double x = latent - range.centre.value, place = scale > 0 ? x / scale + mid : mid;
    const double code = std::clamp(std::round(place), 0.0, l.top), y = (code - mid) * scale;
    // The nearest place where a code changes lies half a code from a whole number between 0 and top.
    const double jump = std::clamp(std::floor(place), 0.0, l.top - 1) + 0.5;
    const double miss = off + (std::fabs(place - jump) * scale <= off ? scale : 0);
    square += x * x;
    product += x * y;
    magnitude += std::fabs(x * y);
    square_error += off * (2 * std::fabs(x) + off);
    product_error += std::fabs(x) * miss + off * (std::fabs(y) + miss);
  }
  const double rounding =
      testing::sum_rounding(static_cast<int64_t>(l.x.size())) + 4 * kFloatRounding;
  square_error += rounding * square;
  product_error += rounding * magnitude;
  const auto root = [](double above, double below) {
    const double largest = kLargestGain;
    return std::sqrt(below > 0 ? std::clamp(above / below, 1 / largest, largest) : 1.0);
  };
  double least = root(std::max(square - square_error, 0.0), product + product_error);
  double most = std::sqrt(double{kLargestGain});
  if (product > product_error) most = root(square + square_error, product - product_error);
  if (product <= product_error) least = std::min(least, 1.0);
  const double value = root(square, product);
  return {value, std::max(most - value, value - least) + 4 * kFloatRounding * value};
}

// The range with its root, where the codes are to be unbiased.
inline Range unbiased(const Latents& l, Range range) {
  if (l.top < 1 << kUnbiasedWidth) range.root = root_gain(l, range);
  return range;
}

// Those of the candidates that may have the least error.
inline std::vector<size_t> possible_winners(const Latents& l,
                                            const std::vector<Range>& candidates) {
  std::vector<Bounded> errors;
  double least = std::numeric_limits<double>::infinity();
  for (const Range& range : candidates) {
    errors.push_back(coding_error(l, range));
    least = std::min(least, errors.back().value + errors.back().error);
  }
  std::vector<size_t> winners;
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (errors[i].value - errors[i].error <= least) winners.push_back(i);
  }
  return winners;
}

// Ranges that the search may end with.
inline std::vector<Range> possible_ranges(const Latents& l) {
  const auto n = static_cast<double>(l.x.size());
  double mean = 0, squares = 0, largest = 0;
  for (double x : l.x) mean += x / n;
  for (double x : l.x) {
    squares += (x - mean) * (x - mean) / n;
    largest = std::max(largest, std::fabs(x));
  }
  const double summing = testing::sum_rounding(static_cast<int64_t>(l.x.size()));
  const double deviation = std::sqrt(squares), mean_error = l.error + summing * largest;
  const double deviation_error =
      l.error + mean_error + summing * deviation + 2 * kFloatRounding * largest;
  const auto clipped = [&](double multiple) {
    const double unit = 2 * multiple / l.top;
    // A multiple comes from up to 25 products.
    return Range{{mean, mean_error},
                 {unit * deviation, unit * (deviation_error + 30 * kFloatRounding * deviation)}};
  };

  std::vector<Range> coarse = {full_range(l)}, found;
  std::vector<double> multiples = {0};
  double multiple = 0.4;
  for (int i = 0; i < 22; ++i, multiple *= 1.15) {
    coarse.push_back(clipped(multiple));
    multiples.push_back(multiple);
  }
  for (size_t winner : possible_winners(l, coarse)) {
    if (winner == 0) {
      found.push_back(unbiased(l, coarse[0]));
      continue;
    }
    std::vector<Range> fine = {coarse[winner]};
    for (int i = -4; i <= 4; ++i) fine.push_back(clipped(multiples[winner] * (1 + 0.03 * i)));
    for (size_t i : possible_winners(l, fine)) found.push_back(unbiased(l, fine[i]));
  }
  return found;
}

}  // namespace svdq::testing
