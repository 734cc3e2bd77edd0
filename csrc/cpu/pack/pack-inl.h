// The pack stage: latents and values become codes in the quad layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/fit/quantizer-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Pages that one task packs, so that its transposed basis is used more than once.
inline constexpr int64_t kPagesPerTask = 16;

// Slots first .. first + count - 1 of a page are written; they hold tokens token .. token + count
// - 1.
struct PageSpan {
  int64_t page;  // row of the pool
  int64_t run;   // page of the sequence, counted from the first one written
  int64_t token;
  int first;
  int count;

  bool full() const { return count == kPageTokens; }
  uint64_t mask() const {
    return (count == kPageTokens ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << first;
  }
};

inline PageSpan page_span(const int32_t* page_table, int64_t slot, int64_t num_tokens,
                          int64_t run) {
  const int64_t begin = std::max(slot, (slot / kPageTokens + run) * kPageTokens);
  const int64_t end = std::min(slot + num_tokens, (slot / kPageTokens + run + 1) * kPageTokens);
  return {page_table[slot / kPageTokens + run], run, begin - slot,
          static_cast<int>(begin % kPageTokens), static_cast<int>(end - begin)};
}

inline int64_t spanned_pages(int64_t slot, int64_t num_tokens) {
  return num_tokens == 0 ? 0 : (slot + num_tokens - 1) / kPageTokens - slot / kPageTokens + 1;
}

// Codes of one band, [count, 64] int32 by channel, into its lines; bits of slots outside the span
// stay.
template <int kWidth>
inline void write_band(const int32_t* codes, int count, PageSpan span, uint8_t* lines) {
  constexpr int kUnits = 8 / kWidth;  // units in a line
  constexpr uint32_t kUnitMask = ((1u << kWidth) - 1) * 0x01010101u;
  const int num_lines = count * kGroups / kQuad / kUnits;
  for (int line = 0; line < num_lines; ++line) {
    for (int part = 0; part < kParts; ++part) {
      uint8_t* to = lines + line * kLineBytes + part * kVecBytes;
      U32 bits{}, keep{};
      for (int k = 0; k < kUnits; ++k) {
        const int unit = line * kUnits + k, quad = unit / kGroups;
        const int token = unit % kGroups * kLanes + part * kVecLanes;
        U32 lane{};
        for (int e = 0; e < kQuad; ++e) {
          lane |= load<U32>(codes + (quad * kQuad + e) * kPageTokens + token) << (8 * e);
        }
        bits |= lane << (k * kWidth);
        if (span.full()) continue;
        const U32 kept = (U32)select_lanes(static_cast<uint32_t>(~span.mask() >> token),
                                           (F32)splat_u32(kUnitMask), F32{});
        keep |= kept << (k * kWidth);
      }
      if (!span.full()) bits = (bits & ~keep) | (load<U32>(to) & keep);
      store(to, bits);
    }
  }
}

inline void write_codes(const HeadPlan& head, const int32_t* codes, const PageSpan& span,
                        uint8_t* lines) {
  for (const Bands* bands : {&head.pre, &head.post}) {
    for_each_band(*bands, [&]<int kWidth>(int count, int) {
      write_band<kWidth>(codes, count, span, lines);
      codes += count * kPageTokens;
      lines += count * kWidth * kPageTokens / 8;
    });
  }
}

// What turns latents into codes and back, by channel: [padded_rank] each, zero past the rank.
struct ChannelScales {
  float* inverse;
  float* scale;
  float* mid;
  float* top;

  ChannelScales(const PackKeysParams& p, const HeadPlan& head, float* memory, int padded)
      : inverse(memory),
        scale(memory + padded),
        mid(memory + 2 * padded),
        top(memory + 3 * padded) {
    std::memset(memory, 0, sizeof(float) * 4 * padded);
    for (int j = 0; j < head.rank(); ++j) {
      scale[j] = p.codec.scale[head.first_channel + j];
      inverse[j] = scale[j] > 0 ? 1.0f / scale[j] : 0.0f;
      top[j] = static_cast<float>((1 << channel_width(head, j)) - 1);
      mid[j] = top[j] / 2;
    }
  }
};

// Codes [rank, 64] by channel of the latents [64, padded_rank], which become what the codes stand
// for, negative.
inline void quantize(ChannelScales c, int rank, float* latent, int32_t* codes) {
  const int padded = padded_rank(rank);
  for_each_channel_block(
      latent, rank,
      [&](int j, int t, const float* from) {
        const F32 mid = load<F32>(c.mid + j);
        F32 code = round_even(load<F32>(from) * load<F32>(c.inverse + j) + mid);
        // In this order a latent that overflowed to NaN becomes code 0.
        code = min(max(code, F32{}), load<F32>(c.top + j));
        store(latent + t * padded + j, (mid - code) * load<F32>(c.scale + j));
        return code;
      },
      [&](int j, int t, const F32* v) {
        for (int i = 0; i < kVecLanes; ++i)
          store(codes + (j + i) * kPageTokens + t, round_to_int(v[i]));
      });
}

// rows += residual [64, padded_rank] x basis_rows [rank, D], then the squared length of each row.
inline void write_errors(const PackKeysParams& p, int rank, int h, const PageSpan& span,
                         const float* basis_rows, const float* residual, float* rows) {
  const int dim = p.layout.head_dim, padded = padded_rank(rank);
  const int end = span.first + span.count;
  for (int d = 0; d < dim; d += kTileVecs * kVecLanes) {
    with_count<kTileVecs>((dim - d) / kVecLanes, [&]<int kVecs>() {
      for (int t = span.first / kTileTokens * kTileTokens; t < end; t += kTileTokens) {
        outer_product_tile<kTileTokens, kVecs, true>(
            residual + t * padded, padded, 1, basis_rows + d, dim, rank, rows + t * dim + d, dim);
      }
    });
  }
  for (int t = span.first; t < end; ++t) {
    F32 sum{};
    for (int d = 0; d < dim; d += kVecLanes) {
      const F32 x = load<F32>(rows + t * dim + d);
      sum += x * x;
    }
    p.errors[h * p.errors_stride + span.token + t - span.first] = reduce_add(sum);
  }
}

inline void pack_keys(const PackKeysParams& p, const Executor& executor) {
  const LayoutView& layout = p.layout;
  const int64_t num_pages = spanned_pages(p.slot, p.keys.num_tokens);
  const int64_t chunks = (num_pages + kPagesPerTask - 1) / kPagesPerTask;
  const RopeTable table(p.codec.rope, p.position - p.slot % kPageTokens, num_pages);
  const int64_t dim = layout.head_dim, most = padded_rank(static_cast<int>(dim));
  const int64_t worker_size = kPageTokens * dim + 2 * kPageTokens * most + dim * most + 4 * most +
                              (p.errors ? dim * dim : 0);
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * worker_size);

  for_each_task(executor, layout.num_heads * chunks, [&](int64_t task, int worker) {
    const HeadPlan& head = layout.heads[task / chunks];
    const int h = static_cast<int>(task / chunks), rank = head.rank();
    if (rank == 0 && !p.errors) return;
    float* rows = scratch.as<float>() + worker * worker_size;
    float* latent = rows + kPageTokens * dim;
    int32_t* codes = reinterpret_cast<int32_t*>(latent + kPageTokens * most);
    float* columns = reinterpret_cast<float*>(codes + kPageTokens * most);
    float* basis_rows = columns + dim * most + 4 * most;
    const uint16_t* basis = p.codec.basis + int64_t{head.first_channel} * dim;
    transpose_basis(basis, rank, static_cast<int>(dim), columns);
    if (p.errors) {
      for (int64_t i = 0; i < rank * dim; i += kVecLanes)
        store(basis_rows + i, load_bfloat16(basis + i));
    }
    const ChannelScales scales(p, head, columns + dim * most, padded_rank(rank));

    const int64_t first = task % chunks * kPagesPerTask;
    for (int64_t run = first; run < std::min(first + kPagesPerTask, num_pages); ++run) {
      const PageSpan span = page_span(p.page_table, p.slot, p.keys.num_tokens, run);
      load_rows(p.keys, h, static_cast<int>(dim), span.token, span.count, table, run, span.first,
                p.codec.mean + h * dim, rows);
      project_rows(rows, columns, rank, static_cast<int>(dim), latent);
      quantize(scales, rank, latent, codes);
      write_codes(head, codes, span, p.pages + span.page * layout.k_page_bytes + head.k_offset);
      if (p.errors) write_errors(p, rank, h, span, basis_rows, latent, rows);
    }
  });
}

// Least and largest number of each group of the rows first .. first + count - 1, [groups, 64] by
// slot.
inline void find_value_extremes(const float* rows, ValueLayout value, int first, int count,
                                float* least, float* most) {
  for (int g = 0; g < value.groups(); ++g) {
    for (int t = first; t < first + count; t += kVecLanes) {
      F32 low[kVecLanes], high[kVecLanes];
      const int block = std::min(kVecLanes, first + count - t);
      for (int r = 0; r < kVecLanes; ++r) {
        // Rows that are missing from the last block repeat its last one.
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
      // Past the end lies the next group, written after this one, or memory to spare.
      store(least + g * kPageTokens + t, low[0]);
      store(most + g * kPageTokens + t, high[0]);
    }
  }
}

// Rows by slot to codes, and the scale and zero point of each token's groups, rounded to half.
// least and most are those of find_value_extremes.
template <int kWidth>
inline void quantize_values(ValueLayout value, PageSpan span, const float* least, const float* most,
                            float* rows, uint8_t* page) {
  const F32 top = splat(static_cast<float>((1 << kWidth) - 1));
  uint16_t* scales = reinterpret_cast<uint16_t*>(page + value.scale_offset());
  uint16_t* zeros = reinterpret_cast<uint16_t*>(page + value.zero_offset());
  const int end = span.first + span.count;
  for (int g = 0; g < value.groups(); ++g) {
    for (int t = span.first; t < end; t += kVecLanes) {
      const int at = g * kPageTokens + t, block = std::min(kVecLanes, end - t);
      uint16_t scale[kVecLanes], zero[kVecLanes];
      store_half(scale, (load<F32>(most + at) - load<F32>(least + at)) / top);
      store_half(zero, load<F32>(least + at));
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
          store(row + d, (F32)round_to_int(min(max(code, F32{}), top)));
        }
      }
    }
  }
}

// Codes by slot and channel into their lines; bits of slots outside the span stay.
template <int kWidth, bool kFull>
inline void write_value_lines(const float* codes, int dim, PageSpan span, uint8_t* lines) {
  constexpr int kUnits = 8 / kWidth;
  constexpr uint32_t kUnitMask = (1u << kWidth) - 1;
  for (int line = 0; line < dim / kLanes * kTokenQuads / kUnits; ++line) {
    for (int part = 0; part < kParts; ++part) {
      uint8_t* to = lines + line * kLineBytes + part * kVecBytes;
      U32 bits{};
      uint32_t keep = 0;
      for (int k = 0; k < kUnits; ++k) {
        const int unit = line * kUnits + k;
        const int channel = unit / kTokenQuads * kLanes + part * kVecLanes;
        for (int e = 0; e < kQuad; ++e) {
          const int slot = unit % kTokenQuads * kQuad + e;
          if (!kFull && (slot < span.first || slot >= span.first + span.count)) {
            keep |= kUnitMask << (8 * e + k * kWidth);
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

// A worker's memory to pack values: rows, and extremes of groups of 16 channels or more.
inline int64_t value_scratch(int64_t head_dim) {
  return kPageTokens * head_dim + 2 * (kPageTokens * head_dim / kLanes + kLanes);
}

template <DataType kType>
inline void load_value_rows(const TokenSource& values, int h, int dim, PageSpan span, float* rows) {
  const TokenSource from = values;  // a copy, which no store can change
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
  float* least = rows + kPageTokens * dim;
  float* most = least + kPageTokens * dim / kLanes + kLanes;
  with_dtype(p.values.dtype, [&]<DataType kType>() {
    load_value_rows<kType>(p.values, h, dim, span, rows + span.first * dim);
  });
  find_value_extremes(rows, value, span.first, span.count, least, most);
  quantize_values<kWidth>(value, span, least, most, rows, page);
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
