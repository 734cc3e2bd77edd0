// Models of the tensor-core and matrix-load instructions of kernels/machine/tensor_core.cuh: all lanes of
// a warp meet, their registers become matrices by the fragment maps, and plain loops multiply them. The
// last parameter of each is the source line that is reported and counted. Included by shim.h.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "csrc/core/scalar.h"
#include "csrc/emulator/block.h"
#include "kernels/machine/fragments.cuh"

namespace svdq::device {

inline constexpr int kMmaLanes = 32;

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
    const Coord at = Fragment::coord(lane, i);
    matrix[at.row][at.col] =
        decode(registers[i / Fragment::kPerRegister] >> (i % Fragment::kPerRegister * kBits));
  }
}

// D = A B + C of a warp: products of k ascending, each added with one rounding.
template <typename A, typename B, typename Number, typename Acc, typename DecodeA, typename DecodeB>
void multiply(void* const* operands, const DecodeA& decode_a, const DecodeB& decode_b) {
  Number a[A::kRows][A::kCols], b[B::kRows][B::kCols];
  for (int lane = 0; lane < kMmaLanes; ++lane) {
    const auto* own = static_cast<const MmaOperand<Acc>*>(operands[lane]);
    gather<A>(a, lane, own->a, decode_a);
    gather<B>(b, lane, own->b, decode_b);
  }
  for (int lane = 0; lane < kMmaLanes; ++lane) {
    Acc* c = static_cast<const MmaOperand<Acc>*>(operands[lane])->c;
    for (int i = 0; i < FragmentC::kElements; ++i) {
      const Coord at = FragmentC::coord(lane, i);
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
    for (int lane = 0; lane < kMmaLanes; ++lane) {
      uint32_t bits = 0;
      for (int i = 0; i < 2; ++i) {
        const Coord at =
            kTransposed ? FragmentMatrix::transposed(lane, i) : FragmentMatrix::coord(lane, i);
        bits |= uint32_t{matrix[at.row][at.col]} << (16 * i);
      }
      static_cast<const RowOperand*>(operands[lane])->registers[m] = bits;
    }
  }
}

}  // namespace detail

// c += a b with halves (mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32).
struct MmaHalf {
  static void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::current()) {
    const auto combine = [](void* const* operands) {
      const auto decode = [](uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); };
      detail::multiply<FragmentA16, FragmentB16, float, float>(operands, decode, decode);
    };
    detail::warp_mma<float>("mma f16", combine, c, a, b, site);
  }
};

// c += a b with bfloat16s (mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32).
struct MmaBFloat16 {
  static void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::current()) {
    const auto combine = [](void* const* operands) {
      const auto decode = [](uint32_t bits) {
        return bfloat16_to_float(static_cast<uint16_t>(bits));
      };
      detail::multiply<FragmentA16, FragmentB16, float, float>(operands, decode, decode);
    };
    detail::warp_mma<float>("mma bf16", combine, c, a, b, site);
  }
};

// c += a b with unsigned a and signed b bytes (mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32).
struct MmaUnsignedSigned {
  static void run(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::current()) {
    const auto combine = [](void* const* operands) {
      detail::multiply<FragmentA8, FragmentB8, int32_t, int32_t>(
          operands, [](uint32_t bits) { return static_cast<int32_t>(bits & 0xff); },
          [](uint32_t bits) { return int32_t{static_cast<int8_t>(bits)}; });
    };
    detail::warp_mma<int32_t>("mma u8 s8", combine, c, a, b, site);
  }
};

// Loads kMatrices (1, 2 or 4) 8 x 8 matrices of 16-bit elements; lane 8 m + r points to the 16
// bytes of row r of matrix m, register m gets matrix m
// (ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16).
template <int kMatrices, bool kTransposed = false>
struct LoadMatrix {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);

  static void run(uint32_t (&to)[kMatrices], const void* row, Site site = Site::current()) {
    detail::RowOperand own{row, to, site};
    const emulator::WarpOperation operation{"ldmatrix", kWarp,
                                            detail::load_rows<kMatrices, kTransposed>, true, false};
    Block::current().meet(operation, &own, site);
  }
};

}  // namespace svdq::device
