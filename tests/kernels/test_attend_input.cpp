// Lengths and page ids lie on the device, where no host checks them: what is out of range must not
// be read, and the rows of its sequence become NaN.
#include "tests/kernels/attend_test.h"

namespace svdq {
namespace {

using testing::AttendAnswer;
using testing::AttendCase;
using testing::AttendProblem;

class AttendInput : public testing::AttendTest {
 protected:
  // Two sequences, of which `spoil` changes what the first one says of itself.
  template <typename Spoil>
  void check(int q_len, const Spoil& spoil) {
    for (AttendCase c : testing::in_every_mode({})) {
      SCOPED_TRACE(::testing::Message() << "q_len " << q_len << ", " << testing::mode_of(c));
      c.q_len = q_len;
      c.dtype = c.window_dtype = DataType::kFloat16;
      AttendProblem problem(c, 1);
      AttendParams p = testing::captured_params(problem);
      const AttendAnswer clean = run(p, nullptr);
      std::vector<int32_t> table(p.keys.page_table,
                                 p.keys.page_table + p.keys.batch * p.keys.table_stride);
      std::vector<int32_t> lengths(p.keys.cache_seqlens, p.keys.cache_seqlens + p.keys.batch);
      std::vector<int32_t> exact(p.window.lens, p.window.lens + p.keys.batch);
      spoil(p, table, lengths, exact);
      p.keys.page_table = table.data();
      p.keys.cache_seqlens = lengths.data();
      p.window.lens = exact.data();
      const AttendAnswer got = run(p, nullptr);
      const size_t half = got.lse.size() / 2;
      for (size_t row = 0; row < got.lse.size(); ++row) {
        const auto out = [&](const AttendAnswer& answer) {
          return testing::read_number(&answer.out[row * c.head_dim * 2], c.dtype);
        };
        if (row < half) {
          EXPECT_TRUE(std::isnan(got.lse[row]) && std::isnan(out(got))) << "row " << row;
        } else {
          EXPECT_TRUE(got.lse[row] == clean.lse[row] && out(got) == out(clean)) << "row " << row;
        }
      }
    }
  }

  // One query row, and as many as tiles serve.
  template <typename Spoil>
  void check(const Spoil& spoil) {
    check(1, spoil);
    check(20, spoil);
  }
};

using Ints = std::vector<int32_t>;

TEST_P(AttendInput, PagesThatDoNotExist) {
  for (int32_t page : {-1, std::numeric_limits<int32_t>::min(), 1 << 20}) {
    check([&](const AttendParams&, Ints& table, Ints&, Ints&) { table[1] = page; });
  }
}

TEST_P(AttendInput, PagesPastThePool) {
  check([](const AttendParams& p, Ints& table, Ints&, Ints&) {
    table[2] = static_cast<int32_t>(p.keys.num_pages);
  });
}

TEST_P(AttendInput, LengthsOutOfRange) {
  check([](const AttendParams&, Ints&, Ints& lengths, Ints&) { lengths[0] = -1; });
  check([](const AttendParams& p, Ints&, Ints& lengths, Ints&) {
    lengths[0] = static_cast<int32_t>(p.keys.table_stride * kPageTokens + 1);
  });
}

TEST_P(AttendInput, ExactLengthsOutOfRange) {
  check([](const AttendParams&, Ints&, Ints&, Ints& exact) { exact[0] = -5; });
  check([](const AttendParams& p, Ints&, Ints&, Ints& exact) { exact[0] = p.window.rows + 1; });
}

SVDQ_KERNEL_TESTS(AttendInput);

}  // namespace
}  // namespace svdq
