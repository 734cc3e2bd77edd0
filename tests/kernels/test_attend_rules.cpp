// Softcaps, learned sinks and sliding windows in every kernel of the attend stage, against plain loops in
// double.
#include "tests/kernels/attend_test.h"

namespace svdq {
namespace {

using gpu::AttendTiling;
using testing::AttendAnswer;
using testing::AttendCase;
using testing::AttendProblem;

class AttendRules : public testing::AttendTest {
 protected:
  // Decoding, plain pages and tiles: packed values of few and many rows, float values.
  void check_kernels(const char* what, const AttendCase& given, uint64_t stream) {
    for (const auto& [q_len, v_bits, dtype] : {std::tuple{1, 4, DataType::kFloat32},
                                               {3, 32, DataType::kFloat32},
                                               {9, 3, DataType::kFloat16},
                                               {10, 16, DataType::kBFloat16}}) {
      AttendCase c = given;
      c.q_len = q_len;
      c.v_bits = v_bits;
      c.dtype = c.window_dtype = dtype;
      check(what, c, stream += 10, nullptr);
    }
  }
};

TEST_P(AttendRules, SoftcapsAndLearnedSinks) {
  uint64_t stream = 100;
  for (float softcap : {0.0f, 0.5f, 3.0f, 1e4f}) {
    AttendCase c;
    c.softcap = softcap;
    c.sinks = true;
    c.outliers = 5;
    c.window_lens = {12, 11};
    check_kernels("softcap", c, stream += 100);
  }
}

TEST_P(AttendRules, SlidingWindows) {
  uint64_t stream = 1000;
  for (int size : {1, 7, 19, 60, 75, 140, 1000}) {
    AttendCase c;
    c.window_size = size;
    c.softcap = 3.0f;
    c.sinks = size % 2 == 0;
    c.sink_tokens = 4;
    c.window_lens = {23, 12};
    c.first_positions = {0, 3000};
    check_kernels("sliding window", c, stream += 100);
  }
}

TEST_P(AttendRules, GatheredPages) {
  uint64_t stream = 3000;
  for (int size : {20, 3000, 200000}) {
    AttendCase c;
    c.gathered = true;
    c.window_size = size;
    c.softcap = 3.0f;
    c.sink_tokens = 4;
    c.outliers = 3;
    c.window_lens = {23, 12};
    check_kernels("gathered", c, stream += 100);
  }
}

// Splits before the window have no page, and those with none at all leave no trace.
TEST_P(AttendRules, LongSequences) {
  for (bool causal : {true, false}) {
    AttendCase c;
    c.bands = {{{0, 8, 4, 0}}};
    c.cache_seqlens = {530, 300};
    c.window_lens = {70, 1};
    c.window_size = 150;
    c.sinks = causal;
    c.causal = causal;
    check_kernels("long", c, 4000);
  }
}

TEST_P(AttendRules, EveryClassOfHeadDim) {
  for (int head_dim : {256, 512}) {
    AttendCase c;
    c.head_dim = head_dim;
    c.rotary_pairs = head_dim / 2;
    c.bands = {{{4, 4, 0, 8}}};
    c.softcap = 3.0f;
    c.sinks = true;
    c.window_size = 40;
    c.cache_seqlens = {66};
    c.window_lens = {11};
    check_kernels("head_dim", c, 5000 + head_dim);
  }
}

// A kernel cannot report that a sink is not finite: the rows of its query head become NaN.
TEST_P(AttendRules, SinksThatAreNotFinite) {
  AttendCase c;
  c.sinks = true;
  c.q_len = 2;
  AttendProblem problem(c, 1);
  AttendParams p = testing::captured_params(problem);
  const AttendAnswer clean = run(p, nullptr);
  for (float wrong :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    std::vector<float> sinks(p.rules.sinks, p.rules.sinks + p.queries.num_heads);
    sinks[1] = wrong;
    AttendParams spoiled = p;
    spoiled.rules.sinks = sinks.data();
    const AttendAnswer got = run(spoiled, nullptr);
    for (size_t row = 0; row < got.lse.size(); ++row) {
      const bool is_wrong = row / c.q_len % p.queries.num_heads == 1;
      const double out = testing::read_number(&got.out[row * c.head_dim * 4], c.dtype);
      EXPECT_EQ(std::isnan(got.lse[row]), is_wrong) << wrong << ", row " << row;
      EXPECT_EQ(std::isnan(out), is_wrong) << wrong << ", row " << row;
      if (!is_wrong) {
        EXPECT_EQ(got.lse[row], clean.lse[row]);
      }
    }
  }
}

SVDQ_KERNEL_TESTS(AttendRules);

}  // namespace
}  // namespace svdq
