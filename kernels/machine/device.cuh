// The thin layer between kernels and machine, and the only file that tells nvcc from the emulator.
// Under nvcc every function here is one instruction or intrinsic; under g++ csrc/emulator/shim.h, which
// must come first, provides the same names, those of tensor_core.cuh included.
//
//   SVDQ_KERNEL(threads), SVDQ_DEVICE          what a kernel, a device function starts with
//   thread_index, lane_index, warp_index, block_x/y/z, grid_x
//   load(p), store(p, v)                       every access to global or shared memory, to 16 bytes
//   shared_memory<Plan>()                      the block's dynamic shared memory as a plain struct
//   copy_async(shared, global, bytes)          cp.async of 16 bytes, from `bytes` on zeros
//   commit_copies(), wait_copies<N>()          close a group; wait until N groups are in flight
//   sync_threads, sync_warp, shuffle, shuffle_xor, shuffle_down, ballot, count_bits
//   add_shared(p, n)                           adds to a count in shared memory that others add to
//   take_ticket(p)                             counts the blocks that are done, see there
//   exp2_fast, log2_fast, reciprocal_fast, fused, square_root, sine_cosine, round_double, round_to_int
//   conversions of half and bfloat16, pack_half2, half2_fma, half2_max,
//   permute_bytes, dot4, sine_cosine_fast
//   SVDQ_DEVICE_CHECK(condition)               checked under emulation, nothing otherwise
//   SVDQ_CALL_SITE, SVDQ_PASS_CALL_SITE        last parameter and argument of a helper whose accesses the
//                                              emulator reports, and counts, where it is called
//
// Baseline: sm_80.
#pragma once

#include <cstdint>

#include "kernels/format.h"

#if !defined(__CUDACC__)

#if !defined(SVDQ_EMULATED)
#error "g++ compiles kernels under emulation only: include csrc/emulator/shim.h first"
#endif

#else  // nvcc

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SVDQ_DEVICE __device__ __forceinline__
// One block is enough for a multiprocessor: left to itself, ptxas spills a register or two to fit one
// block more.
#define SVDQ_KERNEL(threads) static __global__ void __launch_bounds__(threads, 1)
#define SVDQ_UNROLL _Pragma("unroll")
#define SVDQ_DEVICE_CHECK(condition) \
  do {                               \
  } while (false)
#define SVDQ_CALL_SITE
#define SVDQ_PASS_CALL_SITE

namespace svdq::device {

SVDQ_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SVDQ_DEVICE int lane_index() { return static_cast<int>(threadIdx.x % 32); }
SVDQ_DEVICE int warp_index() { return static_cast<int>(threadIdx.x / 32); }
SVDQ_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
SVDQ_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
SVDQ_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
SVDQ_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }

template <typename T>
struct Identity {
  using type = T;
};

// Structs of 16 bytes move as one vector.
template <typename T>
SVDQ_DEVICE T load(const T* from) {
  static_assert(sizeof(T) <= 16);
  if constexpr (sizeof(T) == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    T value;
    memcpy(&value, &bits, 16);
    return value;
  } else {
    return *from;
  }
}

template <typename T>
SVDQ_DEVICE void store(T* to, typename Identity<T>::type value) {
  static_assert(sizeof(T) <= 16);
  if constexpr (sizeof(T) == 16) {
    uint4 bits;
    memcpy(&bits, &value, 16);
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
    *to = value;
  }
}

template <typename Plan>
SVDQ_DEVICE Plan& shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<Plan*>(dynamic_shared_memory);
}

SVDQ_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// PTX ISA, "Data Movement and Conversion Instructions: cp.async"; .cg keeps L1 free of what is read
// once.
SVDQ_DEVICE void copy_async(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}
SVDQ_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPendingGroups>
SVDQ_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
}

SVDQ_DEVICE void sync_threads() { __syncthreads(); }

inline constexpr uint32_t kWarp = 0xffffffffu;
SVDQ_DEVICE void sync_warp(uint32_t members = kWarp) { __syncwarp(members); }
template <typename T>
SVDQ_DEVICE T shuffle(T value, int lane, uint32_t members = kWarp) {
  return __shfl_sync(members, value, lane);
}
template <typename T>
SVDQ_DEVICE T shuffle_xor(T value, int mask, uint32_t members = kWarp) {
  return __shfl_xor_sync(members, value, mask);
}
template <typename T>
SVDQ_DEVICE T shuffle_down(T value, int delta, uint32_t members = kWarp) {
  return __shfl_down_sync(members, value, delta);
}
SVDQ_DEVICE uint32_t ballot(bool predicate, uint32_t members = kWarp) {
  return __ballot_sync(members, predicate);
}

SVDQ_DEVICE void add_shared(int* count, int by) { atomicAdd(count, by); }

// Adds one to a count in global memory and returns what it was. What the block wrote before the barrier in front of
// this is seen by the block that takes a later ticket, behind a barrier that follows.
SVDQ_DEVICE int take_ticket(int* count) {
  __threadfence();
  const int before = atomicAdd(count, 1);
  __threadfence();
  return before;
}

SVDQ_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
SVDQ_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SVDQ_DEVICE float log2_fast(float x) { return __log2f(x); }
SVDQ_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// a * b + c rounded once, whatever the compiler would make of it.
SVDQ_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SVDQ_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
SVDQ_DEVICE double round_double(double x) { return rint(x); }
SVDQ_DEVICE void sine_cosine(float x, float& sine, float& cosine) { sincosf(x, &sine, &cosine); }
SVDQ_DEVICE int round_to_int(float x) { return __float2int_rn(x); }
SVDQ_DEVICE float int_as_float(uint32_t bits) { return __uint_as_float(bits); }
SVDQ_DEVICE uint32_t float_as_int(float x) { return __float_as_uint(x); }
SVDQ_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
SVDQ_DEVICE float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
SVDQ_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
SVDQ_DEVICE uint16_t float_to_bfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Two floats rounded to halves or bfloat16s in one register, the first in the low bits.
SVDQ_DEVICE uint32_t pack_half2(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
SVDQ_DEVICE uint32_t pack_bfloat162(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
// a * b + c of two pairs of halves.
SVDQ_DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// The larger ones of two pairs of halves.
SVDQ_DEVICE uint32_t half2_max(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
SVDQ_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}
// sum + the dot product of four unsigned and four signed bytes.
SVDQ_DEVICE int dot4(uint32_t codes, uint32_t weights, int sum) {
  int result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(codes), "r"(weights), "r"(sum));
  return result;
}
// Of an angle of at most pi; off by 2^-20.
SVDQ_DEVICE void sine_cosine_fast(float x, float& sine, float& cosine) {
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine) : "f"(x));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(cosine) : "f"(x));
}

}  // namespace svdq::device

#include "kernels/machine/tensor_core.cuh"

#endif

namespace svdq::device {

// The grid that a kernel is launched with; blocks are one-dimensional.
struct LaunchShape {
  int grid_x, grid_y, grid_z;
  int threads;
  int smem_bytes;
};

inline constexpr int kWarpSize = 32;

// 8 and 16 bytes that move in one access.
struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(8) Floats2 {
  float x, y;
};
struct alignas(16) Floats4 {
  float x[4];
};

}  // namespace svdq::device
