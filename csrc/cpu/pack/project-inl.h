// The project stage: rows of keys, un-rotated, centred and projected on a basis.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/core/rope_table.h"
#include "csrc/core/scalar.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

inline constexpr int kTileTokens = 4;  // rows of a register tile
inline constexpr int kTileVecs =
    SVDQ_TARGET == 512 ? 4 : 2;  // columns of a register tile, in vectors
static_assert(kPageTokens % kTileTokens == 0 && kPageTokens % kVecLanes == 0);

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Calls fn.template operator()<n>() for the run-time n in 1 .. kTileVecs.
template <int kMax, typename Fn>
inline void with_count(int n, const Fn& fn) {
  if (n >= kMax) {
    fn.template operator()<kMax>();
  } else if constexpr (kMax > 1) {
    with_count<kMax - 1>(n, fn);
  }
}

// Calls fn<width>(count, band) for every width that has channels, widest first.
template <typename Fn>
inline void for_each_band(const Bands& bands, const Fn& fn) {
  static_assert(kWidths[0] == 8 && kWidths[1] == 4 && kWidths[2] == 2 && kWidths[3] == 1);
  if (bands.count[0]) fn.template operator()<8>(bands.count[0], 0);
  if (bands.count[1]) fn.template operator()<4>(bands.count[1], 1);
  if (bands.count[2]) fn.template operator()<2>(bands.count[2], 2);
  if (bands.count[3]) fn.template operator()<1>(bands.count[3], 3);
}

// out[m][n] (+)= sum_k a[k * a_stride_k + m * a_stride_m] * b[k][n] for a tile of kRows x
// (kVecs vectors), k ascending, one fused multiply-add each: the order fixes the rounding, so
// targets with FMA agree to the last bit.
template <int kRows, int kVecs, bool kAccumulate>
inline void outer_product_tile(const float* a, int64_t a_stride_m, int64_t a_stride_k,
                               const float* b, int64_t b_stride, int64_t num_k, float* out,
                               int64_t out_stride) {
  F32 acc[kRows][kVecs];
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) {
      acc[m][v] = kAccumulate ? load<F32>(out + m * out_stride + v * kVecLanes) : F32{};
    }
  }
  for (int64_t k = 0; k < num_k; ++k) {
    F32 row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = load<F32>(b + k * b_stride + v * kVecLanes);
    for (int m = 0; m < kRows; ++m) {
      const F32 x = splat(a[k * a_stride_k + m * a_stride_m]);
      for (int v = 0; v < kVecs; ++v) acc[m][v] += x * row[v];
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) store(out + m * out_stride + v * kVecLanes, acc[m][v]);
  }
}

// Turns one row back: pair i by the angle whose cosine and sine are given.
inline void rotate_back(float* row, const float* cosines, const float* sines, int half) {
  int i = 0;
  for (; i + kVecLanes <= half; i += kVecLanes) {
    const F32 c = load<F32>(cosines + i), s = load<F32>(sines + i);
    const F32 x = load<F32>(row + i), y = load<F32>(row + half + i);
    store(row + i, x * c + y * s);
    store(row + half + i, y * c - x * s);
  }
  for (; i < half; ++i) {
    const float x = row[i], y = row[half + i];
    row[i] = x * cosines[i] + y * sines[i];
    row[half + i] = y * cosines[i] - x * sines[i];
  }
}

// Angles of position base + offset: those of both parts, added.
inline void add_angles(const RopeTable& table, int64_t run, int offset, float* cosines,
                       float* sines) {
  const float *base_cos = table.base_cos(run), *base_sin = table.base_sin(run);
  const float *off_cos = table.offsets().row_cos(offset),
              *off_sin = table.offsets().row_sin(offset);
  for (int i = 0; i < table.half(); ++i) {
    cosines[i] = base_cos[i] * off_cos[i] - base_sin[i] * off_sin[i];
    sines[i] = base_sin[i] * off_cos[i] + base_cos[i] * off_sin[i];
  }
}

// One row of numbers of a dtype as floats, turned back (half > 0) and less `shift` (may be null).
template <DataType kType>
inline void load_row(const void* data, int64_t from, int head_dim, const float* cosines,
                     const float* sines, int half, const float* shift, float* row) {
  const auto store_shifted = [&](int d, F32 x) {
    store(row + d, shift ? x - load<F32>(shift + d) : x);
  };
  if (half % kVecLanes != 0) {
    for (int d = 0; d < head_dim; d += kVecLanes)
      store(row + d, load_number<kType>(data, from + d));
    rotate_back(row, cosines, sines, half);
    for (int d = 0; d < head_dim; d += kVecLanes) store_shifted(d, load<F32>(row + d));
    return;
  }
  for (int i = 0; i < half; i += kVecLanes) {
    const F32 c = load<F32>(cosines + i), s = load<F32>(sines + i);
    const F32 x = load_number<kType>(data, from + i);
    const F32 y = load_number<kType>(data, from + half + i);
    store_shifted(i, x * c + y * s);
    store_shifted(half + i, y * c - x * s);
  }
  for (int d = 2 * half; d < head_dim; d += kVecLanes)
    store_shifted(d, load_number<kType>(data, from + d));
}

// Asks for the numbers of one token early: those of the next page come while this one is worked on.
inline void prefetch_token(const TokenSource& source, int head, int head_dim, int64_t token) {
  if (token >= source.num_tokens) return;
  const int64_t size = source.dtype == DataType::kFloat32 ? 4 : 2;
  const char* at = static_cast<const char*>(source.data) +
                   (head * source.head_stride + token * source.token_stride) * size;
  for (int64_t byte = 0; byte < head_dim * size; byte += kLineBytes) __builtin_prefetch(at + byte);
}

// Keys first_token .. first_token + count - 1 of one head as float rows [64, D], un-rotated and
// less `shift` (may be null): rows first .. first + count - 1, which are the offsets of these keys
// in the run. Other rows are zero.
inline void load_rows(const TokenSource& keys, int head, int head_dim, int64_t first_token,
                      int count, const RopeTable& table, int64_t run, int first, const float* shift,
                      float* rows) {
  const int half = table.half();
  with_dtype(keys.dtype, [&]<DataType kType>() {
    float cosines[kMaxHeadDim / 2], sines[kMaxHeadDim / 2];
    for (int r = 0; r < count; ++r) {
      prefetch_token(keys, head, head_dim, first_token + r + kPageTokens);
      if (half > 0) add_angles(table, run, first + r, cosines, sines);
      const int64_t from = head * keys.head_stride + (first_token + r) * keys.token_stride;
      load_row<kType>(keys.data, from, head_dim, cosines, sines, half, shift,
                      rows + (first + r) * head_dim);
    }
  });
  std::memset(rows, 0, sizeof(float) * first * head_dim);
  std::memset(rows + (first + count) * head_dim, 0,
              sizeof(float) * (kPageTokens - first - count) * head_dim);
}

// Columns of a transposed basis, padded so that tiles never end inside a vector.
inline int padded_rank(int rank) { return static_cast<int>(round_up(rank, kLanes)); }

// basis [rank, D] bfloat16 -> columns [D, padded_rank] float.
inline void transpose_basis(const uint16_t* basis, int rank, int head_dim, float* columns) {
  const int padded = padded_rank(rank);
  for (int d = 0; d < head_dim; ++d) {
    for (int j = 0; j < padded; ++j) {
      columns[d * padded + j] =
          j < rank ? bfloat16_to_float(basis[int64_t{j} * head_dim + d]) : 0.0f;
    }
  }
}

// latent [64, padded_rank] = rows [64, D] x columns [D, padded_rank].
inline void project_rows(const float* rows, const float* columns, int rank, int head_dim,
                         float* latent) {
  const int padded = padded_rank(rank);
  for (int j = 0; j < padded; j += kTileVecs * kVecLanes) {
    with_count<kTileVecs>((padded - j) / kVecLanes, [&]<int kVecs>() {
      for (int t = 0; t < kPageTokens; t += kTileTokens) {
        outer_product_tile<kTileTokens, kVecs, false>(rows + t * head_dim, head_dim, 1, columns + j,
                                                      padded, head_dim, latent + t * padded + j,
                                                      padded);
      }
    });
  }
}

// Calls fn(j, t, vectors) for blocks of channels from j and tokens from t on: rows [64,
// padded_rank] by token become vectors[0 .. kVecLanes - 1] by channel, after `convert`(j, t, row)
// of each vector of one token's channels.
template <typename Convert, typename Fn>
inline void for_each_channel_block(float* latent, int rank, const Convert& convert, const Fn& fn) {
  const int padded = padded_rank(rank);
  for (int j = 0; j < rank; j += kVecLanes) {
    for (int t = 0; t < kPageTokens; t += kVecLanes) {
      F32 v[kVecLanes];
      for (int r = 0; r < kVecLanes; ++r) v[r] = convert(j, t + r, latent + (t + r) * padded + j);
      transpose(v);
      fn(j, t, v);
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
