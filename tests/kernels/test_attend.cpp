// The kernels of the attend stage against plain loops in double, over widths, shapes, lengths and
// cuts, and against the CPU backend.
#include "tests/kernels/attend_test.h"
#include "tests/kernels/chosen_case.h"

namespace svdq {
namespace {

using gpu::AttendTiling;
using testing::AttendAnswer;
using testing::AttendCase;
using testing::AttendProblem;

constexpr AttendTiling kCut = {2, 64, 3};  // of tests about something else

class AttendKernels : public testing::AttendTest {
 protected:
  void check(const char* what, const AttendCase& c, uint64_t stream,
             const AttendTiling& tiling = kCut) {
    AttendTest::check(what, c, stream, &tiling);
  }
};

TEST_P(AttendKernels, EveryWidthAlone) {
  for (int w = 0; w < kNumWidths; ++w) {
    for (int count : {8, 40}) {
      AttendCase c;
      Bands bands{};
      bands.count[w] = count;
      c.bands = {bands};
      check("one width", c, 10 * w + count);
    }
  }
}

TEST_P(AttendKernels, EveryHeadDim) {
  for (int head_dim : {16, 64, 80, 96, 128, 256, 512}) {
    AttendCase c;
    c.head_dim = head_dim;
    c.rotary_pairs = head_dim / 2;
    c.v_bits = {4, 3};
    c.bands = {{{4, 4, 0, 8}}, {{0, 8, 4, 0}}};
    c.cache_seqlens = {66};
    c.window_lens = {3};
    check("head_dim", c, 200 + head_dim);
  }
}

TEST_P(AttendKernels, EveryLength) {
  for (int tokens : {0, 1, 63, 64, 65, 129}) {
    AttendCase c;
    c.cache_seqlens = {tokens, 5, 0};
    c.window_lens = {1, 64, 65};
    check("length", c, 1000 + tokens);
  }
}

TEST_P(AttendKernels, EveryCut) {
  for (int split_pages : {1, 3, 9}) {
    for (int stages : {2, 3, 4}) {
      AttendCase c;
      c.bands = {{{0, 8, 4, 0}}};
      c.cache_seqlens = {530, 300};
      c.window_lens = {150, 1};
      check("tiling", c, 3000 + 10 * split_pages, {split_pages, split_pages * 64, stages});
    }
  }
}

TEST_P(AttendKernels, EveryGroupAndQueryLength) {
  uint64_t stream = 4000;
  for (int group : {1, 3, 7}) {
    for (int q_len : {1, 2, 5}) {
      AttendCase c;
      c.group = group;
      c.q_len = q_len;
      c.cache_seqlens = {65};
      c.window_lens = {8};
      check("group", c, stream += 10);
    }
  }
}

TEST_P(AttendKernels, EveryValueFormat) {
  uint64_t stream = 5000;
  for (int bits : {2, 3, 4, 16, 32}) {
    for (int head_dim : {16, 64, 96}) {
      AttendCase c;
      c.head_dim = head_dim;
      c.rotary_pairs = head_dim / 2;
      c.bands = {{{4, 4, 0, 8}}, {{0, 8, 4, 0}}};
      c.v_bits = bits;
      c.window_dtype = bits == 16 ? DataType::kBFloat16 : DataType::kFloat32;
      check("values", c, stream += 10);
    }
  }
}

TEST_P(AttendKernels, BitsOfValuesDifferByHead) {
  uint64_t stream = 5500;
  for (int head_dim : {64, 80, 128}) {
    for (int sinks : {0, 3}) {
      AttendCase c;
      c.head_dim = head_dim;
      c.rotary_pairs = head_dim / 2;
      c.bands = {{{0, 8, 4, 0}}, {{4, 4, 0, 0}}, {{0, 0, 8, 8}}};
      c.v_bits = {2, 4, 3};
      c.sink_tokens = sinks;
      check("bits by head", c, stream += 10);
    }
  }
}

TEST_P(AttendKernels, EveryDtype) {
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
    AttendCase c;
    c.dtype = c.window_dtype = dtype;
    c.q_len = 2;
    check("dtype", c, 6000 + static_cast<int>(dtype));
  }
}

TEST_P(AttendKernels, SinksAreSkipped) {
  for (int sinks : {1, 8, 64, 100, 200}) {
    AttendCase c;
    c.sink_tokens = sinks;
    check("sinks", c, 7000 + sinks);
  }
}

TEST_P(AttendKernels, NotCausal) {
  AttendCase c;
  c.causal = false;
  c.q_len = 4;
  check("not causal", c, 8000);
}

TEST_P(AttendKernels, EveryRotation) {
  for (int half : {0, 1, 13, 32}) {
    AttendCase c;
    c.rotary_pairs = half;
    c.first_positions = {7, 200000};
    check("rotation", c, 9000 + half);
  }
}

TEST_P(AttendKernels, PartsOfHybridKeys) {
  AttendCase c;
  c.rope = RopeMode::kHybrid;
  // All channels in both parts, none at all, one part alone.
  c.bands = {{{16, 16, 16, 16}}, {{0, 0, 0, 0}}, {{0, 12, 0, 0}}, {{0, 0, 0, 0}}};
  c.pre_bands = {{{16, 16, 16, 16}}, {{0, 0, 0, 0}}, {{0, 0, 0, 0}}, {{0, 4, 0, 8}}};
  c.first_positions = {7, 131000};
  for (int q_len : {1, 3, 9}) {
    for (int v_bits : {4, 16}) {
      c.q_len = q_len;
      c.v_bits = v_bits;
      c.window_dtype = v_bits == 16 ? DataType::kBFloat16 : DataType::kFloat32;
      c.window_lens = {12, 10};
      check_mode("parts", c, 9100 + 10 * q_len + v_bits, nullptr);
    }
  }
}

TEST_P(AttendKernels, OutliersHaveTheScoresOfTheirKeys) {
  uint64_t stream = 9200;
  for (int q_len : {1, 3, 9}) {
    for (int v_bits : {4, 16, 32}) {
      for (int outliers : {1, 9, 90}) {
        AttendCase c;
        c.q_len = q_len;
        c.v_bits = v_bits;
        c.window_dtype = v_bits == 32 ? DataType::kFloat32 : DataType::kBFloat16;
        c.outliers = outliers;
        c.sink_tokens = 2;
        c.window_lens = {12, 10};
        c.cache_seqlens = {150, 70};
        check("outliers", c, stream += 10,
              {1, 64, 2, q_len * c.group > 8 && v_bits != 32 ? 2 : 1, 1});
      }
    }
  }
  for (int head_dim : {16, 80, 256, 512}) {
    AttendCase c;
    c.head_dim = head_dim;
    c.rotary_pairs = head_dim / 2;
    c.bands = {{{4, 4, 0, 8}}, {{0, 8, 4, 0}}};
    c.outliers = 5;
    AttendTest::check("head_dim", c, stream += 10, nullptr);
  }
}

// The CPU backend and the kernels answer alike, as far as each may be off.
TEST_P(AttendKernels, AgreesWithTheCpuBackend) {
  for (AttendCase c : testing::in_every_mode({})) {
    c.q_len = 3;
    c.sink_tokens = 4;
    AttendProblem problem(c, 9500);
    const AttendParams p = testing::captured_params(problem);
    const AttendAnswer got = run(p, nullptr);
    problem.run(current_backend(), SerialExecutor());
    const testing::AttendReference reference(p);
    for (int b = 0; b < p.keys.batch; ++b) {
      for (int head = 0; head < p.queries.num_heads; ++head) {
        for (int i = 0; i < c.q_len; ++i) {
          const int64_t row = (int64_t{b} * p.queries.num_heads + head) * c.q_len + i;
          const testing::Expected own =
              reference.row(b, head / c.group, head % c.group * c.q_len + i);
          const testing::Attended cpu = problem.expected(b, head, i);
          ASSERT_NEAR(got.lse[row], problem.lse(b, head, i), own.lse_tolerance + cpu.lse_tolerance);
          for (int d = 0; d < c.head_dim; ++d) {
            ASSERT_NEAR(testing::read_number(&got.out[(row * c.head_dim + d) * 4], c.dtype),
                        problem.out(b, head, i, d), own.tolerance[d] + cpu.out_tolerance[d]);
          }
        }
      }
    }
  }
}

TEST_P(AttendKernels, MergeOperator) {
  constexpr int kRows = 5, kDim = 80;
  constexpr float kNone = -std::numeric_limits<float>::infinity(),
                  kNan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> lse_a = {0.5f, kNone, 3.0f, kNone, -40.0f},
                           lse_b = {0.25f, 1.0f, kNone, kNone, 40.0f};
  std::vector<float> a(kRows * kDim), b(kRows * kDim);
  for (int i = 0; i < kRows * kDim; ++i) {
    a[i] = std::isinf(lse_a[i / kDim])
               ? kNan
               : static_cast<float>(i % 7);  // an empty side may hold anything
    b[i] = std::isinf(lse_b[i / kDim]) ? kNan : static_cast<float>(i % 5 - 9);
  }
  const testing::DeviceArray<float> d_a(a), d_b(b), d_lse_a(lse_a), d_lse_b(lse_b),
      out(kRows * kDim), lse(kRows);
  const MergeParams p{kRows,      kDim,           DataType::kFloat32, d_a.data(), d_lse_a.data(),
                      d_b.data(), d_lse_b.data(), out.data(),         lse.data()};
  launch("merge", device::merge_launch(p), device::merge_kernel, p);
  const auto got_out = out.read(), got_lse = lse.read();
  for (int row = 0; row < kRows; ++row) {
    const double weight_a = std::exp(double{lse_a[row]}), weight_b = std::exp(double{lse_b[row]}),
                 sum = weight_a + weight_b;
    if (sum == 0) {
      EXPECT_EQ(got_lse[row], kNone);
    } else {
      // Weights are off by 2^-22 and by the rounding of a logarithm of up to 64 in units of log2.
      EXPECT_NEAR(got_lse[row], std::log(sum), 0x1p-17);
    }
    for (int d = 0; d < kDim; ++d) {
      const int i = row * kDim + d;
      const double part_a = weight_a > 0 ? weight_a * double{a[i]} : 0,
                   part_b = weight_b > 0 ? weight_b * double{b[i]} : 0;
      EXPECT_NEAR(got_out[i], sum > 0 ? (part_a + part_b) / sum : 0, 9 * 0x1p-17)
          << row << " " << d;
    }
  }
}

// A case of the environment's, as planned or cut as it says.
TEST_P(AttendKernels, Chosen) {
  const testing::ChosenCase chosen;
  const auto tiling = chosen.tiling();
  check_mode("chosen", chosen.attend(), 20000 + chosen.seed(), tiling ? &*tiling : nullptr);
}

SVDQ_KERNEL_TESTS(AttendKernels);

}  // namespace
}  // namespace svdq
