// Reading pages back into plain tensors, for inspection and tests: codes as bytes, keys and values
// as floats. Grid: x = page, y = head. Attention never does this; nothing here is tuned beyond
// loads and stores that neighbouring lanes share.
#pragma once

#include "kernels/pages/heads.cuh"
#include "kernels/machine/numbers.cuh"
#include "kernels/pages/page_span.cuh"
#include "kernels/machine/rope.cuh"
#include "kernels/machine/value_rotation.cuh"
#include "kernels/pages/code_fragments.cuh"

namespace svdq::device {

inline constexpr int kUnpackThreads = 128;

// Calls fn.template operator()<width>(first, count, lines) for every band of a head: its first
// channel, counted in the head, its channels and its lines.
template <typename Fn>
SVDQ_DEVICE void for_each_coded_band(const HeadPlan& head, const uint8_t* page, const Fn& fn) {
  int first = 0;
  const uint8_t* lines = page + head.k_offset;
  const auto band = [&]<int kWidth>(int count) {
    fn.template operator()<kWidth>(first, count, lines);
    first += count;
    lines += band_bytes(kWidth, count);
  };
  for_each_band(head.pre, band);
  for_each_band(head.post, band);
}

// The codes of 4 channels and a slot, or of 4 slots and a channel, in 4 bytes.
template <int kWidth>
SVDQ_DEVICE uint32_t load_codes(const uint8_t* lines, int unit, int lane) {
  constexpr uint32_t kMask = ((1u << kWidth) - 1) * 0x01010101u;
  const CodeAddress place = code_tile_address(kWidth, unit, lane, 0);
  return load(reinterpret_cast<const uint32_t*>(lines + place.byte)) >> place.shift & kMask;
}

template <int kWidth>
SVDQ_DEVICE uint32_t load_key_codes(const uint8_t* lines, int quad, int slot) {
  return load_codes<kWidth>(lines, quad * kGroups + slot / kLanes, slot % kLanes);
}

SVDQ_DEVICE float code_of(uint32_t codes, int i) {
  return static_cast<float>(codes >> (8 * i) & 0xff);
}

// codes [num_tokens, R]. Every band is a multiple of 4 channels, so 4 codes are stored at once.
SVDQ_KERNEL(kUnpackThreads)
unpack_codes_kernel(UnpackParams p, HeadTable heads, PageIds ids, int64_t first_chunk,
                    uint8_t* codes) {
  const HeadPlan head = head_plan(heads, block_y());
  const PageSpan span = page_span(ids, p.slot, p.num_tokens, first_chunk, block_x());
  uint8_t* to = codes + span.token * p.layout.rank + head.first_channel;
  for_each_coded_band(
      head, p.pages + span.page * p.layout.k_page_bytes,
      [&]<int kWidth>(int first, int count, const uint8_t* lines) {
        const int quads = count / kQuad;
        for (int i = thread_index(); i < span.count * quads; i += kUnpackThreads) {
          const int t = i / quads, quad = i % quads;
          store(reinterpret_cast<uint32_t*>(to + int64_t{t} * p.layout.rank + first + quad * kQuad),
                load_key_codes<kWidth>(lines, quad, span.first + t));
        }
      });
}

// Codec, rotations and output of decoded keys.
struct DecodeParams {
  Rope rope;                       // half == 0: none
  const Floats2* offset_rotation;  // [64, half]
  const Floats2* page_rotation;    // [pages spanned, half], of each page's slot 0
  const uint16_t* basis;           // [R, D] bfloat16
  const float* scale;              // [R]
  const float* mean;               // [H, D]
  float* keys;                     // [H, num_tokens, D]
};

template <int kDim>
struct UnpackPlan {
  alignas(16) float latent[kDim][kLanes];  // [channel][slot]: a key's share of a row of the basis
  float row[kLanes][kDim + 1];             // rows apart in the banks
};

// Latents of the 16 slots of a group, whether they are in the span or not.
template <int kDim>
SVDQ_DEVICE void decode_latents(UnpackPlan<kDim>& s, const DecodeParams& d, const HeadPlan& head,
                                const uint8_t* page, int group) {
  for_each_coded_band(head, page, [&]<int kWidth>(int first, int count, const uint8_t* lines) {
    constexpr float kMid = static_cast<float>((1 << kWidth) - 1) / 2;
    for (int i = thread_index(); i < count / kQuad * kLanes; i += kUnpackThreads) {
      const int lane = i % kLanes, quad = i / kLanes;
      const uint32_t codes = load_key_codes<kWidth>(lines, quad, group * kLanes + lane);
      SVDQ_UNROLL
      for (int e = 0; e < kQuad; ++e) {
        const int j = first + quad * kQuad + e;
        store(&s.latent[j][lane],
              (code_of(codes, e) - kMid) * load(&d.scale[head.first_channel + j]));
      }
    }
  });
}

// Rows [16, D] = mean + latents x basis; a thread has a channel of 8 slots.
template <int kDim>
SVDQ_DEVICE void decode_rows(UnpackPlan<kDim>& s, const DecodeParams& p, const HeadPlan& head,
                             int head_index, int dim) {
  constexpr int kSlots = 8;
  for (int i = thread_index(); i < dim * (kLanes / kSlots); i += kUnpackThreads) {
    const int d = i % dim, slot = i / dim * kSlots;
    float sum[kSlots];
    const float mean = load(&p.mean[int64_t{head_index} * dim + d]);
    SVDQ_UNROLL
    for (float& x : sum) x = mean;
    for (int j = 0; j < head.rank(); ++j) {
      const float basis =
          bfloat16_to_float(load(&p.basis[int64_t{head.first_channel + j} * dim + d]));
      const Floats4* latents = reinterpret_cast<const Floats4*>(&s.latent[j][slot]);
      SVDQ_UNROLL
      for (int q = 0; q < kSlots / 4; ++q) {
        const Floats4 four = load(latents + q);
        SVDQ_UNROLL
        for (int k = 0; k < 4; ++k) sum[q * 4 + k] = fused(four.x[k], basis, sum[q * 4 + k]);
      }
    }
    SVDQ_UNROLL
    for (int k = 0; k < kSlots; ++k) store(&s.row[slot + k][d], sum[k]);
  }
}

// Writes the group's slots that lie in the span, rotated to their positions.
template <int kDim>
SVDQ_DEVICE void store_keys(const UnpackPlan<kDim>& s, const DecodeParams& p, const PageSpan& span,
                            int group, int64_t run, int dim, float* keys) {
  const int half = p.rope.rotary_pairs;
  for (int i = thread_index(); i < kLanes * dim; i += kUnpackThreads) {
    const int row = i / dim, d = i % dim, slot = group * kLanes + row;
    if (!span.has(slot)) continue;
    float x = load(&s.row[row][d]);
    if (d < 2 * half) {
      const bool first = d < half;
      const int pair = first ? d : d - half;
      const Floats2 turn = add_rotations(load(&p.page_rotation[run * half + pair]),
                                         load(&p.offset_rotation[int64_t{slot} * half + pair]));
      const float other = load(&s.row[row][first ? d + half : pair]);
      x = x * turn.x + (first ? -other : other) * turn.y;
    }
    store(&keys[(span.token + slot - span.first) * dim + d], x);
  }
}

// The keys of head block_y() in one page, which is run `run` of the rotations.
template <int kDim>
SVDQ_DEVICE void unpack_page_keys(const UnpackParams& p, const HeadPlan& head, const PageSpan& span,
                                  int64_t run, const DecodeParams& d) {
  UnpackPlan<kDim>& s = shared_memory<UnpackPlan<kDim>>();
  const int dim = p.layout.head_dim;
  const uint8_t* page = p.pages + span.page * p.layout.k_page_bytes;
  float* keys = d.keys + block_y() * p.num_tokens * dim;
  for (int group = 0; group < kGroups; ++group) {
    decode_latents(s, d, head, page, group);
    sync_threads();
    decode_rows(s, d, head, block_y(), dim);
    sync_threads();
    store_keys(s, d, span, group, run, dim, keys);
  }
}

template <int kDim>
SVDQ_KERNEL(kUnpackThreads)
unpack_keys_kernel(UnpackParams p, HeadTable heads, PageIds ids, int64_t first_chunk,
                   DecodeParams d) {
  const PageSpan span = page_span(ids, p.slot, p.num_tokens, first_chunk, block_x());
  unpack_page_keys<kDim>(p, head_plan(heads, block_y()), span, first_chunk + block_x(), d);
}

// errors [H, stride] of tokens first .. first + num_tokens - 1: squared distance of a key from
// decoded [H, num_tokens, D]. Grid: x = runs of tokens, one a warp, y = head.
SVDQ_KERNEL(kUnpackThreads)
key_errors_kernel(TokenSource keys, int64_t first, int64_t num_tokens, int dim,
                  const float* decoded, float* errors, int64_t stride) {
  constexpr int kWarps = kUnpackThreads / kWarpSize;
  const int64_t token = int64_t{block_x()} * kWarps + warp_index();
  if (token >= num_tokens) return;
  const int64_t key = block_y() * keys.head_stride + (first + token) * keys.token_stride;
  const float* other = decoded + (block_y() * num_tokens + token) * dim;
  float sum = 0.0f;
  for (int d = lane_index(); d < dim; d += kWarpSize) {
    const float off = load_number(keys.data, keys.dtype, key + d) - load(&other[d]);
    sum = fused(off, off, sum);
  }
  for (int mask = 1; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
  if (lane_index() == 0) store(&errors[block_y() * stride + first + token], sum);
}

inline LaunchShape key_errors_launch(int num_heads, int64_t num_tokens) {
  constexpr int kWarps = kUnpackThreads / kWarpSize;
  return {static_cast<int>((num_tokens + kWarps - 1) / kWarps), num_heads, 1, kUnpackThreads, 0};
}

// Rows of 16 slots of rotated values: apart by 4 banks, so that rows 4 apart, which a warp rotates at once, meet in
// none.
struct UnpackRows {
  alignas(16) float row[4];  // more follow

  SVDQ_DEVICE float* of(int i, int dim) { return row + i * (dim + 4); }
};

SVDQ_HOST_DEVICE constexpr int unpack_rows_bytes(int dim) {
  return kLanes * (dim + 4) * static_cast<int>(sizeof(float));
}

// Codes of the 16 slots of a group as rows of numbers, times their scales; a thread has a channel of 4 slots.
SVDQ_DEVICE void decode_values(UnpackRows& s, const ValueLayout& value, const uint8_t* page,
                               int group) {
  const int dim = value.head_dim;
  for (int i = thread_index(); i < kLanes / kQuad * dim; i += kUnpackThreads) {
    const int quad = i / dim, d = i % dim;
    const int unit = d / kLanes * kTokenQuads + group * kGroups + quad;
    uint32_t codes = 0;
    for_each_plane(value, [&]<int kWidth, int kShift>(int64_t offset) {
      codes |= load_codes<kWidth>(page + offset, unit, d % kLanes) << kShift;
    });
    SVDQ_UNROLL
    for (int e = 0; e < kQuad; ++e) {
      const int slot = quad * kQuad + e;
      const float scale = half_to_float(scale_as_half(load(&page[group * kLanes + slot])));
      store(&s.of(slot, dim)[d], (code_of(codes, e) - mid_code(value.bits)) * scale);
    }
  }
}

// values [H, num_tokens, D], of packed values.
SVDQ_KERNEL(kUnpackThreads)
unpack_values_kernel(UnpackParams p, HeadTable heads, PageIds ids, int64_t first_chunk,
                     float* values) {
  constexpr int kWarps = kUnpackThreads / kWarpSize;
  UnpackRows& s = shared_memory<UnpackRows>();
  const HeadPlan head = head_plan(heads, block_y());
  const int dim = p.layout.head_dim;
  const PageSpan span = page_span(ids, p.slot, p.num_tokens, first_chunk, block_x());
  const uint8_t* page = p.pages + span.page * p.layout.v_page_bytes + head.v_offset;
  float* to = values + (block_y() * p.num_tokens + span.token) * dim;
  for (int group = 0; group < kGroups; ++group) {
    decode_values(s, head.value, page, group);
    sync_threads();
    for (int first = 0; first < kLanes; first += 2 * kWarps) {
      const int row = first + warp_index() + lane_index() / kLanes * kWarps;
      TeamRotation(s.of(row, dim), dim).unrotate();
    }
    sync_threads();
    for (int i = thread_index(); i < kLanes * dim; i += kUnpackThreads) {
      const int row = i / dim, d = i % dim, slot = group * kLanes + row;
      if (span.has(slot))
        store(&to[int64_t{slot - span.first} * dim + d], load(&s.of(row, dim)[d]));
    }
    sync_threads();
  }
}

// The same for exact values of `dtype`.
SVDQ_KERNEL(kUnpackThreads)
widen_values_kernel(UnpackParams p, PageIds ids, int64_t first_chunk, DataType dtype,
                    float* values) {
  const int dim = p.layout.head_dim;
  const PageSpan span = page_span(ids, p.slot, p.num_tokens, first_chunk, block_x());
  const uint8_t* page = p.pages + span.page * p.layout.v_page_bytes;
  const int64_t from = (int64_t{block_y()} * kPageTokens + span.first) * dim;
  float* to = values + (block_y() * p.num_tokens + span.token) * dim;
  for (int i = thread_index(); i < span.count * dim; i += kUnpackThreads)
    store(&to[i], load_number(page, dtype, from + i));
}

// The launch over `pages` pages; bytes of shared memory as the kernel takes.
inline LaunchShape unpack_launch(const UnpackParams& p, int pages, int smem_bytes = 0) {
  return {pages, p.layout.num_heads, 1, kUnpackThreads, smem_bytes};
}

}  // namespace svdq::device
