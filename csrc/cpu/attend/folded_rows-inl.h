// Integer products of a head's codes with int8 rows that a query or a key channel was folded into.
#pragma once

#include <cstdint>

#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Rows over the channels of a head, quantized to be multiplied with its codes: a number is
// scale * (high + low / kLowPerHigh). Only 8-bit codes, which are up to 17 times larger than 4-bit codes, use the low
// term.
struct FoldedRows {
  const int8_t* high;  // of row r, quad q at r * row_stride + q * quad_stride
  const int8_t* low;
  const float* scale;   // [rows]
  const float* offset;  // [rows]: the term without codes, minus the mid codes' share
  int64_t row_stride, quad_stride;

  int64_t at(int row, int quad) const { return row * row_stride + quad * quad_stride; }
};

inline constexpr float kLowPerHigh = 254.0f;
inline constexpr float kMaxFolded = 127.0f;

// acc[row][group] = codes . folded rows over the channels of `bands`, or over their 8-bit channels only.
template <bool kUnpacked, bool kWideOnly, int kRows>
[[gnu::always_inline]] inline void sum_products(const uint8_t* lines, const Bands& bands,
                                                const int8_t* folded, const FoldedRows& query,
                                                int part, I32 (&acc)[kRows][kGroups]) {
  const int64_t rows = query.row_stride, quads = query.quad_stride;
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) acc[r][g] = I32{};
  }
  // Add one width after the other without calls in between, so that sums stay in registers.
  const auto add = [&]<int kWidth>(int count) __attribute__((always_inline)) {
    accumulate_band<kWidth, kUnpacked>(lines, count, folded, rows, quads, part, acc);
    folded += count / kQuad * quads;
    lines += band_bytes(kUnpacked ? 8 : kWidth, count);
  };
  if (bands.count[0]) add.template operator()<8>(bands.count[0]);
  if constexpr (kWideOnly) return;
  if constexpr (kUnpacked) {
    // All codes have a byte each.
    add.template operator()<4>(bands.rank() - bands.count[0]);
  } else {
    if (bands.count[1]) add.template operator()<4>(bands.count[1]);
    if (bands.count[2]) add.template operator()<2>(bands.count[2]);
    if (bands.count[3]) add.template operator()<1>(bands.count[3]);
  }
}

// Calls put(r, group, part, sum) for rows row .. row + kRows - 1, where sum = codes . folded rows over the channels of
// `bands`, in units of the row's scale.
template <bool kUnpacked, int kRows, typename Put>
[[gnu::always_inline]] inline void for_each_product(const uint8_t* lines, const Bands& bands,
                                                    const FoldedRows& query, int row,
                                                    const Put& put) {
  for (int part = 0; part < kParts; ++part) {
    I32 acc[kRows][kGroups];
    if (bands.count[0] == 0) {
      sum_products<kUnpacked, false>(lines, bands, query.high + query.at(row, 0), query, part, acc);
      for (int r = 0; r < kRows; ++r) {
        for (int g = 0; g < kGroups; ++g) put(r, g, part, to_float(acc[r][g]));
      }
      continue;
    }
    // Keep low terms in memory: registers hold one set of sums.
    float low[kRows][kGroups][kVecLanes];
    sum_products<kUnpacked, true>(lines, bands, query.low + query.at(row, 0), query, part, acc);
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) store(low[r][g], to_float(acc[r][g]) * (1 / kLowPerHigh));
    }
    sum_products<kUnpacked, false>(lines, bands, query.high + query.at(row, 0), query, part, acc);
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) put(r, g, part, to_float(acc[r][g]) + load<F32>(low[r][g]));
    }
  }
}

// s[r] (kAdd: +)= offset + sum over the channels of `bands`, for rows row .. row + kRows - 1.
template <bool kUnpacked, int kRows, bool kAdd = false>
inline void code_scores(const uint8_t* lines, const Bands& bands, const FoldedRows& query, int row,
                        float* s) {
  for_each_product<kUnpacked, kRows>(
      lines, bands, query, row, [&](int r, int group, int part, F32 sum) {
        float* at = s + r * kPageTokens + tokens_at(group, part);
        const F32 score = sum * query.scale[row + r] + query.offset[row + r];
        store(at, kAdd ? load<F32>(at) + score : score);
      });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
