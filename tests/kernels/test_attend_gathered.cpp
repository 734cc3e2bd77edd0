// The attend kernels over gathered pages, whose tokens have slots of their own, against plain loops in
// double: over RoPE modes, head dims, value formats, groups and lists with tokens that have none.
#include "tests/kernels/attend_test.h"

namespace svdq {
namespace {

using gpu::AttendTiling;
using testing::AttendCase;
using testing::AttendProblem;

class AttendGathered : public testing::AttendTest {
 protected:
  static AttendCase small_case() {
    AttendCase c;
    c.gathered = true;
    c.bands = {{{0, 4, 4, 8}}, {{4, 4, 0, 0}}};
    c.cache_seqlens = {130, 64};
    c.window_lens = {9, 8};
    return c;
  }
};

TEST_P(AttendGathered, EveryHeadDimAndValueFormat) {
  uint64_t stream = 100;
  for (int head_dim : {16, 80, 128, 256, 512}) {
    for (int bits : {head_dim == 80 ? 2 : head_dim == 128 ? 3 : 4, head_dim == 80 ? 32 : 16}) {
      AttendCase c = small_case();
      c.head_dim = head_dim;
      c.rotary_pairs = head_dim / 2;
      c.v_bits = bits;
      c.window_dtype = bits == 16 ? DataType::kBFloat16 : DataType::kFloat32;
      c.cache_seqlens = {70};
      c.window_lens = {3};
      check("head_dim", c, stream += 10, nullptr);
    }
  }
}

// More rows than a tile has too: of the kernels for many rows none is used but for large heads.
TEST_P(AttendGathered, EveryGroupAndQueryLength) {
  uint64_t stream = 1000;
  for (int group : {1, 4, 8}) {
    for (int q_len : {1, 3}) {
      for (int bits : {4, 16}) {
        AttendCase c = small_case();
        c.group = group;
        c.q_len = q_len;
        c.v_bits = bits;
        c.dtype = c.window_dtype = DataType::kBFloat16;
        c.head_dim = 32;
        c.rotary_pairs = 16;
        c.cache_seqlens = {70};
        c.window_lens = {4};
        check("rows", c, stream += 10, nullptr);
      }
    }
  }
  AttendCase c = small_case();
  c.head_dim = 272;
  c.rotary_pairs = 136;
  c.v_bits = {3, 4};
  c.group = 9;
  c.bands = {{{4, 4, 0, 0}}};
  c.cache_seqlens = {70};
  c.window_lens = {1};
  check("rows", c, stream, nullptr);
}

TEST_P(AttendGathered, EveryRotation) {
  for (int half : {0, 1, 13, 32}) {
    AttendCase c = small_case();
    c.rotary_pairs = half;
    c.first_positions = {7, 200000};
    check("rotation", c, 2000 + half, nullptr);
  }
}

TEST_P(AttendGathered, EveryLengthAndCut) {
  for (int tokens : {0, 1, 63, 65, 300}) {
    AttendCase c = small_case();
    c.cache_seqlens = {tokens, 5, 0};
    c.window_lens = {1, 0, 65};
    const AttendTiling tiling = {1 + tokens % 2, 64, 2 + tokens % 3, 4};
    check("length", c, 3000 + tokens, &tiling);
  }
}

// Outliers are named by their places.
TEST_P(AttendGathered, OutliersHaveTheScoresOfTheirKeys) {
  uint64_t stream = 4000;
  for (int v_bits : {4, 32}) {
    for (int outliers : {1, 9, 90}) {
      AttendCase c = small_case();
      c.v_bits = v_bits;
      c.outliers = outliers;
      check("outliers", c, stream += 10, nullptr);
    }
  }
}

// Slots that the select stage could not choose make the answer NaN, of that head alone.
TEST_P(AttendGathered, BadSlotsAreSaid) {
  for (AttendCase c : testing::in_every_mode(small_case())) {
    for (int head_dim : {64, 272}) {
      c.head_dim = head_dim;
      AttendProblem problem(c, 5000);
      AttendParams p = testing::captured_params(problem);
      const int64_t room = p.keys.table_stride * kPageTokens;
      std::vector<int32_t> slots(p.token_slots, p.token_slots + 4 * room);
      std::fill_n(slots.begin() + room, room, kNoSlot);
      slots[room] = device::kBadSlot;
      p.token_slots = slots.data();
      const testing::AttendAnswer got = run(p, nullptr);
      const int64_t rows = device::query_rows(p);
      for (int64_t row = 0; row < 4 * rows; ++row)
        EXPECT_EQ(std::isnan(got.lse[row]), row / rows == 1) << row;
    }
  }
}

TEST_P(AttendGathered, SinksAreAnError) {
  AttendCase c = small_case();
  AttendProblem problem(c, 6000);
  AttendParams p = testing::captured_params(problem);
  p.keys.sink_tokens = 1;
  EXPECT_THROW(run(p, nullptr), Error);
}

SVDQ_KERNEL_TESTS(AttendGathered);

}  // namespace
}  // namespace svdq
