// The attend kernels for many query rows against plain loops in double, over query lengths, groups,
// widths, head dims, lengths and cuts.
#include "tests/kernels/attend_test.h"

namespace svdq {
namespace {

using gpu::AttendTiling;
using testing::AttendCase;
using testing::AttendProblem;

class AttendTiles : public testing::AttendTest {
 protected:
  void check_planned(const char* what, const AttendCase& c, uint64_t stream) {
    check(what, c, stream, nullptr);
  }

  // 20 rows a KV head, halves everywhere, one head and one sequence.
  static AttendCase small_case(int q_len = 5, int group = 4) {
    AttendCase c;
    c.q_len = q_len;
    c.group = group;
    c.dtype = c.window_dtype = DataType::kFloat16;
    c.bands = {{{0, 8, 4, 8}}};
    c.cache_seqlens = {70};
    c.window_lens = {q_len + 3};
    return c;
  }
};

TEST_P(AttendTiles, EveryQueryLengthAndGroup) {
  std::vector<int> q_lens = {17, 40, 100};
  for (int q_len = 1; q_len <= 16; ++q_len) q_lens.push_back(q_len);
  for (int group : {1, 4, 7}) {
    for (int q_len : q_lens) {
      AttendCase c = small_case(q_len, group);
      c.head_dim = 32;
      c.rotary_pairs = 16;
      c.bands = {{{4, 0, 4, 8}}};
      launched_.clear();
      check_planned("q_len", c, 1000 * group + q_len);
      if (HasFatalFailure()) return;
#if defined(SVDQ_EMULATED)
      for (const char* name : {"attend_page_tiles", "attend_window_tiles"})
        EXPECT_EQ(launched_.count(name), q_len * group > 8) << name;
#endif
    }
  }
}

TEST_P(AttendTiles, EveryWidthAlone) {
  for (int w = 0; w < kNumWidths; ++w) {
    for (int count : {8, 40}) {
      AttendCase c = small_case();
      Bands bands{};
      bands.count[w] = count;
      c.bands = {bands};
      check_planned("one width", c, 10 * w + count);
    }
  }
}

TEST_P(AttendTiles, EveryHeadDim) {
  for (int head_dim : {16, 64, 80, 96, 128, 144, 256, 512}) {
    AttendCase c = small_case();
    c.dtype = c.window_dtype = DataType::kBFloat16;
    c.head_dim = head_dim;
    c.rotary_pairs = head_dim / 2;
    c.v_bits = {3, 2};
    c.bands = {{{4, 4, 0, 8}}, {{0, 8, 4, 0}}};
    check_planned("head_dim", c, 200 + head_dim);
  }
}

// As many rows as a block takes.
TEST_P(AttendTiles, FullBlocks) {
  for (int head_dim : {128, 256, 512}) {
    AttendCase c = small_case(9, 7);
    c.head_dim = head_dim;
    c.rotary_pairs = head_dim / 2;
    c.bands = {{{4, 0, 4, 0}}};
    c.cache_seqlens = {35};
    check_planned("full", c, 600 + head_dim);
  }
}

TEST_P(AttendTiles, EveryLength) {
  for (int tokens : {0, 1, 63, 64, 129}) {
    AttendCase c = small_case();
    c.cache_seqlens = {tokens, 5, 0};
    c.window_lens = {0, 64, 65};
    check_planned("length", c, 1000 + tokens);
  }
}

TEST_P(AttendTiles, EveryCut) {
  uint64_t stream = 3000;
  for (const AttendTiling& tiling : {AttendTiling{1, 64, 2, 2, 8}, AttendTiling{3, 128, 3, 4, 4},
                                     AttendTiling{9, 192, 4, 6, 2}, AttendTiling{2, 64, 3, 8, 1},
                                     AttendTiling{2, 64, 2, 1, 4}, AttendTiling{5, 256, 4, 8, 6}}) {
    AttendCase c = small_case(11, 7);
    c.head_dim = 32;
    c.rotary_pairs = 16;
    c.bands = {{{4, 0, 4, 8}}};
    c.cache_seqlens = {215};
    c.window_lens = {140};
    check("tiling", c, ++stream, &tiling);
  }
}

TEST_P(AttendTiles, EveryValueFormat) {
  uint64_t stream = 5000;
  for (DataType dtype : {DataType::kBFloat16, DataType::kFloat16, DataType::kFloat32}) {
    for (int bits : {2, 3, 4, dtype == DataType::kFloat32 ? 32 : 16}) {
      AttendCase c = small_case();
      c.dtype = c.window_dtype = dtype;
      c.v_bits = bits;
      check_planned("values", c, stream += 10);
    }
  }
  AttendCase mixed = small_case();
  mixed.bands = {{{0, 8, 4, 0}}, {{4, 4, 0, 0}}, {{0, 0, 8, 8}}};
  mixed.v_bits = {2, 4, 3};
  check_planned("bits by head", mixed, stream += 10);
}

// Queries that are not of the exact rows' dtype are not rounded to it.
TEST_P(AttendTiles, EveryMixOfDtypes) {
  constexpr DataType kTypes[] = {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16};
  for (DataType dtype : kTypes) {
    for (DataType exact : kTypes) {
      AttendCase c = small_case();
      c.dtype = dtype;
      c.window_dtype = exact;
      check_planned("dtypes", c, 6000 + 10 * static_cast<int>(dtype) + static_cast<int>(exact));
    }
  }
}

TEST_P(AttendTiles, SinksAreSkipped) {
  for (int sinks : {1, 64, 66, 70}) {
    AttendCase c = small_case();
    c.sink_tokens = sinks;
    check_planned("sinks", c, 7000 + sinks);
  }
}

TEST_P(AttendTiles, NotCausal) {
  for (int q_len : {5, 40}) {
    AttendCase c = small_case(q_len);
    c.causal = false;
    check_planned("not causal", c, 8000 + q_len);
  }
}

TEST_P(AttendTiles, EveryRotation) {
  for (int half : {0, 1, 13, 32}) {
    AttendCase c = small_case();
    c.rotary_pairs = half;
    c.cache_seqlens = {130, 70};
    c.window_lens = {9, 8};
    c.first_positions = {7, 200000};
    check_planned("rotation", c, 9000 + half);
  }
}

// Results do not depend on the order in which threads run.
TEST_P(AttendTiles, EveryOrderGivesTheSameBits) {
  const AttendCase c = small_case(40, 4);
  AttendProblem problem(c, 9950);
  const AttendParams p = testing::captured_params(problem);
  const testing::AttendAnswer once = run(p, nullptr), again = run(p, nullptr);
  EXPECT_EQ(once.out, again.out);
  EXPECT_EQ(once.lse, again.lse);
#if defined(SVDQ_EMULATED)
  emulator::Stream forward{emulator::Options{}};
  const testing::AttendAnswer other = testing::attend_on_device(p, nullptr, forward);
  EXPECT_EQ(once.out, other.out);
  EXPECT_EQ(once.lse, other.lse);
#endif
}

// CUDA gives 65535 blocks along y and z and 2^31 - 1 along x.
TEST_P(AttendTiles, LongQueriesFitTheGrid) {
  AttendCase c = small_case();
  AttendProblem problem(c, 9960);
  AttendParams p = testing::captured_params(problem);
  p.queries.length = 1 << 20;
  const gpu::DeviceLimits limits{132, 101376};
  using Scores = device::FoldedScores<64>;
  using Tiles = device::FoldedTiles<64>;
  const AttendTiling tiling = gpu::plan_tiling<gpu::FoldedScorers<64>>(p, limits);
  EXPECT_EQ(tiling.page_tiles, device::kMaxTiles<64>);
  EXPECT_EQ(tiling.window_tiles, device::kMaxTiles<64>);
  device::AttendWorkspace workspace{};
  workspace.row_tiles = static_cast<int>(device::query_rows(p) / device::kRowTile);
  workspace.page_tiles = workspace.window_tiles = device::kMaxTiles<64>;
  workspace.page_splits = workspace.window_splits = 2;
  workspace.page_warps = 1;
  for (const device::LaunchShape& shape :
       {device::prepare_launch<64>(p, {workspace.row_tiles, 0, 0}),
        device::attend_pages_launch<Scores>(p, workspace),
        device::attend_decode_launch<device::FoldedDecode<64>>(p, workspace),
        device::attend_page_tiles_launch<Tiles>(p, workspace),
        device::attend_window_launch<64>(p, workspace),
        device::attend_window_tiles_launch<64>(p, workspace)}) {
    EXPECT_LE(shape.grid_y, workspace.splits());
    EXPECT_GE(shape.grid_x, workspace.row_tiles / device::kMaxTiles<64>);
  }
}

SVDQ_KERNEL_TESTS(AttendTiles);

}  // namespace
}  // namespace svdq
