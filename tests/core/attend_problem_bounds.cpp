// Bounds on the error of each score and product of an attend problem.
#include "tests/core/attend_problem.h"

namespace svdq::testing {

using reference::Channel;
using reference::Row;

double AttendProblem::scaled_basis(int b, const Channel& channel, int d) const {
  const int64_t row = int64_t{b} * layout_.rank() + channel.row;
  return static_cast<double>(bfloat16_to_float(basis_[row * c_.head_dim + d])) *
         static_cast<double>(scale_[row]);
}

// Sum of |code - mid| of a slot, where 8-bit codes count 1 / 254 because folded rows have a low term for them.
double AttendProblem::distances(const std::vector<Channel>& channels, int b, int slot) const {
  double sum = 0;
  for (const Channel& channel : channels) {
    const int code =
        get_code(key_page(b, slot), channel.address(slot % kPageTokens), channel.width);
    sum += std::fabs(code - channel.mid()) / (channel.width == 8 ? 254 : 1);
  }
  return 1.02 * sum;  // the low term is rounded to a small scale
}

// Error of a folded row's product with codes: a number is rounded by at max_score half the row's scale, its largest
// magnitude over 127.
template <typename Weight>
double AttendProblem::row_error(const std::vector<Channel>& channels, int b, int slot,
                                const Weight& weight) const {
  if (c_.exact_folding) return 0;
  double largest = 0;
  for (const Channel& channel : channels) largest = std::max(largest, std::fabs(weight(channel)));
  return distances(channels, b, slot) * largest / 127 / 2;
}

bool AttendProblem::absorbed(int pair) const {
  return c_.group * c_.q_len <= kAbsorbRows && !c_.gathered &&
         (pair < 0 || rope_.inv_freq[pair] <= kAbsorbedFastest);
}

// Pre-RoPE channels are multiplied with folded rows of the basis, one per key channel, except for slow pairs and
// channels that do not rotate where these are absorbed into the query.
double AttendProblem::pre_error(int b, int h, int slot, const Row& query,
                                const Row& rotated) const {
  Row errors(c_.head_dim);
  for (int d = 0; d < c_.head_dim; ++d) {
    errors[d] = row_error(pre_[h], b, slot,
                          [&](const Channel& channel) { return scaled_basis(b, channel, d); });
  }
  const auto length = [&](const Row& row, int i) {
    return std::hypot(row[i], row[i + rope_.rotary_pairs]);
  };
  const float* means = &mean_[(int64_t{b} * num_heads() + h) * c_.head_dim];
  const Row mean(means, means + c_.head_dim);
  Row key = rotated;  // unrotated, minus the mean
  reference::rotate(key, rope_, -(first_position(b) + slot_of(b, h, slot)));
  for (int d = 0; d < c_.head_dim; ++d) key[d] -= mean[d];
  double sum = 0, largest = 0;
  for (int i = 0; i < rope_.rotary_pairs; ++i) {  // RoPE keeps the length of a pair
    const double frequency = rope_.inv_freq[i];
    sum += length(query, i) * (absorbed(i) ? length(key, i) * absorbed_error(frequency) +
                                                 length(mean, i) * absorbed_mean_error(frequency)
                                           : length(errors, i));
  }
  for (int d = 2 * rope_.rotary_pairs; d < c_.head_dim && !absorbed(-1); ++d)
    sum += std::fabs(query[d]) * errors[d];
  if (!absorbed(-1)) return static_cast<double>(sm_scale_) * sum;
  // A page's operands of the three degrees are bounded by this and rounded to 8 bits; before that they are sums over
  // pairs of numbers rounded to 16 bits.
  int pairs = 0;
  for (const Channel& channel : pre_[h]) {
    double weight = 0;
    for (int i = 0; i < rope_.rotary_pairs; ++i) {
      if (!absorbed(i)) continue;
      pairs += &channel == &pre_[h][0];
      const double a = rope_.inv_freq[i] * (kPageTokens - 1) / 2;
      weight +=
          length(query, i) * (1 + a + a * a / 4) *
          std::hypot(scaled_basis(b, channel, i), scaled_basis(b, channel, i + rope_.rotary_pairs));
    }
    for (int d = 2 * rope_.rotary_pairs; d < c_.head_dim; ++d)
      weight += std::fabs(query[d] * scaled_basis(b, channel, d));
    largest = std::max(largest, weight);
  }
  const double rounding16 = pairs * 1.5 / 65536 + 0x1p-13;
  sum += distances(pre_[h], b, slot) * largest * (1.0 / 127 / 2 + rounding16);
  return static_cast<double>(sm_scale_) * sum;
}

// Post-RoPE channels are multiplied with folded queries, query . basis.
double AttendProblem::post_error(int b, int h, int slot, const Row& query) const {
  return static_cast<double>(sm_scale_) * row_error(post_[h], b, slot, [&](const Channel& channel) {
           double sum = 0;
           for (int d = 0; d < c_.head_dim; ++d) sum += query[d] * scaled_basis(b, channel, d);
           return sum;
         });
}

// A scaled probability is dithered and truncated to a 255th of the largest of its page, and multiplies code - mid: the
// variance is at max_score a quarter of that step squared, and six deviations are allowed.
double AttendProblem::product_error(const std::vector<Seen>& seen, double lse, int d) {
  double sum = 0;
  for (size_t first = 0, last; first < seen.size() && seen[first].page >= 0; first = last) {
    double probability = 0, scale = 0, codes = 0;
    for (last = first; last < seen.size() && seen[last].page == seen[first].page; ++last) {
      probability = std::max(probability, std::exp(seen[last].score - lse));
      scale = std::max(scale, seen[last].scale);
      codes += seen[last].code[d] * seen[last].code[d];
    }
    sum += 6 * probability * scale / 255 / 2 * std::sqrt(codes);
  }
  return sum;
}

}  // namespace svdq::testing
