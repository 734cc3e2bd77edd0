// Tensor-core and matrix-load instructions, one struct each, and the fragment maps that say which
// lane holds which element. The maps are transcribed from the PTX ISA ("Matrix Fragments for
// mma.m16n8k16", "... mma.m16n8k32", "ldmatrix"); the emulated instructions are written with them.
#pragma once

#include "kernels/machine/device.cuh"

namespace svdq::device {

struct Coord {
  int row, col;
};

// A [16, 16] of 16-bit elements: 8 a lane, two in each of 4 registers.
struct FragmentA16 {
  static constexpr int kRows = 16, kCols = 16, kElements = 8, kPerRegister = 2;
  SVDQ_HOST_DEVICE static constexpr Coord place(int lane, int i) {
    return {lane / 4 + (i & 2 ? 8 : 0), lane % 4 * 2 + (i & 1) + (i & 4 ? 8 : 0)};
  }
};

// B [16, 8] of 16-bit elements: 4 a lane in 2 registers.
struct FragmentB16 {
  static constexpr int kRows = 16, kCols = 8, kElements = 4, kPerRegister = 2;
  SVDQ_HOST_DEVICE static constexpr Coord place(int lane, int i) {
    return {lane % 4 * 2 + (i & 1) + (i & 2 ? 8 : 0), lane / 4};
  }
};

// A [16, 32] of 8-bit elements: 16 a lane, four in each of 4 registers.
struct FragmentA8 {
  static constexpr int kRows = 16, kCols = 32, kElements = 16, kPerRegister = 4;
  SVDQ_HOST_DEVICE static constexpr Coord place(int lane, int i) {
    return {lane / 4 + (i & 4 ? 8 : 0), lane % 4 * 4 + (i & 3) + (i & 8 ? 16 : 0)};
  }
};

// B [32, 8] of 8-bit elements: 8 a lane in 2 registers.
struct FragmentB8 {
  static constexpr int kRows = 32, kCols = 8, kElements = 8, kPerRegister = 4;
  SVDQ_HOST_DEVICE static constexpr Coord place(int lane, int i) {
    return {lane % 4 * 4 + (i & 3) + (i & 4 ? 16 : 0), lane / 4};
  }
};

// C and D [16, 8] of 32-bit elements: 4 a lane, for both instruction shapes.
struct FragmentC {
  static constexpr int kRows = 16, kCols = 8, kElements = 4, kPerRegister = 1;
  SVDQ_HOST_DEVICE static constexpr Coord place(int lane, int i) {
    return {lane / 4 + (i & 2 ? 8 : 0), lane % 4 * 2 + (i & 1)};
  }
};

// One 8 x 8 matrix of 16-bit elements as ldmatrix hands it out: 2 elements a lane.
struct FragmentMatrix {
  static constexpr int kRows = 8, kCols = 8, kElements = 2, kPerRegister = 2;
  SVDQ_HOST_DEVICE static constexpr Coord place(int lane, int i) {
    return {lane / 4, lane % 4 * 2 + i};
  }
  SVDQ_HOST_DEVICE static constexpr Coord transposed(int lane, int i) {
    return {lane % 4 * 2 + i, lane / 4};
  }
};

#if defined(SVDQ_EMULATED)

namespace detail {

template <typename Acc>
struct MmaOperand {
  const uint32_t* a;
  const uint32_t* b;
  Acc* c;
};

// Puts the lanes' registers in the places of a matrix; decode(bits) makes a number of an element.
template <typename Fragment, typename Number, typename Decode>
void gather(Number (&matrix)[Fragment::kRows][Fragment::kCols], int lane, const uint32_t* registers,
            const Decode& decode) {
  constexpr int kBits = 32 / Fragment::kPerRegister;
  for (int i = 0; i < Fragment::kElements; ++i) {
    const Coord at = Fragment::place(lane, i);
    matrix[at.row][at.col] =
        decode(registers[i / Fragment::kPerRegister] >> (i % Fragment::kPerRegister * kBits));
  }
}

// D = A B + C of a warp: products of k ascending, each added with one rounding.
template <typename A, typename B, typename Number, typename Acc, typename DecodeA, typename DecodeB>
void multiply(void* const* operands, const DecodeA& decode_a, const DecodeB& decode_b) {
  Number a[A::kRows][A::kCols], b[B::kRows][B::kCols];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto* own = static_cast<const MmaOperand<Acc>*>(operands[lane]);
    gather<A>(a, lane, own->a, decode_a);
    gather<B>(b, lane, own->b, decode_b);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    Acc* c = static_cast<const MmaOperand<Acc>*>(operands[lane])->c;
    for (int i = 0; i < FragmentC::kElements; ++i) {
      const Coord at = FragmentC::place(lane, i);
      for (int k = 0; k < A::kCols; ++k) {
        if constexpr (std::is_same_v<Acc, float>) {
          c[i] = std::fma(a[at.row][k], b[k][at.col], c[i]);
        } else {
          c[i] += a[at.row][k] * b[k][at.col];
        }
      }
    }
  }
}

template <typename Acc>
void warp_mma(const char* name, void (*combine)(void* const*), Acc* c, const uint32_t* a,
              const uint32_t* b, Site site) {
  MmaOperand<Acc> own{a, b, c};
  const emulator::WarpOperation operation{name, kWarp, combine, true, false};
  Block::current().meet(operation, &own, site);
}

struct RowOperand {
  const void* row;
  uint32_t* registers;
  Site site;
};

template <int kMatrices, bool kTransposed>
void load_rows(void* const* operands) {
  for (int m = 0; m < kMatrices; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      const auto* from = static_cast<const RowOperand*>(operands[m * 8 + r]);
      Block::current().read_row(from->row, sizeof(matrix[r]), m * 8 + r, from->site);
      std::memcpy(matrix[r], from->row, sizeof(matrix[r]));
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      uint32_t bits = 0;
      for (int i = 0; i < 2; ++i) {
        const Coord at =
            kTransposed ? FragmentMatrix::transposed(lane, i) : FragmentMatrix::place(lane, i);
        bits |= uint32_t{matrix[at.row][at.col]} << (16 * i);
      }
      static_cast<const RowOperand*>(operands[lane])->registers[m] = bits;
    }
  }
}

}  // namespace detail

// A last parameter and argument for what shall be reported, and counted, where it is called.
#define SVDQ_EMU_SITE , Site site = Site::current()
#define SVDQ_EMU_PASS_SITE , site
#else
#define SVDQ_EMU_SITE
#define SVDQ_EMU_PASS_SITE
#endif

// c += a b with halves (mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32).
struct MmaHalf {
  SVDQ_DEVICE static void run(float (&c)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2] SVDQ_EMU_SITE) {
#if defined(SVDQ_EMULATED)
    const auto combine = [](void* const* operands) {
      const auto decode = [](uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); };
      detail::multiply<FragmentA16, FragmentB16, float, float>(operands, decode, decode);
    };
    detail::warp_mma<float>("mma f16", combine, c, a, b, site);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

// c += a b with bfloat16s (mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32).
struct MmaBFloat16 {
  SVDQ_DEVICE static void run(float (&c)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2] SVDQ_EMU_SITE) {
#if defined(SVDQ_EMULATED)
    const auto combine = [](void* const* operands) {
      const auto decode = [](uint32_t bits) {
        return bfloat16_to_float(static_cast<uint16_t>(bits));
      };
      detail::multiply<FragmentA16, FragmentB16, float, float>(operands, decode, decode);
    };
    detail::warp_mma<float>("mma bf16", combine, c, a, b, site);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

// c += a b with unsigned a and signed b bytes (mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32).
struct MmaUnsignedSigned {
  SVDQ_DEVICE static void run(int32_t (&c)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2] SVDQ_EMU_SITE) {
#if defined(SVDQ_EMULATED)
    const auto combine = [](void* const* operands) {
      detail::multiply<FragmentA8, FragmentB8, int32_t, int32_t>(
          operands, [](uint32_t bits) { return static_cast<int32_t>(bits & 0xff); },
          [](uint32_t bits) { return int32_t{static_cast<int8_t>(bits)}; });
    };
    detail::warp_mma<int32_t>("mma u8 s8", combine, c, a, b, site);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

// Loads kMatrices (1, 2 or 4) 8 x 8 matrices of 16-bit elements; lane 8 m + r points to the 16
// bytes of row r of matrix m, register m gets matrix m
// (ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16).
template <int kMatrices, bool kTransposed = false>
struct LoadMatrix {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);

  SVDQ_DEVICE static void run(uint32_t (&to)[kMatrices], const void* row SVDQ_EMU_SITE) {
#if defined(SVDQ_EMULATED)
    detail::RowOperand own{row, to, site};
    const emulator::WarpOperation operation{"ldmatrix", kWarp,
                                            detail::load_rows<kMatrices, kTransposed>, true, false};
    Block::current().meet(operation, &own, site);
#else
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
#endif
  }
};

// Sum and maximum over the lanes of a warp; every lane gets it.
SVDQ_DEVICE float warp_sum(float x) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

SVDQ_DEVICE float warp_max(float x) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace svdq::device
