// Mistakes with barriers and warp operations, planted in small kernels and seen caught in every
// thread order; beside each the correct kernel, seen accepted.
#include "tests/kernels/checks.h"

namespace svdq::device {
namespace {

class ThreadChecks : public Checks {};

// --- barriers ---
TEST_P(ThreadChecks, BarrierInABranch) {
  const auto kernel = +[](int threads) {
    if (thread_index() < threads || !second()) sync_threads();
  };
  launch("right", shape_of(64), kernel, 64);
  expect_error("barrier divergence", shape_of(64), kernel, 63);
}

TEST_P(ThreadChecks, TwoBarriersForOne) {
  expect_error(
      "barrier divergence", shape_of(64),
      +[](int) {
        if (thread_index() < 32 && second()) {
          sync_threads();
        } else {
          sync_threads();
        }
      },
      0);
}

TEST_P(ThreadChecks, Deadlock) {
  expect_error(
      "deadlock", {2, 1, 1, 64, 0},
      +[](int) {
        if (thread_index() == 40 && second()) {
          sync_warp();
        } else {
          sync_threads();
        }
      },
      0);
}

// --- warp operations ---
TEST_P(ThreadChecks, ShuffleWithAbsentLanes) {
  const auto kernel = +[](int lanes) {
    if (lane_index() < lanes || !second()) shuffle_xor(lane_index(), 1);
  };
  launch("right", shape_of(32), kernel, 32);
  expect_error("which has exited", shape_of(32), kernel, 31);
  expect_error(
      "names lane 20, which has exited", {2, 1, 1, 20, 0},
      +[](int) {
        if (second()) shuffle(1, 0);
      },
      0);
}

TEST_P(ThreadChecks, ShuffleOutsideItsMask) {
  expect_error(
      "which its mask leaves out", shape_of(32),
      +[](int) {
        if (second()) shuffle(lane_index(), 0, 0x0000ffffu);
      },
      0);
  expect_error(
      "reads lane 16, which its mask leaves out", shape_of(32),
      +[](int) {
        if (second() && lane_index() < 16) shuffle(lane_index(), 16, 0x0000ffffu);
      },
      0);
}

TEST_P(ThreadChecks, OperationsThatDoNotMatch) {
  expect_error(
      " meets ", shape_of(32),
      +[](int) {
        if (second() && lane_index() < 4) {
          ballot(true);
        } else {
          shuffle(1, 0);
        }
      },
      0);
  // Some lanes wait for all, the others for half of them, and go.
  expect_error(
      "shuffle names lane", shape_of(32),
      +[](int) {
        if (second()) shuffle(1, lane_index(), lane_index() < 16 ? 0xffffffffu : 0xffff0000u);
      },
      0);
}

TEST_P(ThreadChecks, MmaNeedsTheWholeWarpInOnePlace) {
  expect_error(
      "which has exited", {2, 1, 1, 16, 0},
      +[](int) {
        float c[4] = {};
        if (second()) MmaHalf::run(c, {0, 0, 0, 0}, {0, 0});
      },
      0);
  expect_error(
      "executed by the warp together", shape_of(32),
      +[](int) {
        float c[4] = {};
        if (second() && lane_index() < 16) {
          MmaHalf::run(c, {0, 0, 0, 0}, {0, 0});
        } else {
          MmaHalf::run(c, {0, 0, 0, 0}, {0, 0});
        }
      },
      0);
}

// --- what the emulator counts ---
TEST_P(ThreadChecks, BankConflicts) {
  const auto kernel = +[](int stride) {
    Plan& s = shared_memory<Plan>();
    store(&s.words[thread_index() * stride % 256], own());
  };
  for (int stride : {1, 2, 4, 8}) {
    launch("stride", {1, 1, 1, 32, sizeof(Plan)}, kernel, stride);
    EXPECT_EQ(counters_.bank_conflicts(), stride - 1);
  }
  const auto wide = +[](int stride) {
    Plan& s = shared_memory<Plan>();
    store(reinterpret_cast<Words4*>(&s.words[thread_index() * stride % 256]), Words4{});
  };
  launch("wide", {1, 1, 1, 32, sizeof(Plan)}, wide, 4);
  EXPECT_EQ(counters_.bank_conflicts(), 0);
  launch("wide", {1, 1, 1, 32, sizeof(Plan)}, wide,
         8);  // of 8 lanes in a turn, two meet in each bank
  EXPECT_EQ(counters_.bank_conflicts(), 4);
}

TEST_P(ThreadChecks, Coalescing) {
  const DeviceArray<uint32_t> from(std::vector<uint32_t>(1024));
  const auto kernel =
      +[](const uint32_t* from, int stride) { load(&from[thread_index() * stride]); };
  launch("dense", {1, 1, 1, 64, 0}, kernel, from.data(), 1);
  ASSERT_EQ(counters_.sites.size(), 1u);
  EXPECT_EQ(counters_.sites[0].requests, 2);
  EXPECT_EQ(counters_.sites[0].bytes, 256);
  EXPECT_EQ(counters_.sites[0].transfers, 8);
  EXPECT_EQ(counters_.wasted_sectors(), 0);
  launch("strided", {1, 1, 1, 64, 0}, kernel, from.data(), 8);
  EXPECT_EQ(counters_.sites[0].transfers, 64);
  EXPECT_EQ(counters_.wasted_sectors(), 56);
}

SVDQ_KERNEL_TESTS(ThreadChecks);

}  // namespace
}  // namespace svdq::device
