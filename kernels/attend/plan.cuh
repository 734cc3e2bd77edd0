// Shared by the kernels of the attend stage: the tiling of a call into blocks, the workspace between
// launches, and reading numbers of any dtype.
//
//   prepare        what multiplies the codes, and rotations, once for all splits (prepare.cuh)
//   attend_decode  up to 8 query rows a KV head, packed values: pages and window -> partial results, one a block,
//                  which the last block of a head merges -> out, lse
// and for all others
//   attend_pages   packed pages -> partial results, one per split of the pages
//   attend_window  the window   -> partial results, one per split of the rows
//                  (both for 8 query rows a block; attend_page_tiles and attend_window_tiles for more)
//   merge_splits   partial results -> out, lse
//
// The query rows of a KV head are its query heads times the query length, in the order of the query
// tensor; a block takes a tile of 8 of them, the width of a tensor-core product, or several tiles.
// Head and tile lie along x of the grid, which has room for any query length. The number of splits depends on
// shapes alone, what each of them gets on the sequence's length, partial results are merged in a fixed order, and no
// kernel reads back on the host: results are deterministic and the launches can be captured in a graph.
#pragma once

#include "kernels/pages/heads.cuh"
#include "kernels/machine/numbers.cuh"
#include "kernels/machine/softmax.cuh"

namespace svdq::device {

inline constexpr int kRowTile = 8;          // query rows of a tile
inline constexpr int kAttendThreads = 128;  // 4 warps: one per group of 16 tokens of a page
inline constexpr int kAttendWarps = kAttendThreads / kWarpSize;
static_assert(kAttendWarps == kGroups);

// In place of a list's first slot: a length or page table of the select stage could not be right.
inline constexpr int kBadSlot = -1;

// 16-channel steps of a head's weights: every band is padded to whole steps.
SVDQ_HOST_DEVICE constexpr int band_steps(int count) { return (count + 15) / 16; }
SVDQ_HOST_DEVICE constexpr int max_steps(int head_dim) {
  return (head_dim + 15) / 16 + kNumWidths - 1;
}

// Factors of the codes of one part of the heads, by tiles of 8 rows: U tiles a head, W =
// max_steps(D).
struct Weights {
  Words2* fragments;  // [B, H, U, W, 32] B fragments of halves, a quad of channels each
  float* step;        // [B, H, U, 8]: unit of a row's weights
  float* offset;      // [B, H, U, 8]: part of the mean, less that of the middle codes
};

// Bytes of a page's keys in a stage of attend_decode: no fewer than the scores take that are put in their place.
SVDQ_HOST_DEVICE constexpr int decode_key_bytes(int key_bytes) {
  constexpr int kScoreBytes = kPageTokens * kRowTile * 2;
  return key_bytes > kScoreBytes ? key_bytes : kScoreBytes;
}

struct AttendWorkspace {
  int row_tiles;      // of a KV head, a multiple of those of a block
  int page_tiles;     // of a block along pages: 1, or 2 and more for attend_page_tiles
  int window_tiles;   // of a block along the window, likewise
  int query_steps;    // of 16 channels of a query's operand in attend_page_tiles
  int page_warps;     // of a block of attend_decode that have pages; 1 for other kernels
  int page_splits;    // blocks along the pages of a sequence
  int window_splits;  // blocks along the window
  int split_window;   // the window of a block, a multiple of kPageTokens
  int stages;         // pages of a split in flight or in use, 2 to 4
  int stage_bytes;    // of shared memory; the largest head's
  int max_pages;      // of a sequence: what the page table has room for
  // Workspace. T = row_tiles, S = splits().
  Weights folded;            // of post-RoPE channels, by tiles of query rows: U = T
  Weights columns;           // of pre-RoPE channels, by tiles of the keys' columns: U = D / 8
  Floats2* offset_rotation;  // [64, half] cosine and sine by slot of a page; for pre-RoPE channels
  Floats2* page_rotation;    // [B, max_pages, half] of the pages' first positions
  uint64_t* pair_frequencies;  // [half] in place of both, for gathered pages
  int* tickets;        // [B, H, T] blocks of attend_decode that are done; prepare makes it zero
  float* partial_out;  // [B, H, T * 8, S, D]
  float* partial_max;  // [B, H, T * 8, S], log2 units
  float* partial_sum;  // [B, H, T * 8, S]

  SVDQ_HOST_DEVICE constexpr int splits() const { return page_splits + window_splits; }
};

// Query rows of a KV head.
SVDQ_HOST_DEVICE constexpr int64_t query_rows(const AttendParams& p) {
  return p.queries.num_heads / p.keys.layout.num_heads * p.queries.length;
}

// The query rows that a block serves, from its coordinates x = head and row tile (or tiles), z = sequence.
struct BlockRows {
  int sequence, head;
  int tile;  // the first
  int64_t sequence_head;
  int64_t first;  // row of the KV head
  int count;      // rows that exist; none or fewer in tiles that fill up the last block

  // Row of these tiles in step, offset and the partial results.
  SVDQ_HOST_DEVICE constexpr int64_t slot(int row_tiles, int row) const {
    return (sequence_head * row_tiles + tile) * kRowTile + row;
  }
};

SVDQ_DEVICE BlockRows tile_rows(const AttendParams& p, int sequence, int head, int tile,
                                int tiles) {
  BlockRows rows;
  rows.sequence = sequence;
  rows.head = head;
  rows.tile = tile;
  rows.sequence_head = int64_t{rows.sequence} * p.keys.layout.num_heads + rows.head;
  rows.first = int64_t{rows.tile} * kRowTile;
  const int64_t left = query_rows(p) - rows.first;
  rows.count = static_cast<int>(left < tiles * kRowTile ? left : tiles * kRowTile);
  return rows;
}

SVDQ_DEVICE BlockRows block_rows(const AttendParams& p, const AttendWorkspace& workspace,
                                 int tiles = 1) {
  const int blocks = tiles == 1 ? workspace.row_tiles : workspace.row_tiles / tiles;  // of a head
  return tile_rows(p, block_z(), block_x() / blocks, block_x() % blocks * tiles, tiles);
}

// Rows of the window of a sequence; -1, which makes its results NaN, where a step met a fault.
SVDQ_DEVICE int window_length(const AttendParams& p, int sequence) {
  const int length = load(&p.window.lens[sequence]);
  return p.step.faults && load(&p.step.faults[sequence]) != 0 ? -1 : length;
}

// Leaves the lengths of a decode step, once what reads them has been queued: by one thread of a sequence.
SVDQ_DEVICE void store_lengths(const AttendParams& p, int sequence) {
  if (!p.step.faults) return;
  const int length = window_length(p, sequence);
  const int kept = load(&p.step.kept[sequence]);
  store(&p.step.window_lens[sequence], length < 0 ? kept : length);
  store(&p.step.cache_seqlens[sequence], load(&p.keys.cache_seqlens[sequence]));
}

// Sums of 8 numbers over the lanes of a warp; lane l gets number l / 4. Each exchange halves what
// is left to add: 9 shuffles instead of 40.
SVDQ_DEVICE float sum_rows(float (&x)[kRowTile]) {
  SVDQ_UNROLL
  for (int keep = kRowTile / 2; keep > 0; keep /= 2) {
    const int mask = keep * 4;
    const bool upper = (lane_index() & mask) != 0;
    SVDQ_UNROLL
    for (int i = 0; i < keep; ++i) {
      const float own = upper ? x[i + keep] : x[i], other = upper ? x[i] : x[i + keep];
      x[i] = own + shuffle_xor(other, mask);
    }
  }
  x[0] += shuffle_xor(x[0], 2);
  return x[0] + shuffle_xor(x[0], 1);
}

// A number of a query of a KV head divided by the gain of its channel, as tensors of that dtype would be.
SVDQ_DEVICE float without_gain(const AttendParams& p, int64_t sequence_head, int channel, float x) {
  if (!p.step.gain) return x;
  const int64_t at = sequence_head * p.keys.layout.head_dim + channel;
  const float inverse =
      rounded_to(p.step.gain_dtype, 1.0f / load_number(p.step.gain, p.step.gain_dtype, at));
  return rounded_to(p.queries.dtype, x * rounded_to(p.queries.dtype, inverse));
}

// Query number `channel` of a row of the tile, in log2 units of score.
SVDQ_DEVICE float load_query(const AttendParams& p, const BlockRows& rows, int row, int channel) {
  const int64_t at = rows.sequence_head * query_rows(p) + rows.first + row;
  const float x =
      load_number(p.queries.data, p.queries.dtype, at * p.keys.layout.head_dim + channel);
  return without_gain(p, rows.sequence_head, channel, x) * p.queries.sm_scale * kLog2E;
}

}  // namespace svdq::device
