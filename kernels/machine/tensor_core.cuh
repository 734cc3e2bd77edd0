// Tensor-core and matrix-load instructions as nvcc compiles them, one struct each; device.cuh includes
// this file. Under emulation csrc/emulator/mma.h models them.
#pragma once

namespace svdq::device {

// c += a b with halves (mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32).
struct MmaHalf {
  SVDQ_DEVICE static void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

// c += a b with bfloat16s (mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32).
struct MmaBFloat16 {
  SVDQ_DEVICE static void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

// c += a b with unsigned a and signed b bytes (mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32).
struct MmaUnsignedSigned {
  SVDQ_DEVICE static void run(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

// Loads kMatrices (1, 2 or 4) 8 x 8 matrices of 16-bit elements; lane 8 m + r points to the 16
// bytes of row r of matrix m, register m gets matrix m
// (ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16).
template <int kMatrices, bool kTransposed = false>
struct LoadMatrix {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);

  SVDQ_DEVICE static void run(uint32_t (&to)[kMatrices], const void* row) {
    const uint32_t at = shared_address(row);
    if constexpr (kMatrices == 1 && !kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                   : "=r"(to[0])
                   : "r"(at)
                   : "memory");
    } else if constexpr (kMatrices == 1) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                   : "=r"(to[0])
                   : "r"(at)
                   : "memory");
    } else if constexpr (kMatrices == 2 && !kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                   : "=r"(to[0]), "=r"(to[1])
                   : "r"(at)
                   : "memory");
    } else if constexpr (kMatrices == 2) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                   : "=r"(to[0]), "=r"(to[1])
                   : "r"(at)
                   : "memory");
    } else if constexpr (!kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "r"(at)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "r"(at)
                   : "memory");
    }
  }
};

}  // namespace svdq::device
