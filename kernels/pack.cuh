// The pack stage: keys are un-rotated, centred, projected on the basis and quantized, values
// quantized by token and group, and their codes laid into page lines; for a prefill or for one page
// that leaves the window. Grid: x = page, y = head.
//
// Projection is a chain of single-rounded multiply-adds over ascending channels, the order that the
// CPU backends use, so that the same keys, basis and ranges give the same bytes everywhere; it
// costs rank * D multiply-adds a token, which is nothing beside the prefill that made the token.
#pragma once

#include "kernels/heads.cuh"
#include "kernels/numbers.cuh"
#include "kernels/pages.cuh"
#include "kernels/unpack.cuh"

namespace svdq::device {

inline constexpr int kPackThreads = 128;
inline constexpr int kPackWarps = kPackThreads / kWarpSize;

// Rotations by slot and to the pages' first positions; null where the layout codes keys after RoPE.
struct PackWork {
  const Floats2* offset_rotation;  // [64, half]
  const Floats2* page_rotation;    // [pages spanned, half], of each page's slot 0
  int64_t first_run;               // of the pages spanned, the first one of this launch
};

template <int kDim>
struct PackPlan {
  float row[kLanes][kDim + 1];  // 16 tokens at a time; rows apart in the banks
  alignas(4) uint8_t code[kDim][kPageTokens + 4];
};

// Code of a number, clamped; what is not a number becomes 0.
SVDQ_DEVICE uint8_t quantize(float x, int width) {
  const float top = static_cast<float>((1 << width) - 1);
  const float least = x > 0.0f ? x : 0.0f;
  return static_cast<uint8_t>(round_to_int(least < top ? least : top));
}

// Four lanes of a line from codes [channel][slot]: unit `unit` of keys holds 4 channels of a token
// in a lane, of values 4 tokens of a channel. ors the codes into `bits` and the bits of slots
// outside the span, which must stay, into `keep`.
template <int kWidth, bool kValues, int kDim>
SVDQ_DEVICE void gather_unit(const PackPlan<kDim>& s, const PageSpan& span, int first_channel,
                             int unit, int piece, int shift, Words4& bits, Words4& keep) {
  constexpr uint32_t kMask = (1u << kWidth) - 1;
  SVDQ_UNROLL
  for (int e = 0; e < kQuad; ++e) {
    SVDQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int lane = piece * 4 + i;
      const int channel = kValues ? unit / kTokenQuads * kLanes + lane : unit / kGroups * kQuad + e;
      const int slot = kValues ? unit % kTokenQuads * kQuad + e : unit % kGroups * kLanes + lane;
      const int at = 8 * e + shift;
      if (span.has(slot)) {
        bits.word[i] |= uint32_t{load(&s.code[first_channel + channel][slot])} << at;
      } else {
        keep.word[i] |= kMask << at;
      }
    }
  }
}

// Writes the lines of `num_units` units.
template <int kWidth, bool kValues, int kDim>
SVDQ_DEVICE void write_lines(const PackPlan<kDim>& s, const PageSpan& span, int first_channel,
                             int num_units, uint8_t* lines) {
  constexpr int kUnits = 8 / kWidth;
  for (int i = thread_index(); i < num_units / kUnits * 4; i += kPackThreads) {
    Words4 bits = {}, keep = {};
    SVDQ_UNROLL
    for (int k = 0; k < kUnits; ++k) {
      gather_unit<kWidth, kValues>(s, span, first_channel, i / 4 * kUnits + k, i % 4, k * kWidth,
                                   bits, keep);
    }
    Words4* to = reinterpret_cast<Words4*>(lines) + i;
    if (span.count < kPageTokens) {
      const Words4 before = load(to);
      for (int w = 0; w < 4; ++w) bits.word[w] |= before.word[w] & keep.word[w];
    }
    store(to, bits);
  }
}

// Loads 16 slots of one head; slots outside the span are left alone.
template <int kDim>
SVDQ_DEVICE void load_rows(PackPlan<kDim>& s, const TokenSource& from, int head, int head_dim,
                           const PageSpan& span, int group) {
  for (int i = thread_index(); i < kLanes * head_dim; i += kPackThreads) {
    const int slot = group * kLanes + i / head_dim, d = i % head_dim;
    if (!span.has(slot)) continue;
    const int64_t at =
        head * from.head_stride + (span.token + slot - span.first) * from.token_stride;
    store(&s.row[i / head_dim][d], load_number(from.data, from.dtype, at + d));
  }
}

// Turns pairs back to position 0: the angle is that of the page's first position plus the slot's.
template <int kDim>
SVDQ_DEVICE void unrotate_rows(PackPlan<kDim>& s, const PackWork& work, int half,
                               const PageSpan& span, int group) {
  for (int i = thread_index(); i < kLanes * half; i += kPackThreads) {
    const int row = i / half, pair = i % half, slot = group * kLanes + row;
    if (!span.has(slot)) continue;
    const Floats2 base = load(&work.page_rotation[(work.first_run + block_x()) * half + pair]);
    const Floats2 offset = load(&work.offset_rotation[int64_t{slot} * half + pair]);
    const float c = base.x * offset.x - base.y * offset.y;
    const float sine = base.y * offset.x + base.x * offset.y;
    const float x = load(&s.row[row][pair]), y = load(&s.row[row][pair + half]);
    store(&s.row[row][pair], x * c + y * sine);
    store(&s.row[row][pair + half], y * c - x * sine);
  }
}

// Calls fn.template operator()<width>(count) for every band of a head, core channels first.
template <typename Fn>
SVDQ_DEVICE void for_each_part(const HeadPlan& head, const Fn& fn) {
  for_each_band(head.core, fn);
  for_each_band(head.tail, fn);
}

// Codes of `count` channels of 16 slots, from row `basis_row` of the basis on: each half warp takes
// a channel, a lane a slot.
template <int kWidth, int kDim>
SVDQ_DEVICE void quantize_latents(PackPlan<kDim>& s, const PackKeysParams& p, int64_t basis_row,
                                  int first, int count, const float* mean, const PageSpan& span,
                                  int group) {
  constexpr float kMid = static_cast<float>((1 << kWidth) - 1) / 2;
  const int dim = p.layout.head_dim, lane = lane_index() % kLanes, slot = group * kLanes + lane;
  if (!span.has(slot)) return;
  for (int j = warp_index() * 2 + lane_index() / kLanes; j < count; j += kPackWarps * 2) {
    const uint16_t* basis = p.basis + (basis_row + j) * dim;
    float latent = 0.0f;
    for (int d = 0; d < dim; ++d) {
      latent =
          fused(load(&s.row[lane][d]) - load(&mean[d]), bfloat16_to_float(load(&basis[d])), latent);
    }
    const float scale = load(&p.scale[basis_row + j]);
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    store(&s.code[first + j][slot], quantize(fused(latent, inverse, kMid), kWidth));
  }
}

template <int kDim>
SVDQ_KERNEL(kPackThreads)
pack_keys_kernel(PackKeysParams p, PackWork work, HeadTable heads, PageIds ids) {
  PackPlan<kDim>& s = shared_memory<PackPlan<kDim>>();
  const int dim = p.layout.head_dim, head_index = block_y();
  const HeadPlan head = head_plan(heads, head_index);
  const PageSpan span = page_span(ids, p.slot, p.keys.num_tokens, work.first_run, block_x());
  const float* mean = p.mean + int64_t{head_index} * dim;

  for (int group = 0; group < kGroups; ++group) {
    load_rows(s, p.keys, head_index, dim, span, group);
    sync_threads();
    if (p.rope.half > 0) {
      unrotate_rows(s, work, p.rope.half, span, group);
      sync_threads();
    }
    int first = 0;
    for_each_part(head, [&]<int kWidth>(int count) {
      quantize_latents<kWidth>(s, p, head.first_channel + first, first, count, mean, span, group);
      first += count;
    });
    sync_threads();
  }

  uint8_t* lines = p.pages + span.page * p.layout.k_page_bytes + head.k_offset;
  int channel = 0;
  for_each_part(head, [&]<int kWidth>(int count) {
    write_lines<kWidth, false>(s, span, channel, count / kQuad * kGroups, lines);
    channel += count;
    lines += count * kWidth * kPageTokens / 8;
  });
}

// Scale and zero point of one token's group, and its codes.
template <int kDim>
SVDQ_DEVICE void quantize_group(PackPlan<kDim>& s, const ValueLayout& value, int row, int slot,
                                int group, uint8_t* page) {
  const int first = group * value.group_size;
  float least = load(&s.row[row][first]), most = least;
  for (int d = first + 1; d < first + value.group_size; ++d) {
    const float x = load(&s.row[row][d]);
    least = x < least ? x : least;
    most = x > most ? x : most;
  }
  const uint16_t scale_bits =
      float_to_half((most - least) / static_cast<float>((1 << value.bits) - 1));
  const uint16_t zero_bits = float_to_half(least);
  const int64_t at = int64_t{group} * kPageTokens + slot;
  store(reinterpret_cast<uint16_t*>(page + value.scale_offset()) + at, scale_bits);
  store(reinterpret_cast<uint16_t*>(page + value.zero_offset()) + at, zero_bits);
  const float scale = half_to_float(scale_bits), zero = half_to_float(zero_bits);
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int d = first; d < first + value.group_size; ++d)
    store(&s.code[d][slot], quantize((load(&s.row[row][d]) - zero) * inverse, value.bits));
}

// Packed values, 2 or 4 bits.
template <int kDim, int kBits>
SVDQ_KERNEL(kPackThreads)
pack_values_kernel(PackValuesParams p, PageIds ids, int64_t first_run) {
  PackPlan<kDim>& s = shared_memory<PackPlan<kDim>>();
  const ValueLayout& value = p.layout.value;
  const PageSpan span = page_span(ids, p.slot, p.values.num_tokens, first_run, block_x());
  uint8_t* page = p.pages + span.page * p.layout.v_page_bytes + block_y() * value.page_bytes();
  for (int group = 0; group < kGroups; ++group) {
    load_rows(s, p.values, block_y(), value.head_dim, span, group);
    sync_threads();
    for (int i = thread_index(); i < kLanes * value.groups(); i += kPackThreads) {
      const int row = i % kLanes, slot = group * kLanes + row;
      if (span.has(slot)) quantize_group(s, value, row, slot, i / kLanes, page);
    }
    sync_threads();
  }
  write_lines<kBits, true>(s, span, 0, value.head_dim / kLanes * kTokenQuads,
                           page + value.code_offset());
}

// Exact values: rows are copied number by number, since a source may be aligned to no more.
template <typename Number>
SVDQ_KERNEL(kPackThreads)
copy_values_kernel(PackValuesParams p, PageIds ids, int64_t first_run) {
  const PageSpan span = page_span(ids, p.slot, p.values.num_tokens, first_run, block_x());
  const int dim = p.layout.head_dim;
  Number* page = reinterpret_cast<Number*>(p.pages + span.page * p.layout.v_page_bytes +
                                           block_y() * p.layout.value.page_bytes());
  const Number* from = static_cast<const Number*>(p.values.data) + block_y() * p.values.head_stride;
  for (int i = thread_index(); i < span.count * dim; i += kPackThreads) {
    const int64_t row = i / dim, d = i % dim;
    store(&page[(span.first + row) * dim + d],
          load(&from[(span.token + row) * p.values.token_stride + d]));
  }
}

// Shapes of the launches over `pages` pages.
template <int kDim>
LaunchShape pack_keys_launch(const PackKeysParams& p, int pages) {
  return {pages, p.layout.num_heads, 1, kPackThreads, static_cast<int>(sizeof(PackPlan<kDim>))};
}
template <int kDim>
LaunchShape pack_values_launch(const PackValuesParams& p, int pages) {
  return {pages, p.layout.num_heads, 1, kPackThreads,
          p.layout.value.packed() ? static_cast<int>(sizeof(PackPlan<kDim>)) : 0};
}

}  // namespace svdq::device
