// Factors of the codes of a head as tensor-core fragments, prepared once for all pages.
//
// Channels coded after RoPE are folded into the queries:
//   q . k = q . mean + sum_j (code_j - mid_j) * w_j,   w_j = scale_j * (q . basis_j),
// so a coded channel costs one multiply-add a token and query row. Channels coded before RoPE are
// reconstructed: column d of a key is the same sum with w_j = scale_j * basis_jd and mean_d for the
// constant. Either way 8 rows of weights (query rows, or columns of the key) make a tile: B
// fragments of halves, each row in a unit of its own. What the middle codes contribute is taken off
// with the rounded weights, so that their rounding meets code - mid and not the larger code.
#pragma once

#include "kernels/attend/dot_rows.cuh"
#include "kernels/pages/code_fragments.cuh"

namespace svdq::device {

// The parts of a head whose lines a scorer reads: for_each_band over them, and their bytes.
struct PrePart {
  template <typename Fn>
  SVDQ_DEVICE static void for_each(const HeadPlan& head, const Fn& fn) {
    for_each_band(head.pre, fn);
  }
  SVDQ_DEVICE static int bytes(const HeadPlan& head) { return head.pre.page_bytes(); }
};
struct PostPart {
  template <typename Fn>
  SVDQ_DEVICE static void for_each(const HeadPlan& head, const Fn& fn) {
    for_each_band(head.post, fn);
  }
  SVDQ_DEVICE static int bytes(const HeadPlan& head) { return head.post.page_bytes(); }
};
struct BothParts {
  template <typename Fn>
  SVDQ_DEVICE static void for_each(const HeadPlan& head, const Fn& fn) {
    for_each_part(head, fn);
  }
  SVDQ_DEVICE static int bytes(const HeadPlan& head) { return head.page_bytes(); }
};

// Rows' largest weight in their unit: high in the range of a half, so that small weights keep their
// digits, and low enough that no rounding overflows.
inline constexpr float kLargestFolded = 256.0f;

template <int kDim>
struct FoldPlan {
  QueryRows<kDim> query;  // folded channels only
  float scale[kDim];      // likewise
  alignas(16) float mean[kDim];
  float weights[kRowTile][kDim];
  float constant[kRowTile];
  float step[kRowTile];
  float middle[kAttendWarps][kRowTile];  // sum of mid * rounded weight, by warp
};

// Turns the rows in s.weights and s.constant into fragments, units and offsets of tile `tile`.
template <int kDim>
SVDQ_DEVICE void finish_tile(FoldPlan<kDim>& s, const Bands& bands, const Weights& weights,
                             int64_t tile, int dim) {
  const int lane = lane_index(), warp = warp_index(), rank = bands.rank();
  // Unit of every row.
  for (int row = warp; row < kRowTile; row += kAttendWarps) {
    float largest = 0.0f;
    for (int j = lane; j < rank; j += kWarpSize) {
      const float w = load(&s.weights[row][j]), magnitude = w < 0.0f ? -w : w;
      largest = magnitude > largest ? magnitude : largest;
    }
    largest = warp_max(largest);
    if (lane == 0) store(&s.step[row], largest / kLargestFolded);
  }
  sync_threads();

  // Fragments: lane 4 n + c holds quad c of row n.
  const int row = lane / 4;
  const float step = load(&s.step[row]), inverse = step > 0.0f ? 1.0f / step : 0.0f;
  Words2* fragments = weights.fragments + tile * max_steps(dim) * kWarpSize;
  float middle = 0.0f;
  int first_channel = 0, first_step = 0;
  for_each_band(bands, [&]<int kWidth>(int count) {
    for (int i = warp; i < band_steps(count); i += kAttendWarps) {
      float w[kQuad];
      SVDQ_UNROLL
      for (int e = 0; e < kQuad; ++e) {
        const int channel = i * 16 + lane % 4 * kQuad + quad_element(e);
        w[e] = channel < count ? load(&s.weights[row][first_channel + channel]) * inverse : 0.0f;
        w[e] = half_to_float(float_to_half(w[e]));
        middle += w[e] * (static_cast<float>((1 << kWidth) - 1) / 2);
      }
      store(&fragments[(first_step + i) * kWarpSize + lane],
            Words2{{pack_half2(w[0], w[1]), pack_half2(w[2], w[3])}});
    }
    first_channel += count;
    first_step += band_steps(count);
  });
  middle += shuffle_xor(middle, 1);
  middle += shuffle_xor(middle, 2);
  if (lane % 4 == 0) store(&s.middle[warp][row], middle);
  sync_threads();

  if (thread_index() < kRowTile) {
    const int own = thread_index();
    float sum = 0.0f;
    for (int w = 0; w < kAttendWarps; ++w) sum += load(&s.middle[w][own]);
    store(&weights.step[tile * kRowTile + own], load(&s.step[own]));
    store(&weights.offset[tile * kRowTile + own],
          load(&s.constant[own]) - load(&s.step[own]) * sum);
  }
}

// Folds the queries of a tile into the post-RoPE channels of their head.
template <int kDim>
SVDQ_DEVICE void fold_queries(const AttendParams& p, const AttendWorkspace& workspace,
                              const HeadTable& heads, const BlockRows& rows) {
  FoldPlan<kDim>& s = shared_memory<FoldPlan<kDim>>();
  const HeadPlan head = head_plan(heads, rows.head);
  const KeyCodec& codec = p.keys.codec;
  const int dim = p.keys.layout.head_dim, rank = head.post.rank();
  const int lane = lane_index(), warp = warp_index();

  load_queries(s.query, p, rows);
  const int64_t channel = int64_t{rows.sequence} * p.keys.layout.rank + head.first_post_channel();
  const float* means = p.keys.layout.rope == RopeMode::kHybrid ? codec.post_mean : codec.mean;
  const float* mean = means + rows.sequence_head * dim;
  for (int j = thread_index(); j < rank; j += kAttendThreads)
    store(&s.scale[j], load(&codec.scale[channel + j]));
  for (int d = thread_index(); d < dim; d += kAttendThreads) store(&s.mean[d], load(&mean[d]));
  sync_threads();

  // Products of the basis with the queries, a run of channels a warp, and of the mean.
  const uint16_t* basis = codec.basis + channel * dim;
  const int share = (rank + kAttendWarps - 1) / kAttendWarps, begin = warp * share;
  const int count = begin + share <= rank ? share : rank - begin;
  dot_rows<8>(
      s.query, dim, count,
      [&](int i, int d) {
        return load_four_as<DataType::kBFloat16>(basis, int64_t{begin + i} * dim + d);
      },
      [&](int i, float product) {
        if (lane % 4 == 0)
          store(&s.weights[lane / 4][begin + i], product * load(&s.scale[begin + i]));
      });
  if (warp == 0) {
    dot_rows<1>(
        s.query, dim, 1,
        [&](int, int d) { return load(reinterpret_cast<const Floats4*>(&s.mean[d])); },
        [&](int, float product) {
          if (lane % 4 == 0) store(&s.constant[lane / 4], product);
        });
  }
  sync_threads();
  finish_tile(s, head.post, workspace.folded, rows.sequence_head * workspace.row_tiles + rows.tile,
              dim);
}

// Channel of column `column` of a reconstructed key: the two channels of a RoPE pair side by side.
SVDQ_HOST_DEVICE constexpr int column_channel(int column, int half) {
  return column < 2 * half ? column / 2 + (column & 1) * half : column;
}

// Factors of column tile `tile` of the keys of a head, of its pre-RoPE channels.
template <int kDim>
SVDQ_DEVICE void column_factors(const AttendParams& p, const AttendWorkspace& workspace,
                                const HeadTable& heads, int sequence, int head_index, int tile) {
  FoldPlan<kDim>& s = shared_memory<FoldPlan<kDim>>();
  const HeadPlan head = head_plan(heads, head_index);
  const KeyCodec& codec = p.keys.codec;
  const int dim = p.keys.layout.head_dim, rank = head.pre.rank();
  const int64_t sequence_head = int64_t{sequence} * p.keys.layout.num_heads + head_index;
  const int64_t first = int64_t{sequence} * p.keys.layout.rank + head.first_channel;
  for (int i = thread_index(); i < rank * kRowTile; i += kAttendThreads) {
    const int j = i / kRowTile, column = i % kRowTile;
    const int channel = column_channel(tile * kRowTile + column, codec.rope.rotary_pairs);
    store(&s.weights[column][j],
          bfloat16_to_float(load(&codec.basis[(first + j) * dim + channel])) *
              load(&codec.scale[first + j]));
  }
  if (thread_index() < kRowTile) {
    const int channel = column_channel(tile * kRowTile + thread_index(), codec.rope.rotary_pairs);
    store(&s.constant[thread_index()], load(&codec.mean[sequence_head * dim + channel]));
  }
  sync_threads();
  finish_tile(s, head.pre, workspace.columns, sequence_head * (dim / kRowTile) + tile, dim);
}

}  // namespace svdq::device
