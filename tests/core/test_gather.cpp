// The gather stage, byte for byte as the format defines.
#include "tests/core/gather_problem.h"

namespace svdq {
namespace {

using testing::GatherCase;

class Gather : public testing::BackendTest {
 protected:
  void SetUp() override {}

  void check(const GatherCase& c, uint64_t stream) {
    testing::GatherProblem problem(c, stream);
    problem.run(backend(), executor_);
    EXPECT_TRUE(testing::same_bytes(problem.k_out, problem.expected_keys())) << stream;
    EXPECT_TRUE(testing::same_bytes(problem.v_out, problem.expected_values())) << stream;
  }
};

TEST_P(Gather, EveryWidth) {
  for (int w = 0; w < kNumWidths; ++w) {
    GatherCase c;
    Bands bands{};
    bands.count[w] = 24;
    c.bands = {bands, {{4, 4, 4, 8}}};
    check(c, 10 * w);
  }
}

TEST_P(Gather, EveryModeAndHeadDim) {
  for (int head_dim : {16, 80, 128, 512}) {
    GatherCase c;
    c.head_dim = head_dim;
    c.v_bits = {3, 4, 2};
    c.bands = {{{4, 4, 0, 8}}, {{0, 0, 0, 0}}, {{0, 4, 4, 0}}};
    for (RopeMode mode : {RopeMode::kPre, RopeMode::kPost, RopeMode::kHybrid}) {
      c.rope = mode;
      if (mode == RopeMode::kHybrid) c.pre_bands = {{{0, 4, 4, 0}}, {{4, 0, 0, 8}}, {{0, 0, 0, 0}}};
      check(c, 100 + head_dim + static_cast<int>(mode));
    }
  }
}

TEST_P(Gather, EveryValueFormatAndNumberOfSlots) {
  for (int bits : {2, 3, 4, 16, 32}) {
    for (int slots : {1, 64, 65, 300}) {
      GatherCase c;
      c.v_bits = bits;
      c.num_slots = slots;
      check(c, 1000 + 10 * bits + slots);
    }
  }
}

SVDQ_ON_EVERY_BACKEND(Gather);

}  // namespace
}  // namespace svdq
