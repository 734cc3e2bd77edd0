#include "tests/core/select_problem.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/machine/math.h"

namespace svdq::testing {

using reference::Channel;
using reference::Row;

std::vector<SelectCase> in_every_mode(SelectCase c) {
  std::vector<SelectCase> all;
  for (RopeMode mode : {RopeMode::kPre, RopeMode::kPost, RopeMode::kHybrid}) {
    c.rope = mode;
    all.push_back(c);
  }
  const Bands pre_bands[] = {{{4, 0, 0, 0}}, {{0, 0, 4, 0}}, {{0, 0, 0, 0}}};
  for (size_t h = 0; h < c.bands.size(); ++h) c.pre_bands.push_back(pre_bands[h % 3]);
  all.push_back(c);
  return all;
}

const char* mode_of(const SelectCase& c) {
  return c.rope == RopeMode::kPre    ? "pre"
         : c.rope == RopeMode::kPost ? "post"
         : c.pre_bands.empty()       ? "rotated mean"
                                     : "hybrid";
}

SelectProblem::SelectProblem(const SelectCase& c, uint64_t stream)
    : c_(c),
      layout_(layout_ints(c.rope, c.head_dim, c.bands, 4, c.pre_bands)),
      frequencies_(inverse_frequencies(c.rope == RopeMode::kPost ? 0 : c.rotary_pairs)),
      rope_{frequencies_.data(), static_cast<int>(frequencies_.size())},
      cache_seqlens_(c.cache_seqlens.begin(), c.cache_seqlens.end()),
      first_positions_(c.first_positions.begin(), c.first_positions.end()),
      sm_scale_(static_cast<float>(1 / std::sqrt(c.head_dim))) {
  Random random(stream);
  const int dim = c.head_dim;
  query_.resize(int64_t{batch()} * num_heads() * c.group * c.q_len * dim * size_of(c.dtype));
  for (size_t i = 0; i < query_.size(); i += size_of(c.dtype))
    write_number(&query_[i], c.dtype, random.normal());
  basis_.resize(int64_t{batch()} * layout_.rank() * dim);
  for (uint16_t& x : basis_) x = float_to_bfloat16(static_cast<float>(random.normal() / 8));
  scale_.resize(int64_t{batch()} * layout_.rank());
  for (int b = 0; b < batch(); ++b) {
    for (int h = 0; h < num_heads(); ++h) {
      // Scales for which scores differ by several units, about the same for each width.
      for (const Channel& channel : reference::channels_of(layout_.view().heads[h])) {
        scale_[b * layout_.rank() + channel.row] =
            static_cast<float>((1 + 0.2 * random.integer(0, 10)) * 8 / (1 << channel.width));
      }
    }
  }
  mean_.resize(int64_t{batch()} * num_heads() * dim);
  for (float& x : mean_) x = static_cast<float>(random.normal());
  if (c.rope == RopeMode::kHybrid) post_mean_.resize(mean_.size());
  for (float& x : post_mean_) x = static_cast<float>(random.normal());
  make_pages(random);
  if (c.outliers) make_outliers(random);
}

void SelectProblem::make_pages(Random& random) {
  // Pages lie scattered in a pool; entries after a sequence's last page are invalid.
  table_stride_ = *std::max_element(cache_seqlens_.begin(), cache_seqlens_.end()) / kPageTokens + 3;
  table_.assign(batch() * table_stride_, kNoSlot);
  int32_t pages = 0;
  for (int b = 0; b < batch(); ++b) {
    for (int64_t n = 0; n * kPageTokens < cache_seqlens_[b]; ++n)
      table_[b * table_stride_ + n] = pages++;
  }
  for (int32_t& page : table_) {
    if (page < pages) page = 2 * (pages - 1 - page) + 1;
  }
  k_pages_.assign((2 * pages + 1) * layout_.k_page_bytes(), 0xff);
  if (!c_.same_codes) random.fill(k_pages_);
}

// Lists differ in length and contain slots past the end too; sinks are no outliers.
void SelectProblem::make_outliers(Random& random) {
  outlier_room_ = c_.outliers + 2;
  outlier_slots_.assign(int64_t{batch()} * num_heads() * outlier_room_, kNoSlot);
  for (int64_t list = 0; list < int64_t{batch()} * num_heads(); ++list) {
    const int reach = std::max(0, cache_seqlens_[list / num_heads()] + 5 - c_.sink_tokens);
    std::vector<int32_t> slots(reach);
    std::iota(slots.begin(), slots.end(), c_.sink_tokens);
    for (int i = 0; i < reach; ++i) std::swap(slots[i], slots[random.integer(i, reach - 1)]);
    slots.resize(std::min<int64_t>(reach, c_.outliers - list % 2));
    std::sort(slots.begin(), slots.end());
    std::copy(slots.begin(), slots.end(), outlier_slots_.begin() + list * outlier_room_);
  }
}

SelectParams SelectProblem::params() {
  slots_.assign(int64_t{batch()} * num_heads() * room(), -7);
  indices_.assign(outlier_slots_.size(), -7);
  SelectParams p{};
  p.keys.layout = layout_.view();
  p.keys.codec.rope = rope_;
  p.keys.batch = batch();
  p.queries.num_heads = num_heads() * c_.group;
  p.queries.length = c_.q_len;
  p.queries.data = query_.data();
  p.queries.dtype = c_.dtype;
  p.keys.pages = k_pages_.data();
  p.keys.num_pages =
      static_cast<int64_t>(k_pages_.size()) / std::max<int64_t>(1, layout_.k_page_bytes());
  p.keys.page_table = table_.data();
  p.keys.table_stride = table_stride_;
  p.keys.cache_seqlens = cache_seqlens_.data();
  p.keys.codec.basis = basis_.data();
  p.keys.codec.scale = scale_.data();
  p.keys.codec.mean = mean_.data();
  p.keys.codec.post_mean = post_mean_.empty() ? nullptr : post_mean_.data();
  p.keys.first_position = first_positions_.empty() ? nullptr : first_positions_.data();
  p.keys.outlier_slots = outlier_room_ ? outlier_slots_.data() : nullptr;
  p.keys.num_outliers = outlier_room_;
  p.keys.sink_tokens = c_.sink_tokens;
  p.queries.sm_scale = sm_scale_;
  p.channels = c_.channels;
  p.budget = c_.budget;
  p.slots = slots_.data();
  p.outlier_indices = outlier_room_ ? indices_.data() : nullptr;
  return p;
}

void SelectProblem::run(const Backend& backend, const Executor& executor) {
  backend.select(params(), executor);
}

void SelectProblem::set_answer(std::vector<int32_t> slots, std::vector<int32_t> indices) {
  slots_ = std::move(slots);
  indices_ = std::move(indices);
}

std::vector<Channel> SelectProblem::proxy_channels(int h) const {
  std::vector<Channel> channels = reference::channels_of(layout_.view().heads[h]);
  channels.resize(std::min<size_t>(channels.size(), c_.channels));
  return channels;
}

std::vector<SelectProblem::Score> SelectProblem::scores(int b, int h, int64_t r) const {
  const int dim = c_.head_dim, rotary_pairs = rope_.rotary_pairs;
  const std::vector<Channel> channels = proxy_channels(h);
  const int64_t head = int64_t{b} * num_heads() + h;
  Row query(dim);
  for (int d = 0; d < dim; ++d) {
    const int64_t at = (head * c_.group * c_.q_len + r) * dim + d;
    query[d] = read_number(&query_[at * size_of(c_.dtype)], c_.dtype) * double{sm_scale_};
  }
  const auto vector = [&](int j) {
    Row x(dim);
    for (int d = 0; d < dim; ++d) {
      const int64_t row = int64_t{b} * layout_.rank() + channels[j].row;
      x[d] = double{bfloat16_to_float(basis_[row * dim + d])} * double{scale_[row]};
    }
    return x;
  };
  // A product with the query and its error. If `pre`, the query is unrotated by `position` and fast pairs are left out.
  // Coefficients of pairs, cosines and sines have rotary_pairs precision, sums are floats.
  const auto product = [&](const Row& x, bool pre, double position) {
    Score result{0, 0};
    Row unrotated = query;
    if (pre) reference::rotate(unrotated, rope_, -position);
    double magnitude = 0;
    for (int i = 0; pre && i < rotary_pairs; ++i) {
      if (double{rope_.inv_freq[i]} > double{kSelectFastest}) {
        unrotated[i] = unrotated[i + rotary_pairs] = 0;
      } else {
        result.error += std::hypot(query[i], query[i + rotary_pairs]) *
                        std::hypot(x[i], x[i + rotary_pairs]) * 2 * 1.01 * 0x1p-10;
      }
    }
    for (int d = 0; d < dim; ++d) {
      result.value += unrotated[d] * x[d];
      magnitude += std::fabs(query[d] * x[d]);
    }
    result.error += magnitude * (20 * kFloatRounding + sum_rounding(dim));
    return result;
  };

  std::vector<Score> all;
  std::vector<Score> operand(channels.size());
  Score constant{0, 0};
  double largest_of[2][9] = {};  // largest operand of a band, by part and width
  const auto part = [&](size_t j) { return static_cast<int>(j) < pre_rank(h) ? 0 : 1; };
  for (int slot = 0; slot < cache_seqlens_[b]; ++slot) {
    if (slot % kPageTokens == 0) {
      const double middle = (first_positions_.empty() ? 0 : first_positions_[b]) + slot + 32.0;
      const bool pre_mean = c_.rope != RopeMode::kPost;
      std::fill_n(&largest_of[0][0], 18, 0.0);
      for (size_t j = 0; j < channels.size(); ++j) {
        operand[j] = product(vector(static_cast<int>(j)), part(j) == 0, middle);
        double& largest = largest_of[part(j)][channels[j].width];
        largest = std::max(largest, std::fabs(operand[j].value) + operand[j].error);
      }
      const Row mean(&mean_[head * dim], &mean_[head * dim] + dim);
      constant = product(mean, pre_mean, middle);
      if (!post_mean_.empty()) {
        const Row post(&post_mean_[head * dim], &post_mean_[head * dim] + dim);
        const Score more = product(post, false, 0);
        constant = {constant.value + more.value, constant.error + more.error};
      }
    }
    Score score = constant;
    double magnitude = std::fabs(constant.value);
    for (size_t j = 0; j < channels.size(); ++j) {
      const Channel& c = channels[j];
      const double distance = code(b, c, slot) - c.mid();
      score.value += distance * operand[j].value;
      // Operands have 8 bits, with a scale a band.
      score.error +=
          std::fabs(distance) * (operand[j].error + 1.01 * largest_of[part(j)][c.width] / 127 / 2);
      magnitude += 2 * c.mid() * std::fabs(operand[j].value);
    }
    score.error += magnitude * (20 * kFloatRounding + sum_rounding(dim));
    all.push_back(score);
  }
  return all;
}

std::vector<SelectProblem::Mass> SelectProblem::masses(int b, int h) const {
  const int length = cache_seqlens_[b];
  const int64_t pages = ceil_div(length, kPageTokens), stride = select_sample_stride(pages);
  std::vector<double> sum(length), error(length);
  const int64_t rows = int64_t{c_.group} * c_.q_len;
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<Score> row = scores(b, h, r);
    double max_score = -std::numeric_limits<double>::infinity(), total = 0, norm = 0, max_error = 0;
    const auto sampled = [&](int slot) {
      return slot >= c_.sink_tokens && slot / kPageTokens % stride == stride / 2;
    };
    for (int slot = 0; slot < length; ++slot)
      if (sampled(slot)) max_score = std::max(max_score, row[slot].value);
    for (int slot = 0; slot < length; ++slot) {
      if (!sampled(slot)) continue;
      total += std::exp(row[slot].value - max_score);
      max_error = std::max(max_error, row[slot].error);
    }
    if (total > 0) norm = max_score + std::log(total);
    for (int slot = 0; slot < length; ++slot) {
      sum[slot] += std::exp(row[slot].value - norm);
      const double rounding = 8 * kFloatRounding * (std::fabs(row[slot].value) + std::fabs(norm));
      error[slot] = std::max(error[slot], row[slot].error + max_error + rounding);
    }
  }
  std::vector<Mass> all;
  for (int slot = 0; slot < length; ++slot) {
    // 2^x has an error of 2^-21, and so have its sums.
    const double exponential = 8 * 0x1p-21 + static_cast<double>(length + rows) * kFloatRounding;
    all.push_back({std::log(sum[slot]), error[slot] + exponential});
  }
  return all;
}

::testing::AssertionResult SelectProblem::check(int b, int h) const {
  const auto wrong = [&](const std::string& what) {
    return ::testing::AssertionFailure() << "sequence " << b << " head " << h << ": " << what;
  };
  const int length = cache_seqlens_[b];
  const int64_t head = int64_t{b} * num_heads() + h;
  const std::vector<Mass> mass = masses(b, h);
  std::vector<bool> outlier(length), chosen(length);
  int kept = 0, candidates = 0;
  for (int i = 0; i < outlier_room_; ++i) {
    const int slot = outlier_slots_[head * outlier_room_ + i];
    if (slot < length) outlier[slot] = true, ++kept;
  }
  for (int slot = c_.sink_tokens; slot < length; ++slot) candidates += !outlier[slot];

  const int32_t* slots = &slots_[head * room()];
  const int count = std::min(candidates, c_.budget) + kept;
  for (int i = 0; i < room(); ++i) {
    if (i >= count && slots[i] != kNoSlot)
      return wrong(join("slot ", slots[i], " at index ", i, " behind the last of ", count));
    if (i >= count) continue;
    if (slots[i] < 0 || slots[i] >= length || (i > 0 && slots[i] <= slots[i - 1]))
      return wrong(join("slot ", slots[i], " at index ", i, " of ", count));
    if (slots[i] < c_.sink_tokens) return wrong(join("sink ", slots[i], " is selected"));
    chosen[slots[i]] = true;
  }
  for (int i = 0; i < outlier_room_; ++i) {
    const int slot = outlier_slots_[head * outlier_room_ + i];
    const int index = indices_[head * outlier_room_ + i];
    if (slot >= length ? index != kNoSlot : index < 0 || index >= count || slots[index] != slot)
      return wrong(join("outlier ", slot, " has index ", index));
  }

  // Compare the largest mass that is not selected with the smallest that is, beyond their errors.
  const std::vector<Channel> channels = proxy_channels(h);
  const auto same = [&](int s, int t) {
    return s / kPageTokens == t / kPageTokens &&
           std::all_of(channels.begin(), channels.end(),
                       [&](const Channel& c) { return code(b, c, s) == code(b, c, t); });
  };
  int min_chosen = -1, max_left = -1;
  for (int slot = c_.sink_tokens; slot < length; ++slot) {
    if (outlier[slot]) continue;
    const auto high = [&](int s) { return mass[s].value + mass[s].error; };
    const auto low = [&](int s) { return mass[s].value - mass[s].error; };
    if (chosen[slot] && (min_chosen < 0 || high(slot) < high(min_chosen))) min_chosen = slot;
    if (!chosen[slot] && (max_left < 0 || low(slot) > low(max_left))) max_left = slot;
    for (int s = slot - slot % kPageTokens; s < slot; ++s) {
      if (s < c_.sink_tokens || outlier[s] || chosen[s] || !chosen[slot] || !same(s, slot))
        continue;
      return wrong(join("slot ", slot, " is selected and the equal ", s, " is not"));
    }
  }
  if (min_chosen >= 0 && max_left >= 0 &&
      mass[min_chosen].value + mass[min_chosen].error <
          mass[max_left].value - mass[max_left].error) {
    return wrong(join("slot ", min_chosen, " of log mass ", mass[min_chosen].value, " +- ",
                      mass[min_chosen].error, " is selected, slot ", max_left, " of ",
                      mass[max_left].value, " +- ", mass[max_left].error, " is not"));
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult SelectProblem::check() const {
  for (int b = 0; b < batch(); ++b) {
    for (int h = 0; h < num_heads(); ++h) {
      const ::testing::AssertionResult result = check(b, h);
      if (!result) return result;
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace svdq::testing
