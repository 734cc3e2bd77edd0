// The finite stage: NaN, infinity and numbers above the limit at any index.
#include <array>
#include <limits>

#include "tests/core/testing.h"

namespace svdq {
namespace {

using testing::Random;
using testing::Tokens;

class Finite : public testing::BackendTest {};

TEST_P(Finite, FindsEveryBadNumber) {
  constexpr int kHeads = 2, kDim = 80;
  const float infinity = std::numeric_limits<float>::infinity();
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    for (int64_t num_tokens : {1, 65, 2050}) {
      Random random(600);
      Tokens tokens(kHeads, num_tokens, kDim, dtype);
      tokens.fill_like_keys(random, 1.0);
      const float limit = 1024.0f;
      const auto ok = [&](float bound) {
        return backend().all_finite({tokens.source(), kHeads, kDim, bound}, executor_);
      };
      EXPECT_TRUE(ok(limit)) << "the gaps between rows are not part of the input";
      EXPECT_TRUE(ok(std::numeric_limits<float>::max()));
      for (float bad :
           {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity, 1032.0f, -1032.0f}) {
        for (const auto& [h, t, d] : {std::array<int64_t, 3>{0, 0, 0},
                                      {1, num_tokens - 1, kDim - 1},
                                      {0, num_tokens / 2, 41}}) {
          const double before = tokens.get(static_cast<int>(h), t, static_cast<int>(d));
          tokens.set(static_cast<int>(h), t, static_cast<int>(d), static_cast<double>(bad));
          EXPECT_FALSE(ok(limit)) << bad << " at " << h << ", " << t << ", " << d;
          tokens.set(static_cast<int>(h), t, static_cast<int>(d), static_cast<double>(-limit));
          EXPECT_TRUE(ok(limit)) << "the limit itself is allowed";
          tokens.set(static_cast<int>(h), t, static_cast<int>(d), before);
        }
      }
    }
  }
}

SVDQ_ON_EVERY_BACKEND(Finite);

}  // namespace
}  // namespace svdq
