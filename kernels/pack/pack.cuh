// The pack stage: keys are un-rotated, centred, projected on the basis and quantized, values
// rotated and quantized by token, and their codes laid into page lines; for a prefill or for one page
// that leaves the window. Grid: x = page, y = head.
//
// Projection costs rank * D multiply-adds a token, which is nothing next to the prefill that made
// the token; so it keeps the CPU's order of them (kernels/pack/project.cuh) and gives the same bytes.
#pragma once

#include "kernels/machine/value_rotation.cuh"
#include "kernels/pages/heads.cuh"
#include "kernels/pack/project.cuh"
#include "kernels/pages/code_fragments.cuh"

namespace svdq::device {

inline constexpr int kPackThreads = 128;

template <int kDim>
struct PackPlan {
  RowPlan<kDim> rows;  // 16 tokens at a time
  alignas(4) uint8_t code[kDim][kPageTokens + 4];
};

// Code of a number, clamped; what is not a number becomes 0.
SVDQ_DEVICE uint8_t quantize(float x, int width) {
  const float top = static_cast<float>((1 << width) - 1);
  const float least = x > 0.0f ? x : 0.0f;
  return static_cast<uint8_t>(round_to_int(least < top ? least : top));
}

// Four lanes of a line from bits kFrom and up of codes [channel][slot]: unit `unit` of keys holds 4 channels of a token
// in a lane, of values 4 tokens of a channel. ors the codes into `bits` and the bits of slots
// outside the span, which must stay, into `keep`.
template <int kWidth, int kFrom, bool kValues, int kDim>
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
        const uint32_t code = load(&s.code[first_channel + channel][slot]);
        bits.word[i] |= (code >> kFrom & kMask) << at;
      } else {
        keep.word[i] |= kMask << at;
      }
    }
  }
}

// Writes the lines of `num_units` units.
template <int kWidth, int kFrom, bool kValues, int kDim>
SVDQ_DEVICE void write_lines(const PackPlan<kDim>& s, const PageSpan& span, int first_channel,
                             int num_units, uint8_t* lines) {
  constexpr int kUnits = 8 / kWidth;
  for (int i = thread_index(); i < num_units / kUnits * 4; i += kPackThreads) {
    Words4 bits = {}, keep = {};
    SVDQ_UNROLL
    for (int k = 0; k < kUnits; ++k) {
      gather_unit<kWidth, kFrom, kValues>(s, span, first_channel, i / 4 * kUnits + k, i % 4,
                                          k * kWidth, bits, keep);
    }
    Words4* to = reinterpret_cast<Words4*>(lines) + i;
    if (span.count < kPageTokens) {
      const Words4 before = load(to);
      for (int w = 0; w < 4; ++w) bits.word[w] |= before.word[w] & keep.word[w];
    }
    store(to, bits);
  }
}

// Codes of 16 slots: each half warp takes 4 channels, which have one width, and a lane a slot.
template <int kDim>
SVDQ_DEVICE void quantize_latents(PackPlan<kDim>& s, const PackKeysParams& p, const HeadPlan& head,
                                  const PageSpan& span, int group) {
  constexpr int kTeams = kPackThreads / kLanes;
  const int dim = p.layout.head_dim, lane = lane_index() % kLanes, slot = group * kLanes + lane;
  if (!span.has(slot)) return;
  for (int j = thread_index() / kLanes * kQuad; j < head.rank(); j += kTeams * kQuad) {
    const int64_t channel = head.first_channel + j;
    const int width = channel_width(head, j);
    const float mid = static_cast<float>((1 << width) - 1) / 2;
    const Floats4 latent = project_row(s.rows, lane, p.codec.basis + channel * dim, dim);
    SVDQ_UNROLL
    for (int k = 0; k < kQuad; ++k) {
      const float scale = load(&p.codec.scale[channel + k]);
      const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      store(&s.code[j + k][slot], quantize(fused(latent.x[k], inverse, mid), width));
    }
  }
}

// The keys of head block_y() in one page, which is run `run` of `keys`.
template <int kDim>
SVDQ_DEVICE void pack_page_keys(const PackKeysParams& p, const TokenRows& keys,
                                const HeadPlan& head, const PageSpan& span, int64_t run) {
  PackPlan<kDim>& s = shared_memory<PackPlan<kDim>>();
  const int dim = p.layout.head_dim, head_index = block_y();
  const float* mean = p.codec.mean + int64_t{head_index} * dim;

  for (int group = 0; group < kGroups; ++group) {
    load_rows(s.rows, keys, head_index, dim, {span, run, group}, mean, kPackThreads);
    sync_threads();
    quantize_latents(s, p, head, span, group);
    sync_threads();
  }

  uint8_t* lines = p.pages + span.page * p.layout.k_page_bytes + head.k_offset;
  int channel = 0;
  for_each_part(head, [&]<int kWidth>(int count) {
    write_lines<kWidth, 0, false>(s, span, channel, count / kQuad * kGroups, lines);
    channel += count;
    lines += band_bytes(kWidth, count);
  });
}

template <int kDim>
SVDQ_KERNEL(kPackThreads)
pack_keys_kernel(PackKeysParams p, TokenRows keys, HeadTable heads, PageIds ids,
                 int64_t first_chunk) {
  const PageSpan span = page_span(ids, p.slot, p.keys.num_tokens, first_chunk, block_x());
  pack_page_keys<kDim>(p, keys, head_plan(heads, block_y()), span, first_chunk + block_x());
}

// Rotates and quantizes the values of one token, a row [D] of shared memory, by a team of 16 lanes; gives the byte
// of its scale. Partial sums of the channels of a lane ascend and are added halves first, as the CPU backends do.
// `code(channel, code)` takes the codes.
template <typename Code>
SVDQ_DEVICE int quantize_value(float* row, const ValueLayout& value, const Code& code) {
  const int lane = lane_index() % kLanes, dim = value.head_dim;
  TeamRotation(row, dim).rotate();
  const auto sum_of = [&](const auto& add) {
    float sum = 0.0f;
    for (int d = lane; d < dim; d += kLanes) sum = add(sum, load(&row[d]));
    SVDQ_UNROLL
    for (int half = kLanes / 2; half > 0; half /= 2) sum += shuffle_xor(sum, half, team_members());
    return sum;
  };
  const float square = sum_of([](float sum, float x) { return fused(x, x, sum); });
  const float step = value_step(value.bits) * square_root(square / static_cast<float>(dim));
  const float inverse = step > 0.0f ? 1.0f / step : 0.0f, middle = mid_code(value.bits);
  const auto code_of = [&](float x) { return quantize(fused(x, inverse, middle), value.bits); };
  const float product = sum_of(
      [&](float sum, float x) { return fused(x, static_cast<float>(code_of(x)) - middle, sum); });
  for (int d = lane; d < dim; d += kLanes) code(d, code_of(load(&row[d])));
  constexpr float kLargestHalf = 65504.0f;
  const float scale = square / product;
  return step > 0.0f ? scale_byte(float_to_half(scale < kLargestHalf ? scale : kLargestHalf)) : 0;
}

// The packed values of head block_y() in one page; `aligned` as in TokenRows.
template <int kDim>
SVDQ_DEVICE void pack_page_values(const PackValuesParams& p, bool aligned, const HeadPlan& head,
                                  const PageSpan& span) {
  constexpr int kWarps = kPackThreads / kWarpSize;
  PackPlan<kDim>& s = shared_memory<PackPlan<kDim>>();
  const ValueLayout& value = head.value;
  const TokenRows rows{p.values, 0, nullptr, nullptr, aligned};
  uint8_t* page = p.pages + span.page * p.layout.v_page_bytes + head.v_offset;
  for (int group = 0; group < kGroups; ++group) {
    load_rows(s.rows, rows, block_y(), value.head_dim, {span, 0, group}, nullptr, kPackThreads);
    sync_threads();
    // The rows of a warp's two teams are apart by 16 banks.
    for (int first = 0; first < kLanes; first += 2 * kWarps) {
      const int row = first + warp_index() + lane_index() / kLanes * kWarps;
      const int slot = group * kLanes + row;
      if (!span.has(slot)) continue;
      const int scale = quantize_value(s.rows.row[row], value,
                                       [&](int d, uint8_t code) { store(&s.code[d][slot], code); });
      if (lane_index() % kLanes == 0) store(&page[slot], static_cast<uint8_t>(scale));
    }
    sync_threads();
  }
  for_each_plane(value, [&]<int kWidth, int kShift>(int64_t offset) {
    write_lines<kWidth, kShift, true>(s, span, 0, value.head_dim / kLanes * kTokenQuads,
                                      page + offset);
  });
}

template <int kDim>
SVDQ_KERNEL(kPackThreads)
pack_values_kernel(PackValuesParams p, bool aligned, HeadTable heads, PageIds ids,
                   int64_t first_chunk) {
  pack_page_values<kDim>(p, aligned, head_plan(heads, block_y()),
                         page_span(ids, p.slot, p.values.num_tokens, first_chunk, block_x()));
}

// Exact values: rows are copied number by number, since a source may be aligned to no more.
template <typename Number>
SVDQ_DEVICE void copy_page_values(const PackValuesParams& p, const PageSpan& span) {
  const int dim = p.layout.head_dim;
  Number* page = reinterpret_cast<Number*>(p.pages + span.page * p.layout.v_page_bytes) +
                 block_y() * kPageTokens * dim;
  const Number* from = static_cast<const Number*>(p.values.data) + block_y() * p.values.head_stride;
  for (int i = thread_index(); i < span.count * dim; i += kPackThreads) {
    const int64_t row = i / dim, d = i % dim;
    store(&page[(span.first + row) * dim + d],
          load(&from[(span.token + row) * p.values.token_stride + d]));
  }
}

template <typename Number>
SVDQ_KERNEL(kPackThreads)
copy_values_kernel(PackValuesParams p, PageIds ids, int64_t first_chunk) {
  copy_page_values<Number>(p, page_span(ids, p.slot, p.values.num_tokens, first_chunk, block_x()));
}

// Shapes of the launches over `pages` pages.
template <int kDim>
LaunchShape pack_keys_launch(const PackKeysParams& p, int pages) {
  return {pages, p.layout.num_heads, 1, kPackThreads, static_cast<int>(sizeof(PackPlan<kDim>))};
}
template <int kDim>
LaunchShape pack_values_launch(const PackValuesParams& p, int pages) {
  return {pages, p.layout.num_heads, 1, kPackThreads,
          p.layout.packs_values() ? static_cast<int>(sizeof(PackPlan<kDim>)) : 0};
}

}  // namespace svdq::device
