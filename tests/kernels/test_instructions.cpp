// Every function of the device layer and every tensor-core instruction against plain loops. Built
// by nvcc these tests compare the machine with the same expectations: emulation and device must
// agree.
#include "tests/kernels/device_test.h"

#include <cmath>
#include <random>

#include "csrc/core/scalar.h"
#include "kernels/machine/fragments.cuh"
#include "kernels/machine/numbers.cuh"

namespace svdq::device {
namespace {

using testing::DeviceArray;

class Instructions : public testing::KernelTest {};

// --- fragments: some points of the PTX ISA's figures, read off by hand ---
constexpr bool at(Coord place, int row, int col) { return place.row == row && place.col == col; }
static_assert(at(FragmentA16::coord(0, 0), 0, 0) && at(FragmentA16::coord(0, 7), 8, 9));
static_assert(at(FragmentA16::coord(31, 0), 7, 6) && at(FragmentA16::coord(31, 5), 7, 15));
static_assert(at(FragmentA16::coord(5, 2), 9, 2) && at(FragmentA16::coord(5, 6), 9, 10));
static_assert(at(FragmentB16::coord(0, 2), 8, 0) && at(FragmentB16::coord(31, 3), 15, 7));
static_assert(at(FragmentB16::coord(5, 1), 3, 1));
static_assert(at(FragmentA8::coord(0, 4), 8, 0) && at(FragmentA8::coord(0, 8), 0, 16));
static_assert(at(FragmentA8::coord(31, 15), 15, 31) && at(FragmentA8::coord(6, 3), 1, 11));
static_assert(at(FragmentB8::coord(0, 4), 16, 0) && at(FragmentB8::coord(31, 7), 31, 7));
static_assert(at(FragmentC::coord(0, 3), 8, 1) && at(FragmentC::coord(31, 2), 15, 6));
static_assert(at(FragmentMatrix::coord(9, 1), 2, 3) && at(FragmentMatrix::transposed(9, 1), 3, 2));

// Fills the registers of a fragment from a matrix in memory.
template <typename Fragment, typename T, int kRegisters>
SVDQ_DEVICE void fill(uint32_t (&registers)[kRegisters], const T* matrix) {
  for (int r = 0; r < kRegisters; ++r) registers[r] = 0;
  for (int i = 0; i < Fragment::kElements; ++i) {
    const Coord place = Fragment::coord(lane_index(), i);
    const uint32_t bits = load(&matrix[place.row * Fragment::kCols + place.col]);
    registers[i / Fragment::kPerRegister] |=
        bits << (i % Fragment::kPerRegister * (32 / Fragment::kPerRegister));
  }
}

template <typename Mma, typename A, typename B, typename T, typename Acc>
SVDQ_KERNEL(32)
mma_kernel(const T* a, const T* b, const Acc* c, Acc* d) {
  uint32_t ra[4], rb[2];
  Acc rc[4];
  fill<A>(ra, a);
  fill<B>(rb, b);
  for (int i = 0; i < 4; ++i) {
    const Coord place = FragmentC::coord(lane_index(), i);
    rc[i] = load(&c[place.row * 8 + place.col]);
  }
  Mma::run(rc, ra, rb);
  for (int i = 0; i < 4; ++i) {
    const Coord place = FragmentC::coord(lane_index(), i);
    store(&d[place.row * 8 + place.col], rc[i]);
  }
}

std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b,
                            const std::vector<double>& c, int k_size) {
  std::vector<double> d = c;
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      for (int k = 0; k < k_size; ++k) d[row * 8 + col] += a[row * k_size + k] * b[k * 8 + col];
    }
  }
  return d;
}

// Small whole numbers: every product and sum is exact, in any order, so results are equal.
std::vector<double> small_numbers(size_t count, int least, int most, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<double> numbers(count);
  for (double& x : numbers) x = std::uniform_int_distribution<int>(least, most)(random);
  return numbers;
}

template <typename T, typename Convert>
std::vector<T> convert(const std::vector<double>& numbers, const Convert& fn) {
  std::vector<T> result;
  for (double x : numbers) result.push_back(static_cast<T>(fn(x)));
  return result;
}

constexpr LaunchShape kOneWarp{1, 1, 1, 32, 0};

TEST_P(Instructions, MmaOfHalves) {
  const auto a = small_numbers(256, -8, 8, 1), b = small_numbers(128, -8, 8, 2),
             c = small_numbers(128, -50, 50, 3);
  const auto half = [](double x) { return svdq::float_to_half(static_cast<float>(x)); };
  const DeviceArray<uint16_t> da(convert<uint16_t>(a, half)), db(convert<uint16_t>(b, half));
  const DeviceArray<float> dc(convert<float>(c, [](double x) { return x; })), dd(128);
  launch("mma", kOneWarp, mma_kernel<MmaHalf, FragmentA16, FragmentB16, uint16_t, float>, da.data(),
         db.data(), dc.data(), dd.data());
  EXPECT_EQ(dd.read(), convert<float>(product(a, b, c, 16), [](double x) { return x; }));
}

TEST_P(Instructions, MmaOfBFloat16s) {
  const auto a = small_numbers(256, -8, 8, 4), b = small_numbers(128, -8, 8, 5),
             c = small_numbers(128, -50, 50, 6);
  const auto narrow = [](double x) { return svdq::float_to_bfloat16(static_cast<float>(x)); };
  const DeviceArray<uint16_t> da(convert<uint16_t>(a, narrow)), db(convert<uint16_t>(b, narrow));
  const DeviceArray<float> dc(convert<float>(c, [](double x) { return x; })), dd(128);
  launch("mma", kOneWarp, mma_kernel<MmaBFloat16, FragmentA16, FragmentB16, uint16_t, float>,
         da.data(), db.data(), dc.data(), dd.data());
  EXPECT_EQ(dd.read(), convert<float>(product(a, b, c, 16), [](double x) { return x; }));
}

TEST_P(Instructions, MmaOfBytes) {
  const auto a = small_numbers(512, 0, 255, 7), b = small_numbers(256, -128, 127, 8),
             c = small_numbers(128, -9999, 9999, 9);
  const auto byte = [](double x) { return static_cast<int>(x) & 0xff; };
  const DeviceArray<uint8_t> da(convert<uint8_t>(a, byte)), db(convert<uint8_t>(b, byte));
  const DeviceArray<int32_t> dc(convert<int32_t>(c, [](double x) { return x; })), dd(128);
  launch("mma", kOneWarp, mma_kernel<MmaUnsignedSigned, FragmentA8, FragmentB8, uint8_t, int32_t>,
         da.data(), db.data(), dc.data(), dd.data());
  EXPECT_EQ(dd.read(), convert<int32_t>(product(a, b, c, 32), [](double x) { return x; }));
}

// --- ldmatrix ---
struct MatrixPlan {
  alignas(16) uint16_t rows[32][8];
};

template <int kMatrices, bool kTransposed>
SVDQ_KERNEL(32)
load_matrix_kernel(const uint16_t* from, uint32_t* to) {
  MatrixPlan& s = shared_memory<MatrixPlan>();
  const int lane = lane_index();
  for (int i = 0; i < 8; ++i) store(&s.rows[lane][i], load(&from[lane * 8 + i]));
  sync_warp();
  uint32_t registers[kMatrices];
  LoadMatrix<kMatrices, kTransposed>::run(registers, s.rows[lane]);
  for (int m = 0; m < kMatrices; ++m) store(&to[m * 32 + lane], registers[m]);
}

TEST_P(Instructions, LoadMatrix) {
  std::vector<uint16_t> rows(256);
  for (int i = 0; i < 256; ++i) rows[i] = static_cast<uint16_t>(7 * i + 1);
  const DeviceArray<uint16_t> from(rows);
  const auto check = [&](auto kernel, int matrices, bool transposed) {
    const DeviceArray<uint32_t> to(static_cast<size_t>(matrices * 32));
    launch("load_matrix", {1, 1, 1, 32, sizeof(MatrixPlan)}, kernel, from.data(), to.data());
    const auto got = to.read();
    for (int m = 0; m < matrices; ++m) {
      for (int lane = 0; lane < 32; ++lane) {
        // Lane 4 g + t holds columns 2 t and 2 t + 1 of row g; transposed, rows 2 t and 2 t + 1 of
        // column g.
        const int g = lane / 4, t = lane % 4;
        const int low = transposed ? 2 * t * 8 + g : g * 8 + 2 * t,
                  high = low + (transposed ? 8 : 1);
        ASSERT_EQ(got[m * 32 + lane], rows[m * 64 + low] | uint32_t{rows[m * 64 + high]} << 16)
            << "matrix " << m << " lane " << lane << " of " << matrices
            << (transposed ? " transposed" : "");
      }
    }
  };
  check(load_matrix_kernel<1, false>, 1, false);
  check(load_matrix_kernel<2, false>, 2, false);
  check(load_matrix_kernel<4, false>, 4, false);
  check(load_matrix_kernel<1, true>, 1, true);
  check(load_matrix_kernel<2, true>, 2, true);
  check(load_matrix_kernel<4, true>, 4, true);
}

// --- warp operations ---
SVDQ_KERNEL(64) warp_kernel(int* out) {
  const int lane = lane_index(), thread = thread_index();
  int* own = out + thread * 6;
  store(&own[0], shuffle(thread * 10, (lane + 3) % 32));
  store(&own[1], shuffle_xor(thread * 10, 5));
  store(&own[2], shuffle_down(thread * 10, 7));
  store(&own[3], static_cast<int>(ballot(lane % 3 == 0)));
  // Two halves of a warp meet apart.
  const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  store(&own[4], shuffle_xor(thread, 15, half));
  store(&own[5], static_cast<int>(warp_sum(static_cast<float>(lane)) +
                                  warp_max(static_cast<float>(thread))));
}

TEST_P(Instructions, WarpOperations) {
  const DeviceArray<int> out(64 * 6);
  launch("warp", {1, 1, 1, 64, 0}, warp_kernel, out.data());
  const auto got = out.read();
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32, warp = thread - lane;
    const std::vector<int> expected = {(warp + (lane + 3) % 32) * 10,
                                       (warp + (lane ^ 5)) * 10,
                                       (lane + 7 < 32 ? thread + 7 : thread) * 10,
                                       0x49249249,
                                       warp + (lane ^ 15),
                                       496 + warp + 31};
    for (int i = 0; i < 6; ++i)
      ASSERT_EQ(got[thread * 6 + i], expected[i]) << "thread " << thread << " " << i;
  }
}

// --- asynchronous copies: two stages in flight, the last row short ---
struct CopyPlan {
  alignas(16) uint8_t stage[2][64][16];
};

SVDQ_KERNEL(64) copy_kernel(const uint8_t* from, int stages, int last_bytes, uint8_t* to) {
  CopyPlan& s = shared_memory<CopyPlan>();
  const int t = thread_index();
  const auto fetch = [&](int stage) {
    if (stage < stages) {
      const bool last = stage == stages - 1 && t == 63;
      copy_async(s.stage[stage % 2][t], from + (stage * 64 + t) * 16, last ? last_bytes : 16);
    }
    commit_copies();
  };
  fetch(0);
  for (int stage = 0; stage < stages; ++stage) {
    fetch(stage + 1);
    wait_copies<1>();
    sync_threads();
    // Another thread's copy, so that the barrier is needed.
    store(reinterpret_cast<Words4*>(to + (stage * 64 + t) * 16),
          load(reinterpret_cast<const Words4*>(s.stage[stage % 2][63 - t])));
    sync_threads();
  }
  wait_copies<0>();
}

TEST_P(Instructions, AsynchronousCopies) {
  constexpr int kStages = 5;
  for (int last_bytes : {0, 4, 16}) {
    std::vector<uint8_t> bytes(kStages * 1024 - 16 + last_bytes);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 31 + i / 256);
    const DeviceArray<uint8_t> from(bytes), to(kStages * 1024);
    launch("copy", {1, 1, 1, 64, sizeof(CopyPlan)}, copy_kernel, from.data(), kStages, last_bytes,
           to.data());
    const auto got = to.read();
    bytes.resize(kStages * 1024);
    for (int row = 0; row < kStages * 64; ++row) {
      for (int i = 0; i < 16; ++i) {
        const int source = row / 64 * 64 + 63 - row % 64;
        ASSERT_EQ(got[row * 16 + i], bytes[source * 16 + i]) << "row " << row << " byte " << i;
      }
    }
  }
}

SVDQ_KERNEL(32) grid_kernel(int* out) {
  const int index = (block_z() * 3 + block_y()) * grid_x() + block_x();
  store(&out[index * 32 + lane_index()],
        block_x() + 10 * block_y() + 100 * block_z() + 1000 * warp_index());
}

TEST_P(Instructions, Grid) {
  const DeviceArray<int> out(4 * 3 * 2 * 32);
  launch("grid", {4, 3, 2, 32, 0}, grid_kernel, out.data());
  const auto got = out.read();
  for (size_t i = 0; i < got.size(); ++i) {
    const int block = static_cast<int>(i) / 32;
    ASSERT_EQ(got[i], block % 4 + 10 * (block / 4 % 3) + 100 * (block / 12)) << i;
  }
}

SVDQ_KERNEL_TESTS(Instructions);

}  // namespace
}  // namespace svdq::device
