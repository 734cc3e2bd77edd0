// The queries of a KV head folded into its leading channels, as far as that does not depend on
// the page.
//
// A pre-RoPE channel's weight in a page is scale * (R_middle^T q . basis). By pairs (i, i + half) of
// channels that is
//   sum_i cos_i (q_i b_i + q_i' b_i') + sin_i (q_i' b_i - q_i b_i'),
// where only the cosine and sine of the page's middle change, so the weights of 16 pages are a
// product of tensor cores: [16 pages, cosines and sines] x [those, outputs]. Outputs are the rows'
// weights of the channels, channel after channel, and of the mean. Channels of a key that do not
// turn, post-RoPE channels and the tail's mean add a constant.
#pragma once

#include "kernels/machine/numbers.cuh"
#include "kernels/select/plan.cuh"

namespace svdq::device {

struct SelectAbsorbPlan {
  float query[kRowTile][kMaxHeadDim];
  float inverse[(kMaxSelectChannels + 1) * kRowTile];  // of an output's step
};

// Factor of a query: row `channel` of the basis times its scale, or a mean.
struct SelectVector {
  const uint16_t* basis;
  const float* mean;
  float scale;

  SVDQ_DEVICE float operator[](int d) const {
    return (basis ? bfloat16_to_float(load(&basis[d])) : load(&mean[d])) * scale;
  }
};

// Cosine's and sine's coefficients of a pair, 0 for what is faster than the pages tell.
SVDQ_DEVICE Floats2 rotation_coefficients(const Rope& rope, const float* query,
                                          const SelectVector& vector, int pair) {
  if (load(&rope.inv_freq[pair]) > kSelectFastest) return {0.0f, 0.0f};
  const float q = load(&query[pair]), other_q = load(&query[pair + rope.rotary_pairs]);
  const float b = vector[pair], other_b = vector[pair + rope.rotary_pairs];
  return {q * b + other_q * other_b, other_q * b - q * other_b};
}

// Grid: x = head and row tile, z = sequence.
SVDQ_KERNEL(kSelectThreads)
select_absorb_kernel(SelectParams p, SelectWorkspace workspace, HeadTable heads) {
  SelectAbsorbPlan& s = shared_memory<SelectAbsorbPlan>();
  const int head_index = block_x() / workspace.row_tiles, tile = block_x() % workspace.row_tiles;
  const int dim = p.keys.layout.head_dim, half = select_half(p), rows = workspace.tile_rows;
  const int lane = lane_index(), warp = warp_index();
  const HeadPlan head = head_plan(heads, head_index);
  const int64_t sequence_head = int64_t{block_z()} * p.keys.layout.num_heads + head_index;
  const int64_t first_row = int64_t{tile} * rows, all_rows = query_rows(p);

  for (int i = thread_index(); i < rows * dim; i += kSelectThreads) {
    const int64_t row = first_row + i / dim;
    float q = 0.0f;  // of a row that does not exist
    if (row < all_rows) {
      const int64_t at = (sequence_head * all_rows + row) * dim + i % dim;
      q = load_number(p.queries.data, p.queries.dtype, at) * p.queries.sm_scale * kLog2E;
    }
    store(&s.query[i / dim][i % dim], q);
  }
  sync_threads();

  const Rope rope{p.keys.codec.rope.inv_freq, half};
  const int64_t channels = int64_t{block_z()} * p.keys.layout.rank + head.first_channel;
  const auto vector = [&](int j) {
    if (j == head.rank())
      return SelectVector{nullptr, p.keys.codec.mean + sequence_head * dim, 1.0f};
    return SelectVector{p.keys.codec.basis + (channels + j) * dim, nullptr,
                        load(&p.keys.codec.scale[channels + j])};
  };
  const auto rotates = [&](int j) {  // the core, and its mean
    return half > 0 && (j < head.pre.rank() || j == head.rank());
  };

  // A warp per output: its constant, and the unit of its coefficients.
  const int outputs = (head.rank() + 1) * rows;
  const int64_t at = select_tile(workspace, sequence_head, tile) * workspace.output_tiles;
  for (int o = warp; o < workspace.output_tiles * 8; o += kSelectWarps) {
    float constant = 0.0f, largest = 0.0f;
    if (o < outputs) {
      const int j = o / rows;
      const float* query = s.query[o % rows];
      const SelectVector own = vector(j);
      for (int d = (rotates(j) ? 2 * half : 0) + lane; d < dim; d += kWarpSize)
        constant = fused(load(&query[d]), own[d], constant);
      if (j == head.rank() && p.keys.layout.rope == RopeMode::kHybrid) {
        for (int d = lane; d < dim; d += kWarpSize)
          constant = fused(load(&query[d]), load(&p.keys.codec.post_mean[sequence_head * dim + d]),
                           constant);
      }
      for (int i = lane; rotates(j) && i < half; i += kWarpSize) {
        const Floats2 c = rotation_coefficients(rope, query, own, i);
        const float x = c.x < 0.0f ? -c.x : c.x, y = c.y < 0.0f ? -c.y : c.y;
        largest = x > largest ? x : largest;
        largest = y > largest ? y : largest;
      }
    }
    constant = warp_sum(constant);
    largest = warp_max(largest);
    if (lane == 0) {
      store(&workspace.constant[at * 8 + o], constant);
      store(&workspace.step[at * 8 + o], largest);
      if (o < outputs) store(&s.inverse[o], largest > 0.0f ? 1.0f / largest : 0.0f);
    }
  }
  sync_threads();

  const int fragments = workspace.rotation_steps * kWarpSize;
  for (int i = thread_index(); i < workspace.output_tiles * fragments; i += kSelectThreads) {
    const int o = i / fragments * 8 + lane / 4, step = i % fragments / kWarpSize;
    uint32_t word[2] = {};
    SVDQ_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int pair = step * 8 + e * 4 + lane % 4;
      if (o >= outputs || pair >= half || !rotates(o / rows)) continue;
      const Floats2 c = rotation_coefficients(rope, s.query[o % rows], vector(o / rows), pair);
      const float inverse = load(&s.inverse[o]);
      word[e] = pack_half2(c.x * inverse, c.y * inverse);
    }
    store(&workspace.fragments[at * fragments + i], Words2{{word[0], word[1]}});
  }
}

inline LaunchShape select_absorb_launch(const SelectParams& p, const SelectWorkspace& workspace) {
  return {p.keys.layout.num_heads * workspace.row_tiles, 1, p.keys.batch, kSelectThreads,
          static_cast<int>(sizeof(SelectAbsorbPlan))};
}

}  // namespace svdq::device
