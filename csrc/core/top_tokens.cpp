#include "csrc/core/top_tokens.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "csrc/core/scalar.h"

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

namespace {

// The budget-th largest of the weights of `candidates`, none of which is negative: a histogram of
// their leading bits, which order them, leaves few to look at.
float last_kept(const float* weights, int64_t budget, int64_t found, const int32_t* candidates) {
  constexpr int kShift = 20;  // leaves exponent and 3 bits of mantissa
  std::vector<int32_t> counts(1 << (31 - kShift), 0);
  const auto bin = [&](int32_t index) { return float_to_bits(weights[index]) >> kShift; };
  for (int64_t i = 0; i < found; ++i) ++counts[bin(candidates[i])];
  uint32_t at = static_cast<uint32_t>(counts.size()) - 1;
  int64_t above = 0;
  while (above + counts[at] < budget) above += counts[at--];
  std::vector<float> inside;
  inside.reserve(counts[at]);
  for (int64_t i = 0; i < found; ++i) {
    if (bin(candidates[i]) == at) inside.push_back(weights[candidates[i]]);
  }
  const auto last = inside.begin() + (budget - above - 1);
  std::nth_element(inside.begin(), last, inside.end(), std::greater<>());
  return *last;
}

}  // namespace

void keep_largest(const float* weights, int64_t budget, int64_t found, int32_t* candidates) {
  if (found <= budget) return;
  const float last = last_kept(weights, budget, found, candidates);
  int64_t ties = budget;  // of the last one's equals, those there is room for
  for (int64_t i = 0; i < found; ++i) ties -= weights[candidates[i]] > last;
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
