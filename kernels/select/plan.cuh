// What the kernels of the select stage share: the cut into blocks and the workspace between them.
//
//   rotations       of the middle of every page (kernels/machine/rope.cuh)
//   select_absorb   queries and leading channels -> what a page's rotation multiplies
//   select_norms    a sample of pages -> each query row's log-sum-exp over it
//   select_scores   pages -> a weight per token
//   select_top      weights -> slots
//
// The query rows of a KV head are its query heads times the query length, in the order of the query
// tensor; they are served in tiles of 1, 2, 4 or 8. Everything follows from shapes, lengths and page
// ids are read and checked by the kernels, and results are deterministic.
#pragma once

#include "kernels/attend/plan.cuh"
#include "kernels/pages/code_fragments.cuh"

namespace svdq::device {

inline constexpr int kSelectThreads = 128;
inline constexpr int kSelectWarps = kSelectThreads / kWarpSize;
inline constexpr int kChunkPages = 16;  // of a block: rows of a tensor-core product
inline constexpr int kSampleChunks = kSelectSamplePages / kChunkPages;
static_assert(kSampleChunks * kChunkPages == kSelectSamplePages);

// Weights of tokens that no query's probabilities weigh.
inline constexpr float kNotSelected = -1.0f;  // sinks, and slots past the end
inline constexpr float kOutlier = -2.0f;      // selected whatever their codes say
inline constexpr float kInvalid = -3.0f;      // of a page that the pool does not have

struct SelectWorkspace {
  int tile_rows;       // query rows of a tile: 1, 2, 4 or 8
  int row_tiles;       // of a KV head
  int output_tiles;    // of 8 outputs: a row's weight of a channel, or its part of the mean
  int rotation_steps;  // of 8 RoPE pairs
  int max_pages;       // of a sequence: what the page table has room for
  int code_bytes;      // of a page's leading channels, the largest head's, whole lines
  // Workspace. T = row_tiles, O = output_tiles.
  const Floats2* page_rotation;  // [B, max_pages, half] of the pages' middles
  Words2* fragments;             // [B, H, T, O, rotation_steps, 32] B fragments of halves
  float* step;                   // [B, H, T, O * 8]: unit of an output's fragments
  float* constant;               // [B, H, T, O * 8]: what does not turn
  float* sample_max;             // [B, H, T, kSampleChunks, tile_rows], log2 units
  float* sample_sum;
  float* weights;  // [B, H, max_pages * 64]
};

SVDQ_HOST_DEVICE constexpr int64_t query_rows(const SelectParams& p) {
  return p.queries.num_heads / p.keys.layout.num_heads * p.queries.length;
}

// RoPE pairs that turn with the pages.
SVDQ_HOST_DEVICE constexpr int select_half(const SelectParams& p) {
  return p.keys.layout.rope == RopeMode::kPost ? 0 : p.keys.codec.rope.rotary_pairs;
}

// The first `most` channels of a part. A band that is cut keeps its place, so the lines of what is
// left are a prefix of the part's.
SVDQ_HOST_DEVICE constexpr Bands proxy_bands(const Bands& bands, int most) {
  Bands leading{};
  for (int w = 0; w < kNumWidths; ++w) {
    leading.count[w] = bands.count[w] < most ? bands.count[w] : most;
    most -= leading.count[w];
  }
  return leading;
}

// The first channels of a head, post-RoPE channels after pre-RoPE channels.
SVDQ_HOST_DEVICE constexpr HeadPlan proxy_channels(const HeadPlan& head, int most) {
  HeadPlan leading = head;
  leading.pre = proxy_bands(head.pre, most);
  leading.post = proxy_bands(head.post, most - leading.pre.rank());
  return leading;
}

// Bytes of whole lines: 4 channels of 1 bit are half of one.
SVDQ_HOST_DEVICE constexpr int proxy_bytes(const HeadPlan& leading) {
  return (leading.page_bytes() + kLineBytes - 1) / kLineBytes * kLineBytes;
}

// Numbers of tile `tile` of a head: outputs in step and constant, rows of a run in the samples.
SVDQ_DEVICE int64_t select_tile(const SelectWorkspace& workspace, int64_t sequence_head, int tile) {
  return sequence_head * workspace.row_tiles + tile;
}

// Pages of a sequence; none if its length cannot be right.
struct SequencePages {
  int length, pages;
  bool valid;
};

SVDQ_DEVICE SequencePages sequence_pages(const SelectParams& p, int sequence) {
  const int length = load(&p.keys.cache_seqlens[sequence]);
  const bool valid = length >= 0 && length <= p.keys.table_stride * kPageTokens;
  return {length, valid ? page_count(length) : 0, valid};
}

}  // namespace svdq::device
