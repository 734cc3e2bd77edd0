// The formulas of the method in plain loops and double, independent of every backend: the oracle of
// the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <vector>

#include "kernels/params.h"
#include "kernels/rotation.h"
#include "tests/core/testing.h"

namespace svdq::reference {

using Row = std::vector<double>;

// One coded channel of a head: its width, its row of the basis, and its address inside a key page.
struct Channel {
  int width;
  int row;
  int64_t band_byte;
  int index;  // inside the band

  CodeAddress address(int slot) const {
    const CodeAddress inside = key_code_address(width, index, slot);
    return {band_byte + inside.byte, inside.shift};
  }
  double mid() const { return static_cast<double>(mid_code(width)); }
};

inline std::vector<Channel> channels_of(const HeadPlan& head) {
  std::vector<Channel> channels;
  int64_t byte = head.k_offset;
  int row = head.first_channel;
  for (const Bands& bands : {head.pre, head.post}) {
    for (int w = 0; w < kNumWidths; ++w) {
      for (int i = 0; i < bands.count[w]; ++i) channels.push_back({kWidths[w], row++, byte, i});
      byte += band_bytes(kWidths[w], bands.count[w]);
    }
  }
  return channels;
}

// A head's pre-RoPE channels (kPre) or post-RoPE channels (kPost).
inline std::vector<Channel> part_channels(const LayoutView& layout, int h, RopeMode part) {
  const std::vector<Channel> all = channels_of(layout.heads[h]);
  const int pre = layout.heads[h].pre.rank();
  if (part == RopeMode::kPre) return {all.begin(), all.begin() + pre};
  return {all.begin() + pre, all.end()};
}

// Rotates the pairs (i, i + rotary_pairs) by position * inv_freq[i]; a negative position unrotates.
inline void rotate(Row& x, const Rope& rope, double position) {
  for (int i = 0; i < rope.rotary_pairs; ++i) {
    const double angle = position * static_cast<double>(rope.inv_freq[i]);
    const double a = x[i], b = x[i + rope.rotary_pairs];
    x[i] = a * std::cos(angle) - b * std::sin(angle);
    x[i + rope.rotary_pairs] = b * std::cos(angle) + a * std::sin(angle);
  }
}

// A key before RoPE.
inline Row unrotated_key(const testing::Tokens& keys, int h, int64_t t, int head_dim,
                         const Rope& rope, int64_t position) {
  Row key(head_dim);
  for (int d = 0; d < head_dim; ++d) key[d] = keys.get(h, t, d);
  rotate(key, rope, -static_cast<double>(position + t));
  return key;
}

// (key - mean) . basis_row
inline double project(const Row& key, const float* mean, const uint16_t* basis_row) {
  double sum = 0;
  for (size_t d = 0; d < key.size(); ++d) {
    sum += (key[d] - static_cast<double>(mean[d])) *
           static_cast<double>(bfloat16_to_float(basis_row[d]));
  }
  return sum;
}

// mean + sum_j (code_j - mid_j) * scale_j * basis_j, in the space that the keys were coded in.
inline Row decode_key(const std::vector<Channel>& channels, const uint8_t* page, int slot,
                      const uint16_t* basis, const float* scale, const float* mean, int head_dim) {
  Row key(mean, mean + head_dim);
  for (const Channel& c : channels) {
    const double latent =
        (get_code(page, c.address(slot), c.width) - c.mid()) * static_cast<double>(scale[c.row]);
    for (int d = 0; d < head_dim; ++d) {
      key[d] +=
          latent * static_cast<double>(bfloat16_to_float(basis[int64_t{c.row} * head_dim + d]));
    }
  }
  return key;
}

// The rotation of values Q [dim, dim] by its definition (kernels/rotation.h).
inline const Row& rotation_matrix(int dim) {
  static std::map<int, Row> all;
  Row& matrix = all[dim];
  if (!matrix.empty()) return matrix;
  const int block = rotation_block(dim), blocks = dim / block;
  matrix.resize(int64_t{dim} * dim);
  for (int r = 0; r < dim; ++r) {
    for (int d = 0; d < dim; ++d) {
      const double reflection = (r / block == d / block) - (blocks > 1 ? 2.0 / blocks : 0.0);
      const double hadamard = __builtin_parity(r % block & d % block) ? -1 : 1;
      matrix[int64_t{r} * dim + d] =
          reflection * hadamard / std::sqrt(block) * static_cast<double>(rotation_sign(d));
    }
  }
  return matrix;
}

inline Row rotate_value(const Row& value) {
  const int dim = static_cast<int>(value.size());
  const double* q = rotation_matrix(dim).data();
  Row rotated(dim);
  for (int r = 0; r < dim; ++r) {
    for (int d = 0; d < dim; ++d) rotated[r] += q[int64_t{r} * dim + d] * value[d];
  }
  return rotated;
}

inline Row unrotate_value(const Row& rotated) {
  const int dim = static_cast<int>(rotated.size());
  const double* q = rotation_matrix(dim).data();
  Row value(dim);
  for (int r = 0; r < dim; ++r) {
    for (int d = 0; d < dim; ++d) value[d] += q[int64_t{r} * dim + d] * rotated[r];
  }
  return value;
}

// Scale of a slot of packed values: 5 bits of exponent, 3 of mantissa, the exponent biased by 15.
inline double value_scale(const uint8_t* page, int slot) {
  const int exponent = page[slot] >> 3, mantissa = page[slot] & 7;
  return exponent ? std::ldexp(8 + mantissa, exponent - 18) : std::ldexp(mantissa, -17);
}

// Codes of slot `slot` of packed values, less the middle.
inline Row value_codes(const ValueLayout& value, const uint8_t* page, int slot) {
  Row codes(value.head_dim);
  for (int d = 0; d < value.head_dim; ++d)
    codes[d] = get_value_code(page, value, d, slot) - static_cast<double>(mid_code(value.bits));
  return codes;
}

// Exact values of slot `slot` in the value page of one head.
inline Row exact_value(const ValueLayout& value, const uint8_t* page, int slot, DataType dtype) {
  Row numbers(value.head_dim);
  for (int d = 0; d < value.head_dim; ++d) {
    numbers[d] =
        testing::read_number(page + (int64_t{slot} * value.head_dim + d) * value.bits / 8, dtype);
  }
  return numbers;
}

}  // namespace svdq::reference
