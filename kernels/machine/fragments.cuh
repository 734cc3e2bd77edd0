// Fragment maps of the tensor-core instructions: the row and column of each element that a lane holds,
// transcribed from the PTX ISA ("Matrix Fragments for mma.m16n8k16", "... mma.m16n8k32", "ldmatrix").
// Kernels lay operands out by them, and the emulator's models of the instructions are written with them.
#pragma once

#include "kernels/format.h"

namespace svdq::device {

struct Coord {
  int row, col;
};

// A [16, 16] of 16-bit elements: 8 a lane, two in each of 4 registers.
struct FragmentA16 {
  static constexpr int kRows = 16, kCols = 16, kElements = 8, kPerRegister = 2;
  SVDQ_HOST_DEVICE static constexpr Coord coord(int lane, int i) {
    return {lane / 4 + (i & 2 ? 8 : 0), lane % 4 * 2 + (i & 1) + (i & 4 ? 8 : 0)};
  }
};

// B [16, 8] of 16-bit elements: 4 a lane in 2 registers.
struct FragmentB16 {
  static constexpr int kRows = 16, kCols = 8, kElements = 4, kPerRegister = 2;
  SVDQ_HOST_DEVICE static constexpr Coord coord(int lane, int i) {
    return {lane % 4 * 2 + (i & 1) + (i & 2 ? 8 : 0), lane / 4};
  }
};

// A [16, 32] of 8-bit elements: 16 a lane, four in each of 4 registers.
struct FragmentA8 {
  static constexpr int kRows = 16, kCols = 32, kElements = 16, kPerRegister = 4;
  SVDQ_HOST_DEVICE static constexpr Coord coord(int lane, int i) {
    return {lane / 4 + (i & 4 ? 8 : 0), lane % 4 * 4 + (i & 3) + (i & 8 ? 16 : 0)};
  }
};

// B [32, 8] of 8-bit elements: 8 a lane in 2 registers.
struct FragmentB8 {
  static constexpr int kRows = 32, kCols = 8, kElements = 8, kPerRegister = 4;
  SVDQ_HOST_DEVICE static constexpr Coord coord(int lane, int i) {
    return {lane % 4 * 4 + (i & 3) + (i & 4 ? 16 : 0), lane / 4};
  }
};

// C and D [16, 8] of 32-bit elements: 4 a lane, for both instruction shapes.
struct FragmentC {
  static constexpr int kRows = 16, kCols = 8, kElements = 4, kPerRegister = 1;
  SVDQ_HOST_DEVICE static constexpr Coord coord(int lane, int i) {
    return {lane / 4 + (i & 2 ? 8 : 0), lane % 4 * 2 + (i & 1)};
  }
};

// One 8 x 8 matrix of 16-bit elements as ldmatrix hands it out: 2 elements a lane.
struct FragmentMatrix {
  static constexpr int kRows = 8, kCols = 8, kElements = 2, kPerRegister = 2;
  SVDQ_HOST_DEVICE static constexpr Coord coord(int lane, int i) {
    return {lane / 4, lane % 4 * 2 + i};
  }
  SVDQ_HOST_DEVICE static constexpr Coord transposed(int lane, int i) {
    return {lane % 4 * 2 + i, lane / 4};
  }
};

}  // namespace svdq::device
