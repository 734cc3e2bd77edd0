// The project stage: keys of one head as float rows, rotated back to position 0 and centred, and the
// latents of those rows on a basis. Pieces of other kernels; nothing is launched from here.
//
// Projection is a chain of single-rounded multiply-adds over ascending channels, the order that the
// CPU backends use, so that the same keys, basis and ranges give the same codes everywhere. A
// thread runs 4 such chains side by side, over one row and 4 channels of the basis, in 16-byte
// loads of both.
#pragma once

#include "kernels/machine/numbers.cuh"
#include "kernels/pages/page_span.cuh"
#include "kernels/machine/rope.cuh"

namespace svdq::device {

// Tokens to be read as rows, and the rotations that turn keys back. A run is 64 consecutive
// positions.
struct TokenRows {
  TokenSource source;
  int half;                        // pairs that RoPE rotated; 0: none
  const Floats2* offset_rotation;  // [64, half], null where half == 0
  const Floats2* page_rotation;    // [runs, half], of each run's offset 0; likewise
  bool aligned;                    // aligned_rows(source)
};

// Channels d .. d + 7 of a token at offset `offset` of run `run`, rotated back to position 0.
SVDQ_DEVICE Floats8 load_channels(const TokenRows& from, int head, int64_t token, int64_t run,
                                  int offset, int d) {
  const void* data = from.source.data;
  const int64_t row = head * from.source.head_stride + token * from.source.token_stride;
  const int half = from.half;
  Floats8 x = load_eight(data, from.source.dtype, row + d, from.aligned);
  if (d >= 2 * half) return x;
  // The other channels of the pairs: eight in a row, too, unless `half` cuts the eight in two.
  Floats8 other;
  if (half % 8 == 0) {
    other =
        load_eight(data, from.source.dtype, row + (d < half ? d + half : d - half), from.aligned);
  } else {
    SVDQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int partner = d + i < half ? d + i + half : d + i < 2 * half ? d + i - half : d + i;
      other.x[i] = load_number(data, from.source.dtype, row + partner);
    }
  }
  SVDQ_UNROLL
  for (int i = 0; i < 8; ++i) {
    const bool first = d + i < half, second = !first && d + i < 2 * half;
    const int pair = first ? d + i : second ? d + i - half : 0;
    const Floats2 turn = add_rotations(load(&from.page_rotation[run * half + pair]),
                                       load(&from.offset_rotation[int64_t{offset} * half + pair]));
    const float rotated = x.x[i] * turn.x + (first ? other.x[i] : -other.x[i]) * turn.y;
    x.x[i] = first || second ? rotated : x.x[i];
  }
  return x;
}

// 16 tokens of one head. Rows are apart by 4 banks, so that the 8 rows which 16-byte loads serve
// at once meet in none.
template <int kDim>
struct RowPlan {
  alignas(16) float row[kLanes][kDim + 4];
};

// Slots 16 group .. 16 group + 15 of page `page`, of those that `span` says.
struct SlotGroup {
  const PageSpan& span;
  int64_t page;
  int group;
};

// Loads a group of slots, less `mean` [D] unless that is null; slots outside the span are left alone.
// All `threads` of a block take part.
template <int kDim>
SVDQ_DEVICE void load_rows(RowPlan<kDim>& s, const TokenRows& from, int head, int dim,
                           const SlotGroup& slots, const float* mean, int threads) {
  const PageSpan& span = slots.span;
  const int eights = dim / 8;
  for (int i = thread_index(); i < kLanes * eights; i += threads) {
    const int row = i / eights, d = i % eights * 8, slot = slots.group * kLanes + row;
    if (!span.has(slot)) continue;
    const Floats8 x =
        load_channels(from, head, span.token + slot - span.first, slots.page, slot, d);
    SVDQ_UNROLL
    for (int q = 0; q < 8; q += 4) {
      Floats4 centred;
      SVDQ_UNROLL
      for (int k = 0; k < 4; ++k)
        centred.x[k] = mean ? x.x[q + k] - load(&mean[d + q + k]) : x.x[q + k];
      store(reinterpret_cast<Floats4*>(&s.row[row][d + q]), centred);
    }
  }
}

// Latents of a row on 4 rows of the basis, `basis` [4, dim] bfloat16.
template <int kDim>
SVDQ_DEVICE Floats4 project_row(const RowPlan<kDim>& s, int row, const uint16_t* basis, int dim) {
  Floats4 latent = {};
  for (int d = 0; d < dim; d += 8) {
    const Floats4* from = reinterpret_cast<const Floats4*>(&s.row[row][d]);
    const Floats4 low = load(from), high = load(from + 1);
    SVDQ_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Words4 words = load(reinterpret_cast<const Words4*>(basis + int64_t{j} * dim + d));
      SVDQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        const uint16_t bits = static_cast<uint16_t>(words.word[i / 2] >> i % 2 * 16);
        latent.x[j] = fused(i < 4 ? low.x[i] : high.x[i - 4], bfloat16_to_float(bits), latent.x[j]);
      }
    }
  }
  return latent;
}

}  // namespace svdq::device
