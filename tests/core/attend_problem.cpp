#include "tests/core/attend_problem.h"

namespace svdq::testing {

using reference::Channel;
using reference::Row;

AttendProblem::AttendProblem(const AttendCase& c, uint64_t stream)
    : c_(c),
      layout_(layout_ints(c.rope, c.head_dim, c.bands, c.v_bits, c.v_group_size, c.pre_bands)),
      frequencies_(inverse_frequencies(c.rope == RopeMode::kPost ? 0 : c.rotary_pairs)),
      rope_{frequencies_.data(), static_cast<int>(frequencies_.size())},
      cache_seqlens_(c.cache_seqlens.begin(), c.cache_seqlens.end()),
      window_lens_(c.window_lens.begin(), c.window_lens.end()),
      first_positions_(c.first_positions.begin(), c.first_positions.end()),
      sm_scale_(static_cast<float>(1 / std::sqrt(c.head_dim))) {
  Random random(stream);
  for (int h = 0; h < num_heads(); ++h) {
    pre_.push_back(reference::part_channels(layout_.view(), h, RopeMode::kPre));
    post_.push_back(reference::part_channels(layout_.view(), h, RopeMode::kPost));
  }

  const int64_t rows = int64_t{batch()} * num_qo_heads() * c.q_len;
  query_.resize(rows * c.head_dim * size_of(c.dtype));
  for (int64_t r = 0; r < rows; ++r) {
    const int one_hot = random.integer(0, c.head_dim - 1);
    for (int d = 0; d < c.head_dim; ++d) {
      // After RoPE weights are query . basis: one channel alone keeps their magnitudes equal.
      double x = random.normal();
      if (c.window_weights && has_post()) x = d == one_hot ? 4.0 : 0.0;
      write_number(&query_[(r * c.head_dim + d) * size_of(c.dtype)], c.dtype, x);
    }
  }

  // Rows after exact_len, and the gaps between heads, are NaN: nothing may read them.
  const int64_t capacity = *std::max_element(c.window_lens.begin(), c.window_lens.end()) + 2;
  window_head_stride_ = capacity * c.head_dim + 16;
  window_batch_stride_ = window_head_stride_ * num_heads() + 32;
  const int64_t size = size_of(c.window_dtype);
  window_keys_.assign(window_batch_stride_ * batch() * size, 0xff);
  window_values_.assign(window_batch_stride_ * batch() * size, 0xff);
  for (int b = 0; b < batch(); ++b) {
    for (int h = 0; h < num_heads(); ++h) {
      for (int e = 0; e < window_lens_[b]; ++e) {
        for (int d = 0; d < c.head_dim; ++d) {
          write_number(&window_keys_[(window_at(b, h, e) + d) * size], c.window_dtype,
                       random.normal());
          write_number(&window_values_[(window_at(b, h, e) + d) * size], c.window_dtype,
                       random.normal());
        }
      }
    }
  }
  make_basis(random);
  if (c_.gathered) make_token_slots(random);
  make_pages(random);
  if (c_.outliers) make_outliers(random);
}

void AttendProblem::make_basis(Random& random) {
  const int dim = c_.head_dim;
  basis_.resize(int64_t{batch()} * layout_.rank() * dim);
  scale_.resize(batch() * layout_.rank());
  mean_.resize(batch() * num_heads() * dim);
  for (float& x : mean_) x = static_cast<float>(random.normal());
  if (c_.rope == RopeMode::kHybrid) post_mean_.resize(mean_.size());
  for (float& x : post_mean_) x = static_cast<float>(random.normal());
  for (uint16_t& x : basis_) {
    const double sign = random.integer(0, 1) ? 1.0 : -1.0;
    x = float_to_bfloat16(static_cast<float>((c_.window_weights ? sign : random.normal()) / 8.0));
  }
  for (int b = 0; b < batch(); ++b) {
    for (const auto* part : {&pre_, &post_}) {
      for (const auto& channels : *part) {
        for (const Channel& channel : channels) {
          // The codes of a channel are spread evenly over their range: about the same variance for
          // each width.
          const double scale = (2 + 0.4 * random.integer(0, 10)) / (1 << channel.width);
          scale_[b * layout_.rank() + channel.row] =
              static_cast<float>(c_.window_weights ? 0.25 : scale);
        }
      }
    }
  }
}

void AttendProblem::run(const Backend& backend, const Executor& executor) {
  const int64_t rows = int64_t{batch()} * num_qo_heads() * c_.q_len;
  out_.assign(rows * c_.head_dim * size_of(c_.dtype), 0xff);
  lse_.assign(rows, std::numeric_limits<float>::quiet_NaN());
  AttendParams p{};
  p.keys.layout = layout_.view();
  p.keys.codec.rope = rope_;
  p.keys.batch = batch();
  p.queries.num_heads = num_qo_heads();
  p.queries.length = c_.q_len;
  p.queries.data = query_.data();
  p.queries.dtype = c_.dtype;
  p.keys.pages = k_pages_.data();
  p.v_pages = v_pages_.data();
  p.keys.num_pages = static_cast<int64_t>(k_pages_.size()) / layout_.k_page_bytes();
  p.v_dtype = c_.window_dtype;
  p.keys.page_table = table_.data();
  p.keys.table_stride = table_stride_;
  p.keys.cache_seqlens = cache_seqlens_.data();
  p.keys.codec.basis = basis_.data();
  p.keys.codec.scale = scale_.data();
  p.keys.codec.mean = mean_.data();
  p.keys.codec.post_mean = post_mean_.empty() ? nullptr : post_mean_.data();
  p.keys.first_position = first_positions_.empty() ? nullptr : first_positions_.data();
  p.window.keys = window_keys_.data();
  p.window.values = window_values_.data();
  p.window.dtype = c_.window_dtype;
  p.window.batch_stride = window_batch_stride_;
  p.window.head_stride = window_head_stride_;
  p.window.rows = static_cast<int>((window_head_stride_ - 16) / c_.head_dim);
  p.window.lens = window_lens_.data();
  if (c_.outliers) {
    p.keys.outlier_slots = outlier_slots_.data();
    p.keys.outlier_keys = outlier_keys_.data();
    p.keys.outlier_dtype = c_.window_dtype;
    p.keys.num_outliers = outlier_room_;
  }
  p.token_slots = c_.gathered ? token_slots_.data() : nullptr;
  p.keys.sink_tokens = c_.sink_tokens;
  p.queries.sm_scale = sm_scale_;
  p.causal = c_.causal;
  p.out = out_.data();
  p.lse = lse_.data();
  backend.attend(p, executor);
}

double AttendProblem::scaled_basis(int b, const Channel& channel, int d) const {
  const int64_t row = int64_t{b} * layout_.rank() + channel.row;
  return static_cast<double>(bfloat16_to_float(basis_[row * c_.head_dim + d])) *
         static_cast<double>(scale_[row]);
}

// The codes of a slot less the middle ones, added up with the factors that rounding their weights to 8
// bits has (a second term of 8 bits for 8-bit codes).
double AttendProblem::distances(const std::vector<Channel>& channels, int b, int slot) const {
  double sum = 0;
  for (const Channel& channel : channels) {
    const int code = get_code(key_page(b, slot), channel.place(slot % kPageTokens), channel.width);
    sum += std::fabs(code - channel.mid()) / (channel.width == 8 ? 254 : 1);
  }
  return 1.02 * sum;  // rounding of the weights, seen against the second term's small step
}

// What a row's product with codes may be off because its weights are held in 8 bits: a weight is off
// by at most half a step, and the step is the largest weight over 127.
template <typename Weight>
double AttendProblem::row_error(const std::vector<Channel>& channels, int b, int slot,
                                const Weight& weight) const {
  if (c_.window_weights) return 0;
  double largest = 0;
  for (const Channel& channel : channels) largest = std::max(largest, std::fabs(weight(channel)));
  return distances(channels, b, slot) * largest / 127 / 2;
}

bool AttendProblem::absorbed(int pair) const {
  return c_.group * c_.q_len <= kAbsorbRows && !c_.gathered &&
         (pair < 0 || rope_.inv_freq[pair] <= kAbsorbedFastest);
}

// Weights of pre-RoPE channels are rows of the basis, one for each channel of the key, but for slow pairs
// and channels that do not turn where these are absorbed into the query.
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
  Row key = rotated;  // less the mean, turned back
  reference::rotate(key, rope_, -(first_position(b) + slot_of(b, h, slot)));
  for (int d = 0; d < c_.head_dim; ++d) key[d] -= mean[d];
  double sum = 0, largest = 0;
  for (int i = 0; i < rope_.rotary_pairs; ++i) {  // RoPE turns a pair and keeps its length
    const double frequency = rope_.inv_freq[i];
    sum += length(query, i) * (absorbed(i) ? length(key, i) * absorbed_error(frequency) +
                                                 length(mean, i) * absorbed_mean_error(frequency)
                                           : length(errors, i));
  }
  for (int d = 2 * rope_.rotary_pairs; d < c_.head_dim && !absorbed(-1); ++d)
    sum += std::fabs(query[d]) * errors[d];
  if (!absorbed(-1)) return static_cast<double>(sm_scale_) * sum;
  // A page's weights of the three degrees are no larger than this, and are rounded to 8 bits; before
  // that they are sums over pairs of numbers rounded to 16 bits.
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
  const double halves = pairs * 1.5 / 65536 + 0x1p-13;
  sum += distances(pre_[h], b, slot) * largest * (1.0 / 127 / 2 + halves);
  return static_cast<double>(sm_scale_) * sum;
}

// Weights of post-RoPE channels are query . basis.
double AttendProblem::post_error(int b, int h, int slot, const Row& query) const {
  return static_cast<double>(sm_scale_) * row_error(post_[h], b, slot, [&](const Channel& channel) {
           double sum = 0;
           for (int d = 0; d < c_.head_dim; ++d) sum += query[d] * scaled_basis(b, channel, d);
           return sum;
         });
}

AttendProblem::Seen AttendProblem::packed(int b, int h, int slot, const Row& query) const {
  const int32_t id = table_[b * table_stride_ + slot / kPageTokens];
  const uint8_t* v_page = &v_pages_[id * layout_.v_page_bytes() + h * layout_.value().page_bytes()];
  const int at = slot % kPageTokens;
  const uint16_t* basis = &basis_[int64_t{b} * layout_.rank() * c_.head_dim];
  const float* scale = &scale_[b * layout_.rank()];
  // The parts of the key, rotated, and their lengths together.
  Row key(c_.head_dim);
  double magnitude = 0;
  Row pre(c_.head_dim);
  const auto add = [&](const std::vector<Channel>& channels, const std::vector<float>& means,
                       bool turn) {
    const float* mean = &means[(int64_t{b} * num_heads() + h) * c_.head_dim];
    Row part =
        reference::decode_key(channels, key_page(b, slot), at, basis, scale, mean, c_.head_dim);
    if (turn) {
      reference::rotate(part, rope_, first_position(b) + slot_of(b, h, slot));
    }
    double norm = 0;
    for (int d = 0; d < c_.head_dim; ++d) {
      key[d] += part[d];
      if (turn) pre[d] = part[d];
      norm += part[d] * part[d];
    }
    magnitude += std::sqrt(norm);
    // Codes are multiplied as they are and their middle is taken off afterwards, so twice their
    // range passes through.
    for (const Channel& channel : channels) {
      norm = 0;
      for (int d = 0; d < c_.head_dim; ++d) norm += std::pow(scaled_basis(b, channel, d), 2);
      magnitude += 2 * channel.mid() * std::sqrt(norm);
    }
  };
  double error = 0;
  if (has_pre()) {
    add(pre_[h], mean_, true);
    error += pre_error(b, h, slot, query, pre);
  }
  if (has_post()) {
    add(post_[h], c_.rope == RopeMode::kHybrid ? post_mean_ : mean_, false);
    error += post_error(b, h, slot, query);
  }

  const ValueLayout& value = layout_.value();
  Seen seen{0, error, Row(c_.head_dim), slot / kPageTokens, Row(c_.head_dim), Row(c_.head_dim)};
  double query_norm = 0;
  for (int d = 0; d < c_.head_dim; ++d) {
    seen.score += static_cast<double>(sm_scale_) * query[d] * key[d];
    query_norm += query[d] * query[d];
    seen.value[d] = reference::decode_value(value, v_page, d, at, c_.window_dtype);
    if (value.packed()) {
      seen.code[d] = get_code(v_page + value.code_offset(), value_code_address(value.bits, d, at),
                              value.bits) -
                     static_cast<double>(mid_code(value.bits));
      seen.scale[d] = reference::value_scale(value, v_page, d, at);
    }
  }
  seen.error += static_cast<double>(sm_scale_) * std::sqrt(query_norm) * magnitude *
                (20 * kFloatRounding + sum_rounding(c_.head_dim));
  const int64_t outlier = outlier_at(b, h, slot);
  if (outlier >= 0) score_exact(&outlier_keys_[outlier * size_of(c_.window_dtype)], query, seen);
  return seen;
}

// The score of an exact key, and what it may be off.
void AttendProblem::score_exact(const uint8_t* key, const Row& query, Seen& seen) const {
  seen.score = 0;
  double magnitude = 0;
  for (int d = 0; d < c_.head_dim; ++d) {
    const double product = static_cast<double>(sm_scale_) * query[d] *
                           read_number(key + d * size_of(c_.window_dtype), c_.window_dtype);
    seen.score += product;
    magnitude += std::fabs(product);
  }
  seen.error = magnitude * (4 * kFloatRounding + sum_rounding(c_.head_dim));
}

AttendProblem::Seen AttendProblem::exact(int b, int h, int e, const Row& query) const {
  Seen seen{0, 0, Row(c_.head_dim), -1, {}, {}};
  const int64_t size = size_of(c_.window_dtype), at = window_at(b, h, e) * size;
  score_exact(&window_keys_[at], query, seen);
  for (int d = 0; d < c_.head_dim; ++d)
    seen.value[d] = read_number(&window_values_[at + d * size], c_.window_dtype);
  return seen;
}

Attended AttendProblem::expected(int b, int query_head, int i) const {
  const int h = query_head / c_.group;
  Row query(c_.head_dim);
  for (int d = 0; d < c_.head_dim; ++d) {
    query[d] = read_number(&query_[(query_at(b, query_head, i) + d) * size_of(c_.dtype)], c_.dtype);
  }
  std::vector<Seen> seen;
  for (int s = c_.sink_tokens; s < cache_seqlens_[b]; ++s)
    if (slot_of(b, h, s) >= 0) seen.push_back(packed(b, h, s, query));
  const int visible = c_.causal ? window_lens_[b] - (c_.q_len - 1 - i) : window_lens_[b];
  for (int e = 0; e < visible; ++e) seen.push_back(exact(b, h, e, query));

  Attended result{Row(c_.head_dim), Row(c_.head_dim), -std::numeric_limits<double>::infinity(), 0};
  if (seen.empty()) return result;
  double most = seen[0].score, sum = 0, largest_error = 0;
  for (const Seen& token : seen) most = std::max(most, token.score);
  for (Seen& token : seen) {
    // 2^x has a relative error of 4e-7, and x itself is rounded.
    token.error += 4e-7 + 4 * kFloatRounding * (std::fabs(token.score) + std::fabs(most));
    largest_error = std::max(largest_error, token.error);
    sum += std::exp(token.score - most);
  }
  result.lse = most + std::log(sum);
  const double summing = sum_rounding(static_cast<int64_t>(seen.size())) + 8 * kFloatRounding;
  result.lse_tolerance = largest_error + summing + 4 * kFloatRounding * std::fabs(result.lse);

  for (int d = 0; d < c_.head_dim; ++d) {
    double& out = result.out[d];
    for (const Seen& token : seen) out += std::exp(token.score - result.lse) * token.value[d];
    // A probability whose score is off by e is off by the factor exp(e), and so, in the other
    // direction, is their sum.
    double softmax = 0, largest = 0;
    for (const Seen& token : seen) {
      softmax += std::exp(token.score - result.lse) * std::expm1(token.error) *
                 std::fabs(token.value[d] - out);
      const double packed = token.page < 0 ? 0 : std::fabs(token.code[d] * token.scale[d]);
      largest = std::max(largest, std::fabs(token.value[d]) + 2 * packed);
    }
    result.out_tolerance[d] = softmax * std::exp(largest_error) + summing * largest +
                              product_error(seen, result.lse, d) +
                              rounding(c_.dtype) * std::fabs(out) + 0x1p-25;
  }
  return result;
}

// Probability times scale is cut to a 255th of the largest of its page, after a number that is spread
// evenly over a step is added, and multiplies a code less the middle one: a variance of at most a
// quarter of a step squared, of which six deviations are allowed.
double AttendProblem::product_error(const std::vector<Seen>& seen, double lse, int d) {
  double sum = 0;
  for (size_t first = 0, last; first < seen.size() && seen[first].page >= 0; first = last) {
    double probability = 0, scale = 0, codes = 0;
    for (last = first; last < seen.size() && seen[last].page == seen[first].page; ++last) {
      probability = std::max(probability, std::exp(seen[last].score - lse));
      scale = std::max(scale, seen[last].scale[d]);
      codes += seen[last].code[d] * seen[last].code[d];
    }
    sum += 6 * probability * scale / 255 / 2 * std::sqrt(codes);
  }
  return sum;
}

}  // namespace svdq::testing
