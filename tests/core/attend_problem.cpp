#include "tests/core/attend_problem.h"

namespace svdq::testing {

using reference::Channel;
using reference::Row;

AttendProblem::AttendProblem(const AttendCase& c, uint64_t stream)
    : c_(c),
      layout_(layout_ints(c.rope, c.head_dim, c.bands, c.v_bits, c.pre_bands)),
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
      // Folded queries are query . basis: one channel alone keeps their magnitudes equal.
      double x = random.normal();
      if (c.exact_folding && has_post()) x = d == one_hot ? 4.0 : 0.0;
      write_number(&query_[(r * c.head_dim + d) * size_of(c.dtype)], c.dtype, x);
    }
  }

  // Rows past the window and the gaps between heads are NaN: no backend may read them.
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
  if (c_.sinks) {
    for (int i = 0; i < num_qo_heads(); ++i)
      sinks_.push_back(static_cast<float>(2 + random.normal()));
  }
  for (int b = 0; b < batch(); ++b)
    query_positions_.push_back(static_cast<int32_t>(first_position(b) + query_slot(b, 0)));
}

int64_t AttendProblem::query_slot(int b, int i) const {
  int64_t packed = std::max(cache_seqlens_[b], c_.sink_tokens);
  if (c_.gathered) {  // after all that the tokens come from
    for (int h = 0; h < num_heads(); ++h) {
      for (int t = 0; t < cache_seqlens_[b]; ++t) packed = std::max(packed, slot_of(b, h, t) + 1);
    }
  }
  return packed - c_.sink_tokens + window_lens_[b] - (c_.causal ? c_.q_len : 0) + i;
}

int64_t AttendProblem::window_slot(int b, int e) const {
  if (e < c_.sink_tokens) return e;
  return query_slot(b, 0) + (c_.causal ? c_.q_len : 0) - window_lens_[b] + e;
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
    x = float_to_bfloat16(static_cast<float>((c_.exact_folding ? sign : random.normal()) / 8.0));
  }
  for (int b = 0; b < batch(); ++b) {
    for (const auto* part : {&pre_, &post_}) {
      for (const auto& channels : *part) {
        for (const Channel& channel : channels) {
          // Codes are uniform over their range: scales give each width about the same variance.
          const double scale = (2 + 0.4 * random.integer(0, 10)) / (1 << channel.width);
          scale_[b * layout_.rank() + channel.row] =
              static_cast<float>(c_.exact_folding ? 0.25 : scale);
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
  p.keys.sink_tokens = skipped();
  p.window.sink_rows = c_.sink_tokens;
  p.rules.softcap = c_.softcap;
  p.rules.sinks = c_.sinks ? sinks_.data() : nullptr;
  p.rules.window_size = c_.window_size;
  p.rules.query_position = query_positions_.data();
  p.queries.sm_scale = sm_scale_;
  p.causal = c_.causal;
  p.out = out_.data();
  p.lse = lse_.data();
  backend.attend(p, executor);
}

AttendProblem::Seen AttendProblem::packed(int b, int h, int slot, const Row& query) const {
  const int32_t id = table_[b * table_stride_ + slot / kPageTokens];
  const HeadPlan& head = layout_.view().heads[h];
  const uint8_t* v_page = &v_pages_[id * layout_.v_page_bytes() + head.v_offset];
  const int at = slot % kPageTokens;
  const uint16_t* basis = &basis_[int64_t{b} * layout_.rank() * c_.head_dim];
  const float* scale = &scale_[b * layout_.rank()];
  // The parts of the key, rotated, and their lengths together.
  Row key(c_.head_dim);
  double magnitude = 0;
  Row pre(c_.head_dim);
  const auto add = [&](const std::vector<Channel>& channels, const std::vector<float>& means,
                       bool rotated) {
    const float* mean = &means[(int64_t{b} * num_heads() + h) * c_.head_dim];
    Row part =
        reference::decode_key(channels, key_page(b, slot), at, basis, scale, mean, c_.head_dim);
    if (rotated) {
      reference::rotate(part, rope_, first_position(b) + slot_of(b, h, slot));
    }
    double norm = 0;
    for (int d = 0; d < c_.head_dim; ++d) {
      key[d] += part[d];
      if (rotated) pre[d] = part[d];
      norm += part[d] * part[d];
    }
    magnitude += std::sqrt(norm);
    // Codes are multiplied first and the mid codes' share is subtracted afterwards: twice their range is summed.
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

  Seen seen{0, error, Row(c_.head_dim), slot / kPageTokens, Row(c_.head_dim), 0, 0};
  if (head.value.packed()) {
    seen.code = reference::unrotate_value(reference::value_codes(head.value, v_page, at));
    seen.scale = reference::value_scale(v_page, at);
    for (int d = 0; d < c_.head_dim; ++d) seen.value[d] = seen.code[d] * seen.scale;
    // Codes are summed as they are and the mid code's part is subtracted afterwards.
    seen.range = 3 * static_cast<double>(mid_code(head.value.bits)) * seen.scale;
  } else {
    seen.value = reference::exact_value(head.value, v_page, at, c_.window_dtype);
  }
  double query_norm = 0;
  for (int d = 0; d < c_.head_dim; ++d) {
    seen.score += static_cast<double>(sm_scale_) * query[d] * key[d];
    query_norm += query[d] * query[d];
  }
  seen.error += static_cast<double>(sm_scale_) * std::sqrt(query_norm) * magnitude *
                (20 * kFloatRounding + sum_rounding(c_.head_dim));
  const int64_t outlier = outlier_at(b, h, slot);
  if (outlier >= 0)
    score_uncompressed(&outlier_keys_[outlier * size_of(c_.window_dtype)], query, seen);
  return seen;
}

// The score of an uncompressed key, and its error.
void AttendProblem::score_uncompressed(const uint8_t* key, const Row& query, Seen& seen) const {
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

AttendProblem::Seen AttendProblem::window_token(int b, int h, int e, const Row& query) const {
  Seen seen{0, 0, Row(c_.head_dim), -1, {}, 0, 0};
  const int64_t size = size_of(c_.window_dtype), at = window_at(b, h, e) * size;
  score_uncompressed(&window_keys_[at], query, seen);
  for (int d = 0; d < c_.head_dim; ++d)
    seen.value[d] = read_number(&window_values_[at + d * size], c_.window_dtype);
  return seen;
}

void AttendProblem::cap(Seen& seen) const {
  if (c_.softcap == 0) return;
  const double softcap = static_cast<double>(c_.softcap), share = std::tanh(seen.score / softcap);
  // The slope is 1 at most, and an error changes it by less than this. tanh is off by 1e-6, its argument rounded.
  seen.error *= std::min(1 - share * share + 0.8 * seen.error / softcap, 1.0);
  seen.error += 2e-6 * softcap * std::fabs(share);
  seen.score = softcap * share;
}

Attended AttendProblem::expected(int b, int query_head, int i) const {
  const int h = query_head / c_.group;
  Row query(c_.head_dim);
  for (int d = 0; d < c_.head_dim; ++d) {
    query[d] = read_number(&query_[(query_at(b, query_head, i) + d) * size_of(c_.dtype)], c_.dtype);
  }
  std::vector<Seen> seen;
  for (int s = skipped(); s < cache_seqlens_[b]; ++s) {
    const int64_t slot = slot_of(b, h, s);
    if (slot >= 0 && in_window(b, i, slot)) seen.push_back(packed(b, h, s, query));
  }
  const int visible = c_.causal ? window_lens_[b] - (c_.q_len - 1 - i) : window_lens_[b];
  for (int e = 0; e < visible; ++e)
    if (in_window(b, i, window_slot(b, e))) seen.push_back(window_token(b, h, e, query));
  for (Seen& token : seen) cap(token);
  if (c_.sinks) {  // one more token, without a value
    const double sink = static_cast<double>(sinks_[query_head]);
    seen.push_back({sink, 0, Row(c_.head_dim), -1, {}, 0, 0});
  }

  Attended result{Row(c_.head_dim), Row(c_.head_dim), -std::numeric_limits<double>::infinity(), 0};
  if (seen.empty()) return result;
  double max_score = seen[0].score, sum = 0, largest_error = 0;
  for (const Seen& token : seen) max_score = std::max(max_score, token.score);
  for (Seen& token : seen) {
    // 2^x has a relative error of 4e-7, and x itself is rounded.
    token.error += 4e-7 + 4 * kFloatRounding * (std::fabs(token.score) + std::fabs(max_score));
    largest_error = std::max(largest_error, token.error);
    sum += std::exp(token.score - max_score);
  }
  result.lse = max_score + std::log(sum);
  // Rotating back is a sum of head_dim numbers; it leaves what rounding does to them as long as it was.
  const double summing = sum_rounding(static_cast<int64_t>(seen.size())) +
                         sum_rounding(c_.head_dim) + 8 * kFloatRounding;
  result.lse_tolerance = largest_error + summing + 4 * kFloatRounding * std::fabs(result.lse);

  for (int d = 0; d < c_.head_dim; ++d) {
    double& out = result.out[d];
    for (const Seen& token : seen) out += std::exp(token.score - result.lse) * token.value[d];
    // An error e of a score changes a probability by the factor exp(e) at max_score, and their sum in the other direction.
    double softmax = 0, largest = 0;
    for (const Seen& token : seen) {
      softmax += std::exp(token.score - result.lse) * std::expm1(token.error) *
                 std::fabs(token.value[d] - out);
      largest = std::max({largest, std::fabs(token.value[d]), token.range});
    }
    result.out_tolerance[d] = softmax * std::exp(largest_error) + summing * largest +
                              product_error(seen, result.lse, d) +
                              rounding(c_.dtype) * std::fabs(out) + 0x1p-25;
  }
  return result;
}

}  // namespace svdq::testing
