// The pack_keys stage: keys become latents, and latents codes in the quad layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/pack/outer_product-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/pack/token_rows-inl.h"
#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/pages/page_span-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Pages of a task, which transposes the basis once.
inline constexpr int64_t kTaskPages = 16;

// Writes the codes of one band, [count, 64] int32 by channel, into its lines; bits of slots outside the span stay.
template <int kWidth>
inline void write_band(const int32_t* codes, int count, PageSpan span, uint8_t* lines) {
  constexpr int kLineTiles = 8 / kWidth;  // code tiles in a line
  constexpr uint32_t kTileMask = ((1u << kWidth) - 1) * 0x01010101u;
  const int num_lines = count * kGroups / kQuad / kLineTiles;
  for (int line = 0; line < num_lines; ++line) {
    for (int part = 0; part < kParts; ++part) {
      uint8_t* to = lines + line * kLineBytes + part * kVecBytes;
      U32 bits{}, keep{};
      for (int k = 0; k < kLineTiles; ++k) {
        const int tile = line * kLineTiles + k, quad = tile / kGroups;
        const int token = tile % kGroups * kLanes + part * kVecLanes;
        U32 lane{};
        for (int e = 0; e < kQuad; ++e) {
          lane |= load<U32>(codes + (quad * kQuad + e) * kPageTokens + token) << (8 * e);
        }
        bits |= lane << (k * kWidth);
        if (span.full()) continue;
        const U32 kept = (U32)select_lanes(static_cast<uint32_t>(~span.mask() >> token),
                                           (F32)splat_u32(kTileMask), F32{});
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
      lines += band_bytes(kWidth, count);
    });
  }
}

// Scales and code ranges by channel: [padded_rank] each, zero past the rank.
struct ChannelScales {
  float* inverse;
  float* scale;
  float* mid;
  float* max_code;

  ChannelScales(const PackKeysParams& p, const HeadPlan& head, float* memory, int padded)
      : inverse(memory),
        scale(memory + padded),
        mid(memory + 2 * padded),
        max_code(memory + 3 * padded) {
    std::memset(memory, 0, sizeof(float) * 4 * padded);
    for (int j = 0; j < head.rank(); ++j) {
      scale[j] = p.codec.scale[head.first_channel + j];
      inverse[j] = scale[j] > 0 ? 1.0f / scale[j] : 0.0f;
      mid[j] = mid_code(channel_width(head, j));
      max_code[j] = 2 * mid[j];
    }
  }
};

// Codes [rank, 64] by channel of the latents [64, padded_rank], which become the negated decoded latents.
inline void quantize(ChannelScales c, int rank, float* latent, int32_t* codes) {
  const int padded = padded_rank(rank);
  for_each_channel_block(
      latent, rank,
      [&](int j, int t, const float* from) {
        const F32 mid = load<F32>(c.mid + j);
        F32 code = round_even(load<F32>(from) * load<F32>(c.inverse + j) + mid);
        // max comes first, so that a latent that overflowed to NaN becomes code 0.
        code = min(max(code, F32{}), load<F32>(c.max_code + j));
        store(latent + t * padded + j, (mid - code) * load<F32>(c.scale + j));
        return code;
      },
      [&](int j, int t, const F32* v) {
        for (int i = 0; i < kVecLanes; ++i)
          store(codes + (j + i) * kPageTokens + t, round_to_int(v[i]));
      });
}

// rows += residual [64, padded_rank] x basis_rows [rank, D]; errors are the squared lengths of the rows.
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

// Packs the keys of each head and chunk of pages.
inline void pack_keys(const PackKeysParams& p, const Executor& executor) {
  const LayoutView& layout = p.layout;
  const int64_t num_pages = spanned_pages(p.slot, p.keys.num_tokens);
  const int64_t chunks = ceil_div(num_pages, kTaskPages);
  const RopeTable table(p.codec.rope, p.position - p.slot % kPageTokens, num_pages);
  const int64_t dim = layout.head_dim, max_padded = padded_rank(static_cast<int>(dim));
  const int64_t worker_size = kPageTokens * dim + 2 * kPageTokens * max_padded + dim * max_padded +
                              4 * max_padded + (p.errors ? dim * dim : 0);
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * worker_size);

  for_each_task(executor, layout.num_heads * chunks, [&](int64_t task, int worker) {
    const HeadPlan& head = layout.heads[task / chunks];
    const int h = static_cast<int>(task / chunks), rank = head.rank();
    if (rank == 0 && !p.errors) return;
    float* rows = scratch.as<float>() + worker * worker_size;
    float* latent = rows + kPageTokens * dim;
    int32_t* codes = reinterpret_cast<int32_t*>(latent + kPageTokens * max_padded);
    float* basis_t = reinterpret_cast<float*>(codes + kPageTokens * max_padded);
    float* basis_rows = basis_t + dim * max_padded + 4 * max_padded;
    const uint16_t* basis = p.codec.basis + int64_t{head.first_channel} * dim;
    // Transpose the basis.
    transpose_basis(basis, rank, static_cast<int>(dim), basis_t);
    if (p.errors) {
      for (int64_t i = 0; i < rank * dim; i += kVecLanes)
        store(basis_rows + i, load_bfloat16(basis + i));
    }
    const ChannelScales scales(p, head, basis_t + dim * max_padded, padded_rank(rank));

    // Project, quantize and write page by page.
    const int64_t first = task % chunks * kTaskPages;
    for (int64_t index = first; index < std::min(first + kTaskPages, num_pages); ++index) {
      const PageSpan span = page_span(p.page_table, p.slot, p.keys.num_tokens, index);
      load_rows(p.keys, h, static_cast<int>(dim), {span.token, span.count, index, span.first},
                table, p.codec.mean + h * dim, rows);
      project_rows(rows, basis_t, rank, static_cast<int>(dim), latent);
      quantize(scales, rank, latent, codes);
      write_codes(head, codes, span, p.pages + span.page * layout.k_page_bytes + head.k_offset);
      if (p.errors) write_errors(p, rank, h, span, basis_rows, latent, rows);
    }
  });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
