// The attend stage on random pages against the formula, for every shape that a cache passes.
#include "tests/core/attend_problem.h"

namespace svdq {
namespace {

using testing::AttendCase;
using testing::Attended;
using testing::AttendProblem;

class Attend : public testing::BackendTest {
 protected:
  // Compares every query row of a case with the formula.
  void check(const char* what, const AttendCase& c, uint64_t stream) {
    SCOPED_TRACE(::testing::Message()
                 << what << ", stream " << stream << ", " << testing::mode_of(c));
    AttendProblem problem(c, stream);
    problem.run(backend(), executor_);
    for (int b = 0; b < problem.batch(); ++b) {
      for (int head = 0; head < problem.num_qo_heads(); ++head) {
        for (int i = 0; i < c.q_len; ++i) {
          const Attended expected = problem.expected(b, head, i);
          const auto where = [&] {
            return ::testing::Message() << "sequence " << b << " head " << head << " query " << i;
          };
          if (std::isinf(expected.lse)) {
            ASSERT_EQ(problem.lse(b, head, i), expected.lse) << where();
          } else {
            ASSERT_NEAR(problem.lse(b, head, i), expected.lse, expected.lse_tolerance) << where();
          }
          for (int d = 0; d < c.head_dim; ++d) {
            ASSERT_NEAR(problem.out(b, head, i, d), expected.out[d], expected.out_tolerance[d])
                << where() << " channel " << d;
          }
        }
      }
    }
  }

  // The same in every RoPE mode, hybrid with pre-RoPE channels and without, with folded rows that int8 represents exactly
  // and with folded rows that are rounded.
  void check_all(const char* what, const AttendCase& given, uint64_t stream) {
    for (AttendCase c : testing::in_every_mode(given)) {
      for (bool exact_folding : {true, false}) {
        c.exact_folding = exact_folding;
        check(what, c, stream++);
        if (HasFatalFailure()) return;
      }
    }
  }
};

TEST_P(Attend, EveryWidthAlone) {
  for (int w = 0; w < kNumWidths; ++w) {
    AttendCase c;
    Bands bands{};
    bands.count[w] = 40;
    c.bands = {bands};
    check_all("one width", c, 100 + 10 * w);
  }
}

TEST_P(Attend, EveryHeadDim) {
  for (int head_dim : {16, 64, 80, 96, 128, 256, 512}) {
    AttendCase c;
    c.head_dim = head_dim;
    c.rotary_pairs = head_dim / 2;
    c.v_bits = {4, 3};
    c.bands = {{{4, 4, 0, 8}}, {{0, 8, 4, 0}}};
    c.cache_seqlens = {66};
    c.window_lens = {3};
    check_all("head_dim", c, 200 + head_dim);
  }
}

TEST_P(Attend, EveryLength) {
  for (int tokens : {0, 1, 2, 63, 64, 65, 127, 128, 129}) {
    AttendCase c;
    c.cache_seqlens = {tokens, 5, 0};
    c.window_lens = {1, 64, 65};
    check_all("length", c, 1000 + 10 * tokens);
  }
}

TEST_P(Attend, LongSequencesAreSplit) {
  AttendCase c;
  c.bands = {{{0, 8, 4, 0}}};
  c.cache_seqlens = {4097, 1500};
  c.window_lens = {70, 1};
  c.first_positions = {3, 90000};
  check_all("long", c, 3000);
}

TEST_P(Attend, EveryGroupAndQueryLength) {
  uint64_t stream = 4000;
  for (int group : {1, 3, 4, 7}) {
    for (int q_len : {1, 2, 5}) {
      AttendCase c;
      c.group = group;
      c.q_len = q_len;
      c.cache_seqlens = {65};
      c.window_lens = {8};
      check_all("group", c, stream += 10);
    }
  }
  AttendCase c;
  c.bands = {{{0, 8, 0, 0}}};
  c.q_len = 67;  // more query rows than a task has
  c.cache_seqlens = {70};
  c.window_lens = {80};
  check_all("many queries", c, stream += 10);
}

TEST_P(Attend, QueriesSeeTheWindowCausallyOrWhole) {
  for (bool causal : {true, false}) {
    AttendCase c;
    c.causal = causal;
    c.q_len = 4;
    c.cache_seqlens = {0, 7, 0, 0};
    c.window_lens = {4, 5, 2, 0};  // with 2 tokens for 4 queries the first two see no token
    check_all(causal ? "causal" : "not causal", c, 5000 + causal);
  }
}

TEST_P(Attend, SinksAreSkipped) {
  uint64_t stream = 6000;
  for (int sinks : {1, 8, 64, 65}) {
    AttendCase c;
    c.sink_tokens = sinks;
    c.cache_seqlens = {130, 64};  // with 64 and 65 sinks the second has no valid slot
    c.window_lens = {10, 1};
    check_all("sinks", c, stream += 10);
  }
}

TEST_P(Attend, EveryValueFormat) {
  uint64_t stream = 7000;
  for (int bits : {2, 3, 4}) {
    for (int head_dim : {64, 96}) {
      AttendCase c;
      c.head_dim = head_dim;
      c.rotary_pairs = head_dim / 2;
      c.v_bits = bits;
      check_all("packed values", c, stream += 10);
    }
  }
  AttendCase mixed;
  mixed.v_bits = {2, 4, 3};
  mixed.bands = {{{0, 8, 4, 0}}, {{4, 4, 0, 0}}, {{0, 0, 8, 8}}};
  check_all("bits by head", mixed, stream += 10);
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    AttendCase c;
    c.v_bits = dtype == DataType::kFloat32 ? 32 : 16;
    c.window_dtype = dtype;
    check_all("uncompressed values", c, stream += 10);
  }
}

TEST_P(Attend, EveryDataType) {
  uint64_t stream = 8000;
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    for (DataType window_dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
      AttendCase c;
      c.dtype = dtype;
      c.window_dtype = window_dtype;
      check_all("data types", c, stream += 10);
    }
  }
}

TEST_P(Attend, PartialRotationAndPositions) {
  uint64_t stream = 9000;
  for (int rotary_pairs : {0, 1, 5, 8, 31, 32}) {
    AttendCase c;
    c.rotary_pairs = rotary_pairs;
    c.first_positions = {0, 131000};
    c.exact_folding = rotary_pairs % 2 == 0;
    check("partial rotation", c, stream++);
  }
}

TEST_P(Attend, PartsOfHybridKeys) {
  AttendCase c;
  c.rope = RopeMode::kHybrid;
  // All channels in both parts, none at all, one part alone.
  c.bands = {{{16, 16, 16, 16}}, {{0, 0, 0, 0}}, {{0, 12, 0, 0}}, {{0, 0, 0, 0}}};
  c.pre_bands = {{{16, 16, 16, 16}}, {{0, 0, 0, 0}}, {{0, 0, 0, 0}}, {{0, 4, 0, 8}}};
  c.q_len = 3;
  c.first_positions = {7, 131000};
  for (bool exact_folding : {true, false}) {
    c.exact_folding = exact_folding;
    check("parts", c, 9500 + exact_folding);
  }
}

TEST_P(Attend, OutliersHaveTheScoresOfTheirKeys) {
  uint64_t stream = 9700;
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    for (int outliers : {1, 7, 140}) {
      AttendCase c;
      c.window_dtype = dtype;
      c.outliers = outliers;
      c.sink_tokens = 4;
      c.q_len = 3;
      c.window_lens = {9, 5};
      check_all("outliers", c, stream += 10);
    }
  }
  AttendCase c;
  c.bands = {{{0, 8, 4, 0}}};
  c.cache_seqlens = {4097, 1500};
  c.outliers = 40;
  check_all("long", c, stream += 10);
}

// Each token of gathered pages has its own position, or is invalid.
TEST_P(Attend, GatheredPages) {
  uint64_t stream = 9800;
  for (int v_bits : {2, 3, 4, 16}) {
    for (int outliers : {0, 9}) {
      AttendCase c;
      c.gathered = true;
      c.v_bits = v_bits;
      c.window_dtype = v_bits == 16 ? DataType::kBFloat16 : DataType::kFloat32;
      c.outliers = outliers;
      c.group = 4;
      c.first_positions = {7, 200000};
      check_all("gathered", c, stream += 10);
    }
  }
}

// What models do to their logits. Scores are a few units.
TEST_P(Attend, SoftcapsAndLearnedSinks) {
  uint64_t stream = 12000;
  for (float softcap : {0.0f, 0.5f, 3.0f, 1e4f}) {
    for (int v_bits : {3, 16}) {
      AttendCase c;
      c.softcap = softcap;
      c.sinks = true;
      c.outliers = 5;
      c.v_bits = v_bits;
      c.window_dtype = v_bits == 16 ? DataType::kBFloat16 : DataType::kFloat32;
      c.q_len = 3;
      c.group = 3;
      check_all("softcap", c, stream += 10);
    }
  }
  AttendCase c;
  c.sinks = true;
  c.cache_seqlens = {0, 7};
  c.window_lens = {2, 9};
  c.q_len = 4;  // the first two queries see their sink alone
  check_all("sinks alone", c, stream += 10);
}

// Windows that end in the window, at its start, in its sinks, in pages and before all tokens.
TEST_P(Attend, SlidingWindows) {
  uint64_t stream = 13000;
  for (int size : {1, 5, 9, 40, 75, 128, 134, 1000}) {
    for (int q_len : {1, 5}) {
      for (bool gathered : {false, true}) {
        AttendCase c;
        c.window_size = gathered ? 100 * size : size;
        c.gathered = gathered;
        c.softcap = 3.0f;
        c.sinks = q_len == 1;
        c.q_len = q_len;
        c.sink_tokens = 4;
        c.window_lens = {9, 6};
        c.first_positions = {0, 3000};
        c.v_bits = q_len == 1 ? 4 : 16;
        c.window_dtype = q_len == 1 ? DataType::kFloat32 : DataType::kFloat16;
        check_all("sliding window", c, stream += 10);
      }
    }
  }
  // Sequences begin at other blocks, of many splits.
  AttendCase c;
  c.bands = {{{0, 8, 4, 0}}};
  c.cache_seqlens = {4097, 1500, 40};
  c.window_lens = {70, 1, 9};
  c.window_size = 1300;
  c.first_positions = {3, 90000, 0};
  check_all("long", c, stream += 10);
  c.q_len = 67;  // more query rows than a task has
  c.cache_seqlens = {400};
  c.window_lens = {80};
  c.first_positions = {3};
  c.window_size = 100;
  c.causal = false;  // some rows see nothing
  check_all("many queries", c, stream += 10);
}

TEST_P(Attend, EverySeed) {
  for (uint64_t stream = 10000; stream < 10005; ++stream)
    check_all("seed", AttendCase(), stream * 4);
}

TEST_P(Attend, ResultsDoNotDependOnTheThreads) {
  AttendCase c;
  c.cache_seqlens = {3000, 64};
  AttendProblem problem(c, 11000);
  problem.run(backend(), executor_);
  const std::vector<uint8_t> shuffled = problem.out_bytes();
  problem.run(backend(), SerialExecutor());
  EXPECT_TRUE(testing::same_bytes(problem.out_bytes(), shuffled));
}

SVDQ_ON_EVERY_BACKEND(Attend);

}  // namespace
}  // namespace svdq
