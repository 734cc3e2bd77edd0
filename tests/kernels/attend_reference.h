// The attend stage in plain loops and double, with the tolerance due to each number of the kernels'
// answer.
#pragma once

#include "tests/kernels/device_test.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/attend/plan.cuh"
#include "tests/core/reference.h"

namespace svdq::testing {

// One key that a query sees: score, what that may be off, its value, and of packed values the scale and the largest
// number that a rotated one is computed from.
struct SeenKey {
  double score, error;
  reference::Row value;
  double scale, largest;
};

struct Expected {
  reference::Row out, tolerance;
  double lse, lse_tolerance;
};

class AttendReference {
 public:
  explicit AttendReference(const AttendParams& p) : p_(p) {}

  // Row r of KV head h of sequence b.
  Expected row(int b, int h, int64_t r) const {
    const int dim = p_.keys.layout.head_dim;
    const int64_t at = (int64_t{b} * p_.keys.layout.num_heads + h) * device::query_rows(p_) + r;
    reference::Row query(dim);
    for (int d = 0; d < dim; ++d)
      query[d] = number(p_.queries.data, p_.queries.dtype, at * dim + d);
    std::vector<SeenKey> seen;
    const int64_t i = r % p_.queries.length, least = oldest_slot(b, i);
    for (int slot = p_.keys.sink_tokens; slot < p_.keys.cache_seqlens[b]; ++slot) {
      const int from = slot_of(b, h, slot);
      if (from != kNoSlot && from >= least) seen.push_back(packed(b, h, slot, query));
    }
    const int64_t hidden = p_.causal ? p_.queries.length - 1 - i : 0;
    for (int64_t e = 0; e < p_.window.lens[b] - hidden; ++e)
      if (window_slot(b, e) >= least) seen.push_back(exact(b, h, e, query));
    for (SeenKey& key : seen) cap(key);
    if (p_.rules.sinks) {  // one more key, without a value
      const int64_t group = p_.queries.num_heads / p_.keys.layout.num_heads;
      const float sink = p_.rules.sinks[h * group + r / p_.queries.length];
      seen.push_back({double{sink}, 0, reference::Row(dim), 0, 0});
    }
    return combine(seen);
  }

 private:
  static double number(const void* data, DataType dtype, int64_t index) {
    return read_number(static_cast<const uint8_t*>(data) + index * size_of(dtype), dtype);
  }

  int64_t first_position(int b) const {
    return p_.keys.first_position ? p_.keys.first_position[b] : 0;
  }

  // First slot in the sliding window of query i.
  int64_t oldest_slot(int b, int64_t i) const {
    if (p_.rules.window_size == 0) return std::numeric_limits<int64_t>::min();
    return p_.rules.query_position[b] + i - p_.rules.window_size + 1 - first_position(b);
  }

  // Slot of the window's token e: sinks, then those that end with the queries or just before them.
  int64_t window_slot(int b, int64_t e) const {
    if (e < p_.window.sink_rows) return e;
    const int64_t end = p_.rules.query_position[b] + (p_.causal ? p_.queries.length : 0);
    return end - first_position(b) - p_.window.lens[b] + e;
  }

  void cap(SeenKey& seen) const {
    if (p_.rules.softcap == 0.0f) return;
    const double softcap = double{p_.rules.softcap}, share = std::tanh(seen.score / softcap);
    // The slope is 1 at most, and an error changes it by less than this; tanh is off by 1e-6.
    seen.error *= std::min(1 - share * share + 0.8 * seen.error / softcap, 1.0);
    seen.error += 2e-6 * softcap * std::fabs(share);
    seen.score = softcap * share;
  }

  // Slot of token `token` of the pages, which says its position.
  int slot_of(int b, int h, int token) const {
    if (!p_.token_slots) return token;
    const int64_t list = int64_t{b} * p_.keys.layout.num_heads + h;
    return p_.token_slots[list * p_.keys.table_stride * kPageTokens + token];
  }

  SeenKey packed(int b, int h, int slot, const reference::Row& query) const {
    const LayoutView& layout = p_.keys.layout;
    const int dim = layout.head_dim, at = slot % kPageTokens;
    const int64_t id = p_.keys.page_table[b * p_.keys.table_stride + slot / kPageTokens];
    const uint8_t* keys = p_.keys.pages + id * layout.k_page_bytes;
    const HeadPlan& head = layout.heads[h];
    SeenKey seen{0, 0, reference::Row(dim), 0, 0};
    fill_values(seen, head.value, p_.v_pages + id * layout.v_page_bytes + head.v_offset, at);
    if (const int64_t outlier = outlier_at(b, h, slot); outlier >= 0) {
      score_exact(p_.keys.outlier_keys, p_.keys.outlier_dtype, outlier * dim, query, seen);
      return seen;
    }
    if (layout.rope != RopeMode::kPre) add_folded(b, h, at, query, keys, seen);
    if (layout.rope != RopeMode::kPost) add_reconstructed(b, h, slot, query, keys, seen);
    seen.score *= double{p_.queries.sm_scale};
    seen.error *= double{p_.queries.sm_scale};
    return seen;
  }

  // The tail of a key: codes times folded queries.
  void add_folded(int b, int h, int at, const reference::Row& query, const uint8_t* keys,
                  SeenKey& seen) const {
    const LayoutView& layout = p_.keys.layout;
    const int dim = layout.head_dim;
    const uint16_t* basis = p_.keys.codec.basis + int64_t{b} * layout.rank * dim;
    const float* mean =
        (layout.rope == RopeMode::kHybrid ? p_.keys.codec.post_mean : p_.keys.codec.mean) +
        (int64_t{b} * layout.num_heads + h) * dim;
    double magnitude = 0;
    for (int d = 0; d < dim; ++d) {
      seen.score += query[d] * double{mean[d]};
      magnitude += std::fabs(query[d] * double{mean[d]});
    }
    double largest = 0, distance = 0;
    for (const reference::Channel& c : reference::part_channels(layout, h, RopeMode::kPost)) {
      double w = 0, terms = 0;
      for (int d = 0; d < dim; ++d) {
        const double x = query[d] * double{bfloat16_to_float(basis[int64_t{c.row} * dim + d])};
        w += x;
        terms += std::fabs(x);
      }
      const double scale = double{p_.keys.codec.scale[b * layout.rank + c.row]};
      const double code = get_code(keys, c.address(at), c.width);
      seen.score += (code - c.mid()) * w * scale;
      // A weight is a half: off by 2^-11 of itself. Codes pass whole, and their middle is taken off
      // afterwards.
      seen.error += std::fabs(code - c.mid()) * std::fabs(w) * scale * 0x1p-11;
      magnitude += 2 * c.mid() * scale * terms;
      largest = std::max(largest, std::fabs(w) * scale);
      distance += std::fabs(code - c.mid());
    }
    // Weights below 2^-14 in units of largest / 256 are off by 2^-25 such units.
    seen.error += distance * largest * 0x1p-33;
    // Sums of floats: tensor cores may cut each addend to 2^-23 of the sum. Hybrid keys' core is
    // summed on top.
    seen.error += magnitude * (dim * 2 * kFloatRounding + sum_rounding(dim));
    if (layout.rope == RopeMode::kHybrid) seen.error += magnitude * dim * 2 * kFloatRounding;
  }

  void fill_values(SeenKey& seen, const ValueLayout& value, const uint8_t* page, int at) const {
    if (!value.packed()) {
      seen.value = reference::exact_value(value, page, at, p_.v_dtype);
      return;
    }
    const double scale = reference::value_scale(page, at), mid = mid_code(value.bits);
    reference::Row codes = reference::value_codes(value, page, at);
    for (double& code : codes) {
      code *= scale;
      seen.largest = std::max(seen.largest, std::fabs(code) + 2 * mid * scale);
    }
    seen.value = reference::unrotate_value(codes);
    seen.scale = scale;
  }

  // The core of a key. Its columns are sums of codes times halves; rotated, they become halves, as
  // do the queries. An error of a pair of columns keeps its length when it is rotated.
  void add_reconstructed(int b, int h, int slot, const reference::Row& query, const uint8_t* keys,
                         SeenKey& seen) const {
    const LayoutView& layout = p_.keys.layout;
    const int dim = layout.head_dim, half = p_.keys.codec.rope.rotary_pairs;
    const uint16_t* basis = p_.keys.codec.basis + int64_t{b} * layout.rank * dim;
    const float* mean = p_.keys.codec.mean + (int64_t{b} * layout.num_heads + h) * dim;
    const auto channels = reference::part_channels(layout, h, RopeMode::kPre);
    const float* scale = p_.keys.codec.scale + int64_t{b} * layout.rank;
    reference::Row key =
        reference::decode_key(channels, keys, slot % kPageTokens, basis, scale, mean, dim);
    reference::Row off(dim);
    for (int d = 0; d < dim; ++d) {
      double magnitude = std::fabs(double{mean[d]}), largest = 0, distance = 0;
      for (const reference::Channel& c : channels) {
        const double w = std::fabs(double{bfloat16_to_float(basis[int64_t{c.row} * dim + d])} *
                                   double{scale[c.row]});
        const double code = get_code(keys, c.address(slot % kPageTokens), c.width);
        off[d] += std::fabs(code - c.mid()) * w * 0x1p-11;
        distance += std::fabs(code - c.mid());
        largest = std::max(largest, w);
        magnitude += 2 * c.mid() * w;
      }
      off[d] +=
          distance * largest * 0x1p-33 + magnitude * (dim * 2 * kFloatRounding + sum_rounding(dim));
    }
    const double position = (p_.keys.first_position ? p_.keys.first_position[b] : 0) +
                            static_cast<double>(slot_of(b, h, slot));
    reference::rotate(key, p_.keys.codec.rope, position);
    for (int d = 0; d < dim; ++d) seen.score += query[d] * key[d];
    const auto add = [&](double q, double k, double error) {
      // Key and rotated query are rounded to halves (2^-25 below their normal range), and products
      // summed. Cosine and sine are off by less than 2^-20 where tokens have slots of their own.
      seen.error += q * error +
                    q * k * (2 * 0x1p-11 + 32 * kFloatRounding + dim * 2 * kFloatRounding) +
                    0x1p-25 * (q + k);
    };
    for (int i = 0; i < half; ++i) {
      add(std::hypot(query[i], query[i + half]), std::hypot(key[i], key[i + half]),
          std::hypot(off[i], off[i + half]));
    }
    for (int d = 2 * half; d < dim; ++d) add(std::fabs(query[d]), std::fabs(key[d]), off[d]);
  }

  SeenKey exact(int b, int h, int64_t e, const reference::Row& query) const {
    const int dim = p_.keys.layout.head_dim;
    const int64_t at = b * p_.window.batch_stride + h * p_.window.head_stride + e * dim;
    SeenKey seen{0, 0, reference::Row(dim), 0, 0};
    score_exact(p_.window.keys, p_.window.dtype, at, query, seen);
    for (int d = 0; d < dim; ++d) seen.value[d] = number(p_.window.values, p_.window.dtype, at + d);
    return seen;
  }

  // Place of a slot's exact key among all outliers, -1 if it has none.
  int64_t outlier_at(int b, int h, int slot) const {
    const int64_t list = (int64_t{b} * p_.keys.layout.num_heads + h) * p_.keys.num_outliers;
    for (int64_t i = list; i < list + p_.keys.num_outliers; ++i) {
      if (p_.keys.outlier_slots[i] == slot) return i;
    }
    return -1;
  }

  void score_exact(const void* keys, DataType dtype, int64_t at, const reference::Row& query,
                   SeenKey& seen) const {
    const int dim = p_.keys.layout.head_dim;
    double magnitude = 0;
    for (int d = 0; d < dim; ++d) {
      const double x = double{p_.queries.sm_scale} * query[d] * number(keys, dtype, at + d);
      seen.score += x;
      magnitude += std::fabs(x);
    }
    seen.error = magnitude * (4 * kFloatRounding + sum_rounding(dim));
  }

  Expected combine(std::vector<SeenKey>& seen) const {
    const int dim = p_.keys.layout.head_dim;
    Expected result{reference::Row(dim), reference::Row(dim),
                    -std::numeric_limits<double>::infinity(), 0};
    if (seen.empty()) return result;
    double most = seen[0].score, sum = 0, worst = 0;
    for (const SeenKey& key : seen) most = std::max(most, key.score);
    for (SeenKey& key : seen) {
      // ex2.approx is off by 2^-22, and its argument is rounded.
      key.error += 0x1p-22 + 4 * kFloatRounding * (std::fabs(key.score) + std::fabs(most));
      worst = std::max(worst, key.error);
      sum += std::exp(key.score - most);
    }
    result.lse = most + std::log(sum);
    // Rotating back is a sum of head_dim numbers.
    const double summing =
        sum_rounding(static_cast<int64_t>(seen.size())) + sum_rounding(dim) + 64 * kFloatRounding;
    result.lse_tolerance = worst + summing + 8 * kFloatRounding * std::fabs(result.lse);
    for (int d = 0; d < dim; ++d) {
      double& out = result.out[d];
      for (const SeenKey& key : seen) out += std::exp(key.score - result.lse) * key.value[d];
      double& tolerance = result.tolerance[d];
      double largest = 0;
      for (const SeenKey& key : seen) {
        const double p = std::exp(key.score - result.lse);
        // Scores that are off move probabilities.
        tolerance += p * std::expm1(key.error) * std::fabs(key.value[d] - out) * std::exp(worst);
        if (key.scale > 0) {
          // A probability times a scale is a half, and multiplies all codes and the middle code alike; so is the
          // probability itself, relative to its page's maximum, where a warp decodes. What is rounded as a
          // subnormal number may differ between planes and the middle, by the same in every channel: it meets in
          // one as it is rotated back.
          const int roundings = decodes(p_) ? 2 : 1;
          tolerance += roundings * p * std::fabs(key.value[d]) * 0x1p-11;
          tolerance += 0x1p-25 * (std::fabs(key.value[d]) + std::sqrt(dim) * key.largest);
        }
        largest = std::max({largest, std::fabs(key.value[d]), key.largest});
      }
      tolerance += summing * largest + rounding(p_.queries.dtype) * std::fabs(out) + 0x1p-25;
    }
    return result;
  }

  // True if attend_decode serves the rows.
  static bool decodes(const AttendParams& p) {
    return p.keys.layout.packs_values() &&
           (p.token_slots || device::query_rows(p) <= device::kRowTile);
  }

  const AttendParams& p_;
};

}  // namespace svdq::testing
