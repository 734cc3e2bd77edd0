// The device layer of kernels/machine/device.cuh for g++: the same names, run by the emulator. Included
// before any kernel. Functions that reach memory or other threads remember where they were called.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "csrc/core/error.h"
#include "csrc/core/scalar.h"
#include "csrc/emulator/block.h"

#define SVDQ_EMULATED 1
#define SVDQ_DEVICE inline
#define SVDQ_KERNEL(threads) inline void
#define SVDQ_UNROLL
#define SVDQ_CALL_SITE , ::svdq::emulator::Site site = ::svdq::emulator::Site::current()
#define SVDQ_PASS_CALL_SITE , site
#define SVDQ_DEVICE_CHECK(condition)                                              \
  do {                                                                            \
    if (!(condition))                                                             \
      ::svdq::emulator::Block::current().fail("failed check: " #condition,        \
                                              ::svdq::emulator::Site::current()); \
  } while (false)

namespace svdq::device {

using emulator::Block;
using emulator::Site;

// --- who am I ---
inline int thread_index() { return Block::current().thread(); }
inline int lane_index() { return Block::current().lane(); }
inline int warp_index() { return thread_index() / 32; }
inline int block_x() { return Block::current().index().x; }
inline int block_y() { return Block::current().index().y; }
inline int block_z() { return Block::current().index().z; }
inline int grid_x() { return Block::current().launch().grid.x; }

// --- memory ---
template <typename T>
T load(const T* from, Site site = Site::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  Block::current().access(from, sizeof(T), sizeof(T), emulator::Access::kRead, site);
  return *from;
}

template <typename T>
void store(T* to, std::type_identity_t<T> value, Site site = Site::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  Block::current().access(to, sizeof(T), sizeof(T), emulator::Access::kWrite, site);
  *to = value;
}

template <typename Plan>
Plan& shared_memory(Site site = Site::current()) {
  static_assert(std::is_trivially_copyable_v<Plan> && alignof(Plan) <= 128);
  Block& block = Block::current();
  if (static_cast<int>(sizeof(Plan)) > block.launch().smem_bytes)
    block.fail("the launch gives less shared memory than the kernel's plan takes", site);
  return *reinterpret_cast<Plan*>(block.shared());
}

// Threads may add to the same count between two barriers, and nobody reads it there.
inline void add_shared(int* count, int by, Site site = Site::current()) {
  Block::current().add_shared(count, sizeof(int), site);
  *count += by;
}

// Blocks may run on several threads of the host.
inline int take_ticket(int* count, Site site = Site::current()) {
  Block::current().access(count, sizeof(int), sizeof(int), emulator::Access::kRead, site);
  return std::atomic_ref<int>(*count).fetch_add(1);
}

inline void copy_async(void* shared, const void* global, int bytes = 16,
                       Site site = Site::current()) {
  Block::current().copy_async(shared, global, bytes, site);
}
inline void commit_copies() { Block::current().commit_copies(); }
template <int kPendingGroups>
void wait_copies() {
  Block::current().wait_copies(kPendingGroups);
}

// --- other threads ---
inline void sync_threads(Site site = Site::current()) { Block::current().sync_threads(site); }

inline constexpr uint32_t kWarp = emulator::kAllLanes;

inline void sync_warp(uint32_t members = kWarp, Site site = Site::current()) {
  const emulator::WarpOperation operation{"sync_warp", members, [](void* const*) {}, false, true};
  Block::current().meet(operation, nullptr, site);
}

namespace detail {

// A value that lanes exchange; `source` is the lane each reads.
template <typename T>
struct Exchange {
  T value, result;
  int source;
  int error = -1;  // the source lane, if it takes no part
};

template <typename T>
T exchange(const char* name, T value, int source, uint32_t members, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  Exchange<T> own{value, value, source};
  const emulator::WarpOperation operation{
      name, members,
      [](void* const* operands) {
        for (int lane = 0; lane < emulator::kWarpLanes; ++lane) {
          auto* to = static_cast<Exchange<T>*>(operands[lane]);
          if (!to) continue;
          const auto* from = static_cast<const Exchange<T>*>(operands[to->source]);
          if (from) to->result = from->value;
          if (!from) to->error = to->source;
        }
      },
      false, false};
  Block::current().meet(operation, &own, site);
  if (own.error >= 0)
    Block::current().fail(join(name, " reads lane ", own.error, ", which its mask leaves out"),
                          site);
  return own.result;
}

struct Vote {
  bool predicate;
  uint32_t result;
};

}  // namespace detail

template <typename T>
T shuffle(T value, int lane, uint32_t members = kWarp, Site site = Site::current()) {
  return detail::exchange("shuffle", value, lane & 31, members, site);
}
template <typename T>
T shuffle_xor(T value, int mask, uint32_t members = kWarp, Site site = Site::current()) {
  return detail::exchange("shuffle_xor", value, (lane_index() ^ mask) & 31, members, site);
}
// Lanes from which there is none `delta` further keep their own value.
template <typename T>
T shuffle_down(T value, int delta, uint32_t members = kWarp, Site site = Site::current()) {
  const int lane = lane_index();
  return detail::exchange("shuffle_down", value, lane + delta < 32 ? lane + delta : lane, members,
                          site);
}

inline uint32_t ballot(bool predicate, uint32_t members = kWarp, Site site = Site::current()) {
  detail::Vote own{predicate, 0};
  const emulator::WarpOperation operation{
      "ballot", members,
      [](void* const* operands) {
        uint32_t result = 0;
        for (int lane = 0; lane < emulator::kWarpLanes; ++lane) {
          if (operands[lane] && static_cast<const detail::Vote*>(operands[lane])->predicate)
            result |= 1u << lane;
        }
        for (int lane = 0; lane < emulator::kWarpLanes; ++lane) {
          if (operands[lane]) static_cast<detail::Vote*>(operands[lane])->result = result;
        }
      },
      false, false};
  Block::current().meet(operation, &own, site);
  return own.result;
}

// --- numbers ---
inline int count_bits(uint32_t bits) { return std::popcount(bits); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float square_root(float x) { return std::sqrt(x); }
inline double round_double(double x) { return std::nearbyint(x); }
inline void sine_cosine(float x, float& sine, float& cosine) {
  sine = std::sin(x);
  cosine = std::cos(x);
}
inline int round_to_int(float x) { return static_cast<int>(std::nearbyintf(x)); }
inline float int_as_float(uint32_t bits) { return bits_to_float(bits); }
inline uint32_t float_as_int(float x) { return float_to_bits(x); }

namespace detail {
inline uint16_t narrow(float x, bool bfloat) {
  if (std::isnan(x)) return 0x7fff;
  return bfloat ? float_to_bfloat16(x) : float_to_half(x);
}
// A double holds the product of two halves and its sum with a third exactly enough to round once.
inline uint16_t half_fma(uint16_t a, uint16_t b, uint16_t c) {
  return std::bit_cast<uint16_t>(static_cast<_Float16>(
      double{half_to_float(a)} * double{half_to_float(b)} + double{half_to_float(c)}));
}
}  // namespace detail

inline float half_to_float(uint16_t bits) { return svdq::half_to_float(bits); }
inline float bfloat16_to_float(uint16_t bits) { return svdq::bfloat16_to_float(bits); }
inline uint16_t float_to_half(float x) { return detail::narrow(x, false); }
inline uint16_t float_to_bfloat16(float x) { return detail::narrow(x, true); }

inline uint32_t pack_half2(float low, float high) {
  return uint32_t{float_to_half(low)} | uint32_t{float_to_half(high)} << 16;
}
inline uint32_t pack_bfloat162(float low, float high) {
  return uint32_t{float_to_bfloat16(low)} | uint32_t{float_to_bfloat16(high)} << 16;
}

inline uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  const auto part = [&](int shift) {
    return uint32_t{detail::half_fma(static_cast<uint16_t>(a >> shift),
                                     static_cast<uint16_t>(b >> shift),
                                     static_cast<uint16_t>(c >> shift))}
           << shift;
  };
  return part(0) | part(16);
}

inline uint32_t half2_max(uint32_t a, uint32_t b) {
  const auto part = [&](int shift) {
    const auto x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    return uint32_t{half_to_float(x) > half_to_float(y) ? x : y} << shift;
  };
  return part(0) | part(16);
}

inline int dot4(uint32_t codes, uint32_t weights, int sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int>(codes >> (8 * i) & 0xff) * static_cast<int8_t>(weights >> (8 * i));
  }
  return sum;
}
inline void sine_cosine_fast(float x, float& sine, float& cosine) { sine_cosine(x, sine, cosine); }

// Bytes of {high, low} picked by the nibbles of `selector` (prmt).
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t all = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(all >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

}  // namespace svdq::device

#include "csrc/emulator/mma.h"
