#include "csrc/core/top_tokens.h"

#include <algorithm>
#include <functional>
#include <vector>

namespace svdq {

float likely_bound(const float* weights, int64_t count, int64_t budget) {
  constexpr int64_t kSample = 4096;
  const int64_t stride = count / kSample;
  if (stride < 2) return 0.0f;
  std::vector<float> sample;
  sample.reserve(count / stride + 1);
  for (int64_t i = stride / 2; i < count; i += stride) sample.push_back(weights[i]);
  const int64_t size = static_cast<int64_t>(sample.size());
  // An eighth and 16 more than the budget's share: some three deviations.
  const int64_t rank = budget * size / count * 9 / 8 + 16;
  if (rank >= size) return 0.0f;
  std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<>());
  return std::max(sample[rank], 0.0f);
}

void keep_largest(const float* weights, int64_t budget, int64_t found, int32_t* candidates) {
  if (found <= budget) return;
  std::vector<float> order(found);
  for (int64_t i = 0; i < found; ++i) order[i] = weights[candidates[i]];
  std::nth_element(order.begin(), order.begin() + (budget - 1), order.end(), std::greater<>());
  const float last = order[budget - 1];
  int64_t ties = budget;  // of the last one's equals, those there is room for
  for (int64_t i = 0; i < budget; ++i) ties -= order[i] > last;
  int64_t kept = 0;
  for (int64_t i = 0; i < found; ++i) {
    const float weight = weights[candidates[i]];
    const bool tie = weight == last && ties > 0;
    candidates[kept] = candidates[i];
    kept += weight > last || tie;
    ties -= tie;
  }
}

}  // namespace svdq
