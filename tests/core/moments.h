// Mean and covariance of unrotated keys, in double.
#pragma once

#include <algorithm>
#include <vector>

#include "tests/core/reference.h"

namespace svdq::reference {

struct Moments {
  Row mean;                     // [D]
  std::vector<Row> covariance;  // [D][D]
  double largest;               // magnitude of a key
  double spread;                // largest distance from the mean
};

inline Moments moments_of(const std::vector<Row>& keys) {
  const size_t dim = keys[0].size();
  const auto count = static_cast<double>(keys.size());
  Moments m{Row(dim), std::vector<Row>(dim, Row(dim)), 0, 0};
  for (const Row& key : keys) {
    for (size_t d = 0; d < dim; ++d) m.mean[d] += key[d] / count;
  }
  for (const Row& key : keys) {
    for (size_t i = 0; i < dim; ++i) {
      m.largest = std::max(m.largest, std::fabs(key[i]));
      m.spread = std::max(m.spread, std::fabs(key[i] - m.mean[i]));
      for (size_t j = 0; j < dim; ++j) {
        m.covariance[i][j] += (key[i] - m.mean[i]) * (key[j] - m.mean[j]) / count;
      }
    }
  }
  return m;
}

inline std::vector<Row> unrotated_keys(const testing::Tokens& keys, int h, int head_dim,
                                       const Rope& rope, int64_t position) {
  std::vector<Row> rows;
  for (int64_t t = 0; t < keys.num_tokens(); ++t) {
    rows.push_back(unrotated_key(keys, h, t, head_dim, rope, position));
  }
  return rows;
}

}  // namespace svdq::reference
