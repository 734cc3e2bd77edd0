// The select stage against the formula.
#include "tests/core/select_problem.h"

namespace svdq {
namespace {

using testing::SelectCase;
using testing::SelectProblem;

class Select : public testing::BackendTest {
 protected:
  void SetUp() override {}

  void check(const char* what, const SelectCase& given, uint64_t stream) {
    for (const SelectCase& c : testing::in_every_mode(given)) {
      SelectProblem problem(c, stream);
      problem.run(backend(), executor_);
      EXPECT_TRUE(problem.check()) << what << ", stream " << stream << ", " << testing::mode_of(c);
    }
  }
};

TEST_P(Select, EveryWidthAndNumberOfChannels) {
  for (int w = 0; w < kNumWidths; ++w) {
    for (int channels : {4, 8, 32}) {
      SelectCase c;
      Bands bands{};
      bands.count[w] = 16;
      c.bands = {bands, {{4, 4, 4, 8}}};
      c.channels = channels;
      check("width", c, 100 * w + channels);
    }
  }
}

TEST_P(Select, EveryHeadDim) {
  for (int head_dim : {16, 80, 128, 512}) {
    SelectCase c;
    c.head_dim = head_dim;
    c.rotary_pairs = head_dim / 2;
    c.bands = {{{4, 4, 0, 8}}, {{0, 0, 0, 0}}};
    check("head_dim", c, 1000 + head_dim);
  }
}

TEST_P(Select, EveryLength) {
  for (int tokens : {0, 1, 63, 64, 65, 4200}) {
    SelectCase c;
    c.cache_seqlens = {tokens, 5, 0};
    c.budget = tokens > 1000 ? 100 : 10;
    c.sink_tokens = 3;
    check("length", c, 3000 + tokens);
  }
}

TEST_P(Select, EveryGroupAndDtype) {
  uint64_t stream = 4000;
  for (int group : {1, 3, 8}) {
    for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
      SelectCase c;
      c.group = group;
      c.q_len = group == 3 ? 3 : 1;
      c.dtype = dtype;
      check("group", c, stream += 10);
    }
  }
}

TEST_P(Select, EarlierOfEquals) {
  for (int budget : {1, 64, 100}) {
    SelectCase c;
    c.same_codes = true;
    c.budget = budget;
    check("ties", c, 6000 + budget);
  }
}

TEST_P(Select, OutliersAreSelectedInAddition) {
  for (int outliers : {1, 9, 90}) {
    SelectCase c;
    c.outliers = outliers;
    c.sink_tokens = 2;
    c.cache_seqlens = {200, 40, 0};
    check("outliers", c, 7000 + outliers);
  }
}

TEST_P(Select, EveryRotation) {
  for (int half : {0, 1, 13, 32}) {
    SelectCase c;
    c.rotary_pairs = half;
    c.first_positions = {7, 200000};
    check("rotation", c, 8000 + half);
  }
}

SVDQ_ON_EVERY_BACKEND(Select);

}  // namespace
}  // namespace svdq
