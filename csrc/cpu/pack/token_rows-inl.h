// Keys of one head as rows of floats, unrotated and centred.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/core/rope_table.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Unrotates one row: pair i by the angle of cosines[i] and sines[i].
inline void unrotate(float* row, const float* cosines, const float* sines, int rotary_pairs) {
  int i = 0;
  for (; i + kVecLanes <= rotary_pairs; i += kVecLanes) {
    const F32 c = load<F32>(cosines + i), s = load<F32>(sines + i);
    const F32 x = load<F32>(row + i), y = load<F32>(row + rotary_pairs + i);
    store(row + i, x * c + y * s);
    store(row + rotary_pairs + i, y * c - x * s);
  }
  for (; i < rotary_pairs; ++i) {
    const float x = row[i], y = row[rotary_pairs + i];
    row[i] = x * cosines[i] + y * sines[i];
    row[rotary_pairs + i] = y * cosines[i] - x * sines[i];
  }
}

// Cosines and sines of the angles at position base + offset.
inline void add_angles(const RopeTable& table, int64_t block, int offset, float* cosines,
                       float* sines) {
  const float *base_cos = table.base_cos(block), *base_sin = table.base_sin(block);
  const float *off_cos = table.offsets().row_cos(offset),
              *off_sin = table.offsets().row_sin(offset);
  for (int i = 0; i < table.rotary_pairs(); ++i) {
    cosines[i] = base_cos[i] * off_cos[i] - base_sin[i] * off_sin[i];
    sines[i] = base_sin[i] * off_cos[i] + base_cos[i] * off_sin[i];
  }
}

// One row of numbers as floats, unrotated where rotary_pairs > 0, minus `shift` (may be null).
template <DataType kType>
inline void load_row(const void* data, int64_t from, int head_dim, const float* cosines,
                     const float* sines, int rotary_pairs, const float* shift, float* row) {
  const auto store_shifted = [&](int d, F32 x) {
    store(row + d, shift ? x - load<F32>(shift + d) : x);
  };
  if (rotary_pairs % kVecLanes != 0) {
    for (int d = 0; d < head_dim; d += kVecLanes)
      store(row + d, load_number<kType>(data, from + d));
    unrotate(row, cosines, sines, rotary_pairs);
    for (int d = 0; d < head_dim; d += kVecLanes) store_shifted(d, load<F32>(row + d));
    return;
  }
  for (int i = 0; i < rotary_pairs; i += kVecLanes) {
    const F32 c = load<F32>(cosines + i), s = load<F32>(sines + i);
    const F32 x = load_number<kType>(data, from + i);
    const F32 y = load_number<kType>(data, from + rotary_pairs + i);
    store_shifted(i, x * c + y * s);
    store_shifted(rotary_pairs + i, y * c - x * s);
  }
  for (int d = 2 * rotary_pairs; d < head_dim; d += kVecLanes)
    store_shifted(d, load_number<kType>(data, from + d));
}

// Prefetches the numbers of one token: callers name a token of the next page while they work on this one.
inline void prefetch_token(const TokenSource& source, int head, int head_dim, int64_t token) {
  if (token >= source.num_tokens) return;
  const int64_t size = source.dtype == DataType::kFloat32 ? 4 : 2;
  const char* at = static_cast<const char*>(source.data) +
                   (head * source.head_stride + token * source.token_stride) * size;
  for (int64_t byte = 0; byte < head_dim * size; byte += kLineBytes) __builtin_prefetch(at + byte);
}

// Tokens token .. token + count - 1 of a source. They stand at offsets first .. first + count - 1 of block `block` of
// a RopeTable, 64 positions.
struct TokenBlock {
  int64_t token;
  int count;
  int64_t block;
  int first;
};

// Block `block` of a source whose first token stands at offset 0 of block 0.
inline TokenBlock token_block(const TokenSource& source, int64_t block) {
  const int64_t token = block * kPageTokens;
  return {token, static_cast<int>(std::min<int64_t>(kPageTokens, source.num_tokens - token)), block,
          0};
}

// Keys of one head as float rows [64, D], unrotated and minus `shift` (may be null); rows outside the block's tokens
// are zero.
inline void load_rows(const TokenSource& keys, int head, int head_dim, const TokenBlock& block,
                      const RopeTable& table, const float* shift, float* rows) {
  const int first = block.first, count = block.count;
  const int rotary_pairs = table.rotary_pairs();
  with_dtype(keys.dtype, [&]<DataType kType>() {
    float cosines[kMaxHeadDim / 2], sines[kMaxHeadDim / 2];
    for (int r = 0; r < count; ++r) {
      prefetch_token(keys, head, head_dim, block.token + r + kPageTokens);
      if (rotary_pairs > 0) add_angles(table, block.block, first + r, cosines, sines);
      const int64_t from = head * keys.head_stride + (block.token + r) * keys.token_stride;
      load_row<kType>(keys.data, from, head_dim, cosines, sines, rotary_pairs, shift,
                      rows + (first + r) * head_dim);
    }
  });
  std::memset(rows, 0, sizeof(float) * first * head_dim);
  std::memset(rows + (first + count) * head_dim, 0,
              sizeof(float) * (kPageTokens - first - count) * head_dim);
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
