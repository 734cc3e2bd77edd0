// The pack_values stage: values are rotated and become codes in the quad layout, with a scale for each token of a head.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/core/parallel.h"
#include "csrc/cpu/lanes-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/rotation-inl.h"
#include "csrc/cpu/pack/token_rows-inl.h"
#include "csrc/cpu/pages/page_span-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"
#include "kernels/rotation.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Sum of kLanes partial sums, halves first: one order on all machines.
inline float sum_lanes(F32 (&partial)[kParts]) {
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  F32 sum = partial[0];
  for (int half = kVecLanes / 2; half > 0; half /= 2) {
    I32 partner;
    for (int i = 0; i < kVecLanes; ++i) partner[i] = i ^ half;
    sum += __builtin_shuffle(sum, partner);
  }
  return sum[0];
}

// Replaces a rotated row by its codes, 32-bit integers; returns the byte of its scale. Partial sums of the channels of a
// lane ascend, one fused multiply-add each.
inline int quantize_value_row(float* row, ValueLayout value) {
  const auto sum_of = [&](const auto& add) {
    F32 partial[kParts] = {};
    for (int d = 0; d < value.head_dim; d += kLanes) {
      for (int part = 0; part < kParts; ++part) add(partial[part], row + d + part * kVecLanes);
    }
    return sum_lanes(partial);
  };
  const float square = sum_of([](F32& sum, const float* at) {
    const F32 x = load<F32>(at);
    sum += x * x;
  });
  const float step =
      value_step(value.bits) * std::sqrt(square / static_cast<float>(value.head_dim));
  const F32 inverse = splat(step > 0 ? 1.0f / step : 0.0f);
  const F32 middle = splat(mid_code(value.bits)), top = splat(2 * mid_code(value.bits));
  const float product = sum_of([&](F32& sum, float* at) {
    const F32 x = load<F32>(at);
    const I32 code = round_to_int(min(max(x * inverse + middle, F32{}), top));
    sum += x * (to_float(code) - middle);
    store(at, code);
  });
  return step > 0 ? scale_byte(float_to_half(std::min(square / product, 65504.0f))) : 0;
}

// Writes one plane of codes [64, D] by slot, their bits from kShift on, into its lines; bits of slots outside the span
// stay.
template <int kWidth, int kShift, bool kFull>
inline void write_value_lines(const float* codes, int dim, PageSpan span, uint8_t* lines) {
  constexpr int kLineTiles = 8 / kWidth;
  constexpr uint32_t kTileMask = (1u << kWidth) - 1;
  for (int line = 0; line < dim / kLanes * kTokenQuads / kLineTiles; ++line) {
    for (int part = 0; part < kParts; ++part) {
      uint8_t* to = lines + line * kLineBytes + part * kVecBytes;
      U32 bits{};
      uint32_t keep = 0;
      for (int k = 0; k < kLineTiles; ++k) {
        const int tile = line * kLineTiles + k;
        const int channel = tile / kTokenQuads * kLanes + part * kVecLanes;
        for (int e = 0; e < kQuad; ++e) {
          const int slot = tile % kTokenQuads * kQuad + e;
          if (!kFull && (slot < span.first || slot >= span.first + span.count)) {
            keep |= kTileMask << (8 * e + k * kWidth);
          } else {
            bits |= (load<U32>(codes + slot * dim + channel) >> kShift & kTileMask)
                    << (8 * e + k * kWidth);
          }
        }
      }
      if (!kFull && keep) bits |= load<U32>(to) & keep;
      store(to, bits);
    }
  }
}

// Loads and rotates the values of a span into rows [64, D] by slot.
template <DataType kType>
inline void load_rotated_rows(const TokenSource& values, int h, int dim, PageSpan span,
                              float* rows) {
  const TokenSource from = values;  // a copy, which no store can alias
  for (int r = 0; r < span.count; ++r) {
    prefetch_token(from, h, dim, span.token + r + kPageTokens);
    const int64_t at = h * from.head_stride + (span.token + r) * from.token_stride;
    rotate_values(rows + (span.first + r) * dim, dim,
                  [&](int d) { return load_number<kType>(from.data, at + d); });
  }
}

template <bool kFull>
inline void write_value_planes(const float* codes, const ValueLayout& value, const PageSpan& span,
                               uint8_t* page) {
  uint8_t* lines = page + value.code_offset();
  if (value.bits == 4) write_value_lines<4, 0, kFull>(codes, value.head_dim, span, lines);
  if (value.bits == 3) {
    write_value_lines<2, 0, kFull>(codes, value.head_dim, span, lines);
    write_value_lines<1, 2, kFull>(codes, value.head_dim, span, page + value.high_plane_offset());
  }
  if (value.bits == 2) write_value_lines<2, 0, kFull>(codes, value.head_dim, span, lines);
}

inline void pack_value_page(const PackValuesParams& p, int h, const PageSpan& span, float* rows,
                            uint8_t* page) {
  const ValueLayout& value = p.layout.heads[h].value;
  const int dim = value.head_dim;
  with_dtype(p.values.dtype,
             [&]<DataType kType>() { load_rotated_rows<kType>(p.values, h, dim, span, rows); });
  for (int slot = span.first; slot < span.first + span.count; ++slot)
    page[slot] = static_cast<uint8_t>(quantize_value_row(rows + slot * dim, value));
  if (span.full()) {
    write_value_planes<true>(rows, value, span, page);
  } else {
    write_value_planes<false>(rows, value, span, page);
  }
}

inline void copy_value_page(const PackValuesParams& p, int h, const PageSpan& span, uint8_t* page) {
  const int64_t size = p.layout.heads[h].value.bits / 8;
  for (int r = 0; r < span.count; ++r) {
    const int64_t from = h * p.values.head_stride + (span.token + r) * p.values.token_stride;
    std::memcpy(page + int64_t{span.first + r} * p.layout.head_dim * size,
                static_cast<const uint8_t*>(p.values.data) + from * size, p.layout.head_dim * size);
  }
}

inline void pack_values(const PackValuesParams& p, const Executor& executor) {
  const int64_t num_pages = spanned_pages(p.slot, p.values.num_tokens);
  const int64_t worker_size = int64_t{kPageTokens} * p.layout.head_dim;
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * worker_size);
  for_each_task(executor, p.layout.num_heads * num_pages, [&](int64_t task, int worker) {
    const int h = static_cast<int>(task / num_pages);
    const PageSpan span = page_span(p.page_table, p.slot, p.values.num_tokens, task % num_pages);
    uint8_t* page = p.pages + span.page * p.layout.v_page_bytes + p.layout.heads[h].v_offset;
    float* rows = scratch.as<float>() + worker * worker_size;
    if (p.layout.packs_values()) {
      pack_value_page(p, h, span, rows, page);
    } else {
      copy_value_page(p, h, span, page);
    }
  });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
