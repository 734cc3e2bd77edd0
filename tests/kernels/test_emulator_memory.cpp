// Mistakes with memory, planted in small kernels and seen caught in every thread order;
// beside each the correct kernel, seen accepted.
#include "tests/kernels/checks.h"

namespace svdq::device {
namespace {

class MemoryChecks : public Checks {};

// --- memory ---
TEST_P(MemoryChecks, GlobalOutOfBounds) {
  const auto kernel = +[](const uint32_t* from, uint32_t* to, int excess) {
    const int t = thread_index();
    const uint32_t value = load(&from[t + (second() ? excess : 0)]);
    if (block_x() == 0) store(&to[t], value);
  };
  const DeviceArray<uint32_t> from(std::vector<uint32_t>(64)), to(64);
  launch("right", shape_of(64), kernel, from.data(), to.data(), 0);
  expect_error("0 bytes after the end of a buffer of 256 bytes", shape_of(64), kernel, from.data(),
               to.data(), 1);
  expect_error("out of bounds", shape_of(64), kernel, from.data(), to.data(), -1);
  expect_error("out of bounds", shape_of(64), kernel, from.data(), to.data(), 1 << 20);
  uint32_t unknown[64];
  expect_error(
      "no buffer at this address", shape_of(64),
      +[](uint32_t* to) {
        if (second()) store(&to[thread_index()], 1);
      },
      unknown);
}

TEST_P(MemoryChecks, VectorReachesPastTheEnd) {
  const DeviceArray<uint32_t> from(std::vector<uint32_t>(6));
  expect_error(
      "bytes 16 to 32 of a buffer of 24 bytes", shape_of(1),
      +[](const uint32_t* from) {
        if (second()) load(reinterpret_cast<const Words4*>(from + 4));
      },
      from.data());
}

TEST_P(MemoryChecks, RedZone) {
  // A write that goes round the accessors.
  const DeviceArray<uint32_t> to(4);
  const auto kernel = +[](uint32_t* to, int at) { to[at] = own(); };
  launch("right", shape_of(1), kernel, to.data(), 3);
  expect_error("past a buffer of", shape_of(1), kernel, to.data(), 4);
  to.data()[4] = 0xb5b5b5b5u;
}

TEST_P(MemoryChecks, GlobalUnwritten) {
  const auto kernel = +[](uint32_t* workspace, int written) {
    const int t = thread_index();
    if (t < written) store(&workspace[t], own());
    sync_threads();
    if (second()) store(&workspace[32 + t], load(&workspace[t]));
  };
  const DeviceArray<uint32_t> right(64), wrong(64);
  launch("right", shape_of(32), kernel, right.data(), 32);
  expect_error("nobody wrote byte 124", shape_of(32), kernel, wrong.data(), 31);
}

TEST_P(MemoryChecks, Misaligned) {
  const DeviceArray<uint32_t> from(std::vector<uint32_t>(64));
  const auto global = +[](const uint32_t* from, int shift) {
    if (second()) load(reinterpret_cast<const Words4*>(from + 4 * thread_index() + shift));
  };
  launch("right", shape_of(8), global, from.data(), 4);
  expect_error("misaligned: 16 bytes", shape_of(8), global, from.data(), 2);
  const auto shared = +[](int shift) {
    Plan& s = shared_memory<Plan>();
    store(reinterpret_cast<Words4*>(&s.words[4 * thread_index() + (second() ? shift : 0)]),
          Words4{});
  };
  launch("right", shape_of(8), shared, 0);
  expect_error("misaligned: 16 bytes at byte", shape_of(8), shared, 1);
}

TEST_P(MemoryChecks, SharedOutOfBounds) {
  const auto kernel = +[](int at) {
    Plan& s = shared_memory<Plan>();
    if (second()) store(s.words + at, 1);
  };
  launch("right", shape_of(1), kernel, 255);
  expect_error("bytes 1024 to 1028 of 1024 bytes of shared memory", shape_of(1), kernel, 256);
  expect_error(
      "gives less shared memory", {2, 1, 1, 1, 512},
      +[](int) {
        if (second()) shared_memory<Plan>();
      },
      0);
  EXPECT_THROW(launch("too much", {1, 1, 1, 1, 300000}, kernel, 0), Error);
}

TEST_P(MemoryChecks, SharedUnwritten) {
  const auto kernel = +[](int written) {
    Plan& s = shared_memory<Plan>();
    const int t = thread_index();
    if (t < written || !second()) store(&s.words[t], own());
    sync_threads();
    load(&s.words[63 - t]);
  };
  launch("right", shape_of(64), kernel, 64);
  expect_error("unwritten", shape_of(64), kernel, 63);
}

// --- races ---
// Thread t writes word t, then reads word `t + distance`.
template <bool kBlockBarrier, bool kWarpBarrier>
void exchange_kernel(int distance) {
  Plan& s = shared_memory<Plan>();
  const int t = thread_index();
  store(&s.words[t], own());
  if (kBlockBarrier || !second()) sync_threads();
  if (kWarpBarrier) sync_warp();
  load(&s.words[(t + distance) % 64]);
}

TEST_P(MemoryChecks, MissingBarrier) {
  launch("right", shape_of(64), exchange_kernel<true, false>, 32);
  launch("right", shape_of(64), exchange_kernel<false, true>, 0);
  // By order of the threads it shows as a race or as a read of nothing.
  const char* what = "of shared memory";
  expect_error(what, shape_of(64), exchange_kernel<false, false>, 32);
  expect_error(what, shape_of(64), exchange_kernel<false, true>,
               32);  // a warp's barrier is not enough
}

TEST_P(MemoryChecks, RaceBetweenWarps) {
  // Everything was written before, so that only order is wrong.
  const auto kernel = +[](int distance, bool barrier) {
    Plan& s = shared_memory<Plan>();
    const int t = thread_index();
    store(&s.words[t], own());
    sync_threads();
    load(&s.words[(t + distance) % 64]);
    if (barrier || !second()) sync_threads();
    store(&s.words[t], 2 * own());
  };
  launch("right", shape_of(64), kernel, 32, true);
  expect_error("race on byte", shape_of(64), kernel, 32, false);
  expect_error("of another warp without a barrier", shape_of(64), kernel, 32, false);
}

TEST_P(MemoryChecks, TwoWritersRace) {
  expect_error(
      "race on byte 0", shape_of(64),
      +[](int) {
        Plan& s = shared_memory<Plan>();
        if (thread_index() % 32 == 0 && (second() || thread_index() == 0))
          store(&s.words[0], own());
      },
      0);
  expect_error(
      "of the same warp without a __syncwarp", shape_of(32),
      +[](int) {
        Plan& s = shared_memory<Plan>();
        if (second() || thread_index() == 0) store(&s.words[0], 1);
      },
      0);
}

// Additions come in any order, and nobody may look at a count before a barrier.
TEST_P(MemoryChecks, AdditionsToSharedMemory) {
  const auto kernel = +[](int reader, int writer) {
    int* count = reinterpret_cast<int*>(shared_memory<Plan>().words);
    if (thread_index() == 0) store(count, 0);
    sync_threads();
    if (second() && thread_index() == writer) {
      store(count, 7);
    } else {
      add_shared(count, 2);
    }
    if (second() && thread_index() == reader) load(count);
    sync_threads();
    SVDQ_DEVICE_CHECK(load(count) == 128);
  };
  launch("right", shape_of(64), kernel, -1, -1);
  expect_error("race on byte 0", shape_of(64), kernel, 40, -1);
  expect_error("race on byte 0", shape_of(64), kernel, -1, 40);
  expect_error(
      "unwritten", shape_of(64),
      +[](int) {
        if (second()) add_shared(reinterpret_cast<int*>(shared_memory<Plan>().words), 1);
      },
      0);
}

TEST_P(MemoryChecks, RaceInsideAWarp) {
  const auto kernel = +[](bool sync, uint32_t half) {
    Plan& s = shared_memory<Plan>();
    const int lane = lane_index();
    store(&s.words[lane], own());
    sync_warp();
    load(&s.words[lane ^ 1]);
    const uint32_t members = lane < 16 ? half : ~half;
    if (sync || !second()) sync_warp(members);
    store(&s.words[lane], 2 * own());
  };
  launch("right", shape_of(32), kernel, true, 0x0000ffffu);  // halves that exchange nothing
  expect_error("of the same warp without a __syncwarp", shape_of(32), kernel, false, 0x0000ffffu);
}

TEST_P(MemoryChecks, HalfWarpBarrierDoesNotOrderTheOtherHalf) {
  const auto kernel = +[](int distance) {
    Plan& s = shared_memory<Plan>();
    const int lane = lane_index();
    store(&s.words[lane], own());
    sync_warp();
    load(&s.words[(lane + (second() ? distance : 0)) % 32 / 16 * 16 + lane % 16]);
    sync_warp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
    store(&s.words[lane], 2 * own());
  };
  launch("right", shape_of(32), kernel, 0);
  expect_error("of the same warp without a __syncwarp", shape_of(32), kernel, 16);
}

// --- matrix loads ---
TEST_P(MemoryChecks, MatrixRow) {
  const auto kernel = +[](int shift, bool written) {
    Plan& s = shared_memory<Plan>();
    const int lane = lane_index();
    for (int i = 0; i < 8; ++i) {
      if (written || !second()) store(&s.words[lane * 8 + i], own());
    }
    sync_warp();
    uint32_t registers[4];
    LoadMatrix<4>::run(registers, &s.words[lane * 4 + (second() ? shift : 0)]);
  };
  launch("right", shape_of(32), kernel, 0, true);
  expect_error("misaligned", shape_of(32), kernel, 1, true);
  expect_error("unwritten", shape_of(32), kernel, 0, false);
  expect_error("out of bounds", shape_of(32), kernel, 252, true);
  const DeviceArray<uint32_t> global(std::vector<uint32_t>(256));
  expect_error(
      "not in shared memory", shape_of(32),
      +[](const uint32_t* global) {
        uint32_t registers[1];
        if (second()) LoadMatrix<1>::run(registers, global);
      },
      global.data());
}

// --- asynchronous copies ---
// Copies one vector a thread; what is left out is said by `mistake`.
enum Mistake { kNone, kNoWait, kNoCommit, kNoBarrier, kNeverWaited, kOverwrites, kWaitsTooLate };
void copy_kernel(const uint32_t* from, int mistake) {
  Plan& s = shared_memory<Plan>();
  const int t = thread_index();
  const int wrong = second() ? mistake : int{kNone};
  copy_async(&s.words[4 * t], from + 4 * t);
  if (wrong != kNoCommit) commit_copies();
  if (wrong == kNeverWaited) return;
  if (wrong == kOverwrites) store(&s.words[4 * t], 1);
  if (wrong == kWaitsTooLate) {
    wait_copies<1>();
  } else if (wrong != kNoWait) {
    wait_copies<0>();
  }
  if (wrong != kNoBarrier) sync_threads();
  load(&s.words[4 * ((t + 32) % 64)]);
  wait_copies<0>();
}

TEST_P(MemoryChecks, AsynchronousCopy) {
  const DeviceArray<uint32_t> from(std::vector<uint32_t>(256));
  launch("right", shape_of(64), copy_kernel, from.data(), kNone);
  for (int mistake : {kNoWait, kNoCommit, kOverwrites, kWaitsTooLate})
    expect_error("copy in flight", shape_of(64), copy_kernel, from.data(), mistake);
  // By order, the neighbour's bytes are in flight or waited for.
  expect_error("of shared memory", shape_of(64), copy_kernel, from.data(), kNoBarrier);
  expect_error("ends while its asynchronous copies are in flight", shape_of(64), copy_kernel,
               from.data(), kNeverWaited);
  expect_error(
      "misaligned", shape_of(1),
      +[](const uint32_t* from) {
        Plan& s = shared_memory<Plan>();
        if (second()) copy_async(&s.words[0], from + 1);
      },
      from.data());
  expect_error(
      "out of bounds", shape_of(64),
      +[](const uint32_t* from) {
        Plan& s = shared_memory<Plan>();
        if (second()) copy_async(&s.words[4 * thread_index()], from + 4, 16);
      },
      from.data() + 252);
  expect_error(
      "not shared memory", shape_of(1),
      +[](uint32_t* from) {
        if (second()) copy_async(from, from, 16);
      },
      from.data());
}

TEST_P(MemoryChecks, DeviceCheck) {
  expect_error(
      "failed check: thread_index() < 3", shape_of(4),
      +[](int) {
        if (second()) SVDQ_DEVICE_CHECK(thread_index() < 3);
      },
      0);
}

SVDQ_KERNEL_TESTS(MemoryChecks);

}  // namespace
}  // namespace svdq::device
