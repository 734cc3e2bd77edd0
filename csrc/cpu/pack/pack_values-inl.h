// The pack_values stage: values become codes in the quad layout, with a scale and a zero point per token and group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/core/parallel.h"
#include "csrc/cpu/lanes-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/token_rows-inl.h"
#include "csrc/cpu/pages/page_span-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Minimum and maximum of each group of rows first .. first + count - 1, [groups, 64] by slot.
inline void find_value_extremes(const float* rows, ValueLayout value, int first, int count,
                                float* group_min, float* group_max) {
  for (int g = 0; g < value.groups(); ++g) {
    for (int t = first; t < first + count; t += kVecLanes) {
      F32 low[kVecLanes], high[kVecLanes];
      const int block = std::min(kVecLanes, first + count - t);
      for (int r = 0; r < kVecLanes; ++r) {
        // Repeat the last row in place of rows past the end.
        const float* row =
            rows + (t + std::min(r, block - 1)) * value.head_dim + g * value.group_size;
        low[r] = high[r] = load<F32>(row);
        for (int d = kVecLanes; d < value.group_size; d += kVecLanes) {
          low[r] = min(low[r], load<F32>(row + d));
          high[r] = max(high[r], load<F32>(row + d));
        }
      }
      transpose(low);
      transpose(high);
      for (int i = 1; i < kVecLanes; ++i) {
        low[0] = min(low[0], low[i]);
        high[0] = max(high[0], high[i]);
      }
      // A vector may run into the next group, which is written later, or into the padding behind the last one.
      store(group_min + g * kPageTokens + t, low[0]);
      store(group_max + g * kPageTokens + t, high[0]);
    }
  }
}

// Replaces rows by their codes and writes the scale and zero point of each token's groups, rounded to half.
// group_min and group_max come from find_value_extremes.
template <int kWidth>
inline void quantize_values(ValueLayout value, PageSpan span, const float* group_min,
                            const float* group_max, float* rows, uint8_t* page) {
  const F32 max_code = splat(2 * mid_code(kWidth));
  uint16_t* scales = reinterpret_cast<uint16_t*>(page + value.scale_offset());
  uint16_t* zeros = reinterpret_cast<uint16_t*>(page + value.zero_offset());
  const int end = span.first + span.count;
  for (int g = 0; g < value.groups(); ++g) {
    for (int t = span.first; t < end; t += kVecLanes) {
      const int at = g * kPageTokens + t, block = std::min(kVecLanes, end - t);
      uint16_t scale[kVecLanes], zero[kVecLanes];
      store_half(scale, (load<F32>(group_max + at) - load<F32>(group_min + at)) / max_code);
      store_half(zero, load<F32>(group_min + at));
      const F32 rounded = load_half(scale);
      float inverse[kVecLanes], centre[kVecLanes];
      store(inverse, rounded > F32{} ? splat(1.0f) / rounded : F32{});
      store(centre, load_half(zero));
      std::memcpy(scales + at, scale, sizeof(uint16_t) * block);
      std::memcpy(zeros + at, zero, sizeof(uint16_t) * block);
      for (int r = 0; r < block; ++r) {
        float* row = rows + (t + r) * value.head_dim;
        for (int d = g * value.group_size; d < (g + 1) * value.group_size; d += kVecLanes) {
          const F32 code = (load<F32>(row + d) - splat(centre[r])) * splat(inverse[r]);
          store(row + d, (F32)round_to_int(min(max(code, F32{}), max_code)));
        }
      }
    }
  }
}

// Writes codes [64, D] by slot into their lines; bits of slots outside the span stay.
template <int kWidth, bool kFull>
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
            bits |= load<U32>(codes + slot * dim + channel) << (8 * e + k * kWidth);
          }
        }
      }
      if (!kFull && keep) bits |= load<U32>(to) & keep;
      store(to, bits);
    }
  }
}

// Floats of a worker: rows, and extremes of groups of 16 channels or more.
inline int64_t value_scratch(int64_t head_dim) {
  return kPageTokens * head_dim + 2 * (kPageTokens * head_dim / kLanes + kLanes);
}

template <DataType kType>
inline void load_value_rows(const TokenSource& values, int h, int dim, PageSpan span, float* rows) {
  const TokenSource from = values;  // a copy, which no store can alias
  for (int r = 0; r < span.count; ++r) {
    prefetch_token(from, h, dim, span.token + r + kPageTokens);
    const int64_t at = h * from.head_stride + (span.token + r) * from.token_stride;
    for (int d = 0; d < dim; d += kVecLanes)
      store(rows + r * dim + d, load_number<kType>(from.data, at + d));
  }
}

template <int kWidth>
inline void pack_value_page(const PackValuesParams& p, int h, const PageSpan& span, float* rows,
                            uint8_t* page) {
  const ValueLayout& value = p.layout.value;
  const int dim = value.head_dim;
  float* group_min = rows + kPageTokens * dim;
  float* group_max = group_min + kPageTokens * dim / kLanes + kLanes;
  with_dtype(p.values.dtype, [&]<DataType kType>() {
    load_value_rows<kType>(p.values, h, dim, span, rows + span.first * dim);
  });
  find_value_extremes(rows, value, span.first, span.count, group_min, group_max);
  quantize_values<kWidth>(value, span, group_min, group_max, rows, page);
  uint8_t* lines = page + value.code_offset();
  if (span.full()) {
    write_value_lines<kWidth, true>(rows, dim, span, lines);
  } else {
    write_value_lines<kWidth, false>(rows, dim, span, lines);
  }
}

inline void copy_value_page(const PackValuesParams& p, int h, const PageSpan& span, uint8_t* page) {
  const int64_t size = p.layout.value.bits / 8;
  for (int r = 0; r < span.count; ++r) {
    const int64_t from = h * p.values.head_stride + (span.token + r) * p.values.token_stride;
    std::memcpy(page + int64_t{span.first + r} * p.layout.head_dim * size,
                static_cast<const uint8_t*>(p.values.data) + from * size, p.layout.head_dim * size);
  }
}

inline void pack_values(const PackValuesParams& p, const Executor& executor) {
  const int64_t num_pages = spanned_pages(p.slot, p.values.num_tokens);
  const int64_t worker_size = value_scratch(p.layout.head_dim);
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * worker_size);
  for_each_task(executor, p.layout.num_heads * num_pages, [&](int64_t task, int worker) {
    const int h = static_cast<int>(task / num_pages);
    const PageSpan span = page_span(p.page_table, p.slot, p.values.num_tokens, task % num_pages);
    uint8_t* page = p.pages + span.page * p.layout.v_page_bytes + h * p.layout.value.page_bytes();
    float* rows = scratch.as<float>() + worker * worker_size;
    // Pack the span in its width, or copy 16- and 32-bit values.
    if (p.layout.value.bits == 4) {
      pack_value_page<4>(p, h, span, rows, page);
    } else if (p.layout.value.bits == 2) {
      pack_value_page<2>(p, h, span, rows, page);
    } else {
      copy_value_page(p, h, span, page);
    }
  });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
