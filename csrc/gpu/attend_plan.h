// The plan of the attend stage on a GPU: tiles, splits and stages of a call, from shapes alone.
#pragma once

#include <numeric>
#include <type_traits>

#include "csrc/gpu/stream.h"
#include "kernels/attend/decode.cuh"
#include "kernels/attend/window.cuh"
#include "kernels/attend/tiles.cuh"

namespace svdq::gpu {

// Tiling of a call. The answer does not depend on it, except for rounding.
struct AttendTiling {
  int split_pages;   // pages of a block, or of a warp of attend_decode, at least 1
  int split_window;  // the window of a block, a multiple of 64
  int stages;        // pages in flight or in use, 2 to 4
  // 8-row tiles of a block: 1, or an even number up to kMaxTiles. More than 1 asks for values,
  // the window alike, that tiles_pages or tiles_window takes.
  int page_tiles = 1;
  int window_tiles = 1;
};

// Bytes of a page that go through shared memory, of the head that has most: keys, and packed values.
inline int stage_bytes(const LayoutView& layout, bool decode) {
  int most = 0;
  for (int h = 0; h < layout.num_heads; ++h) {
    const HeadPlan& head = layout.heads[h];
    const int keys = decode ? device::decode_key_bytes(head.page_bytes()) : head.page_bytes();
    const int values = head.value.packed() ? static_cast<int>(head.value.page_bytes()) : 0;
    most = std::max(most, keys + values);
  }
  return most;
}

// The same where blocks take several tiles: values of 16 bits go through shared memory too.
template <int kDim>
int tiles_stage_bytes(const LayoutView& layout) {
  const int values = kPageTokens * device::TokenMatrix<kDim>::kRowBytes;
  return stage_bytes(layout, false) + (layout.packs_values() ? 0 : values);
}

// Steps of 16 channels of the largest head's query operand.
inline int query_steps(const LayoutView& layout) {
  const int pre = layout.rope == RopeMode::kPost ? 0 : layout.head_dim / 16;
  if (layout.rope == RopeMode::kPre) return pre;
  int most = 0;
  for (int h = 0; h < layout.num_heads; ++h) {
    int steps = 0;
    for (int count : layout.heads[h].post.count) steps += device::band_steps(count);
    most = std::max(most, steps);
  }
  return pre + most;
}

// True if blocks may take several tiles. Float values have no tensor-core product of their
// accuracy, so they keep plain arithmetic.
inline bool tiles_pages(const AttendParams& p) {
  return p.keys.layout.packs_values() || p.v_dtype != DataType::kFloat32;
}

// The window must be read in vectors, and queries as they are: neither rounded to the keys' dtype nor divided by a gain.
inline bool tiles_window(const AttendParams& p) {
  const auto aligned = [](const void* data, int64_t to) {
    return reinterpret_cast<uintptr_t>(data) % to == 0;
  };
  return p.window.dtype != DataType::kFloat32 && p.window.dtype == p.queries.dtype &&
         !p.step.gain && aligned(p.queries.data, 4) && aligned(p.window.keys, 16) &&
         aligned(p.window.values, 16) && p.window.batch_stride % 8 == 0 &&
         p.window.head_stride % 8 == 0;
}

// Tiles of a block for so many query rows of a KV head. From the second tile on the tiled kernels
// copy a page once for all rows of the block and reconstruct its pre-RoPE channels once
// (docs/cuda.md, "Many query rows").
template <int kDim>
int tiles_of_block(int64_t rows) {
  if (rows <= device::kRowTile) return 1;
  const int64_t pairs = ceil_div(rows, device::kWarpRows);
  return static_cast<int>(std::min<int64_t>(device::kMaxTiles<kDim>, 2 * pairs));
}

// True if a warp has registers for all channels of a page: it holds an output for each, and with
// pre-RoPE channels some columns of the keys.
inline bool fits_warp(const LayoutView& layout) {
  return layout.rope == RopeMode::kPost || layout.head_dim <= 256;
}

// True if pages of one tile go to attend_decode, where a split is a warp.
inline bool decodes(const AttendParams& p, int page_tiles) {
  return page_tiles == 1 && p.keys.layout.packs_values() && fits_warp(p.keys.layout);
}

// Tiles of a block that asks for `tiles`: what attend_decode cannot serve, two tiles can. Gathered
// pages are few and decoded from by few rows, so more tiles are not compiled for them.
inline int page_tiles_for(const AttendParams& p, int tiles) {
  if (p.token_slots) tiles = 1;
  return tiles == 1 && p.keys.layout.packs_values() && !fits_warp(p.keys.layout) ? 2 : tiles;
}

// Scorers of the kernels for one head_dim class and RoPE mode.
template <typename DecodeScores, typename PlainScores, typename TiledScores>
struct Scorers {
  using Decode = DecodeScores;
  using Plain = PlainScores;
  using Tiled = TiledScores;
  static constexpr int kDim = PlainScores::kDim;
};
template <int kDim>
using FoldedScorers =
    Scorers<device::FoldedDecode<kDim>, device::FoldedScores<kDim>, device::FoldedTiles<kDim>>;
// kGatheredPages: for gathered pages. post-RoPE channels alone do not ask where a token came from.
template <int kDim, bool kGatheredPages>  // see fits_warp
using ReconstructedScorers = Scorers<
    std::conditional_t<kDim <= 256, device::ReconstructedDecode<kDim, 4, kGatheredPages>, void>,
    device::ReconstructedScores<kDim, kGatheredPages>,
    device::ReconstructedTiles<kDim, kDim == 128 ? 4 : 2, kGatheredPages>>;
template <int kDim, bool kGatheredPages>
using HybridScorers =
    Scorers<std::conditional_t<kDim <= 256, device::HybridDecode<kDim, kGatheredPages>, void>,
            device::HybridScores<kDim, kGatheredPages>, device::HybridTiles<kDim, kGatheredPages>>;

// Shared memory of a block of the kernel over pages, except for its stages, and what each page in
// flight takes there.
struct SharedBytes {
  int fixed, stage;
};

template <typename Scorers>
SharedBytes shared_bytes(const AttendParams& p, int page_tiles) {
  if (page_tiles > 1) {
    return {device::page_tiles_fixed_bytes<typename Scorers::Tiled>(page_tiles,
                                                                    query_steps(p.keys.layout)),
            tiles_stage_bytes<Scorers::kDim>(p.keys.layout)};
  }
  if constexpr (!std::is_void_v<typename Scorers::Decode>) {
    if (decodes(p, 1))
      return {device::kDecodePlanBytes<typename Scorers::Decode>, stage_bytes(p.keys.layout, true)};
  }
  return {device::kPagesPlanBytes<typename Scorers::Plain>, stage_bytes(p.keys.layout, false)};
}

// Warps of a block of attend_decode: the most that have room.
inline int page_warps(const SharedBytes& bytes, int stages, const DeviceLimits& limits) {
  int warps = device::kDecodeWarps;
  while (warps > 1 && bytes.fixed + warps * stages * bytes.stage > limits.max_shared_bytes)
    warps /= 2;
  return warps;
}

template <typename Scorers>
AttendTiling plan_tiling(const AttendParams& p, const DeviceLimits& limits) {
  constexpr int kDim = Scorers::kDim;
  constexpr int kBlocksPerSm = 4;       // enough to hide each other's barriers
  constexpr int kDecodeWarpsPerSm = 8;  // two to a scheduler, with their copies in flight
  constexpr int kMinPages = 4;          // of a block; fewer do not pay for a partial result
  constexpr int kLeastExact = 128;      // likewise
  const int64_t rows = device::query_rows(p);
  const auto share = [&](int64_t length, int64_t least, int tiles, int per_sm) {
    const int64_t blocks =
        ceil_div(rows, tiles * device::kRowTile) * p.keys.layout.num_heads * p.keys.batch;
    const int64_t wanted = ceil_div(int64_t{per_sm} * limits.num_sms, blocks);
    return std::max(least, ceil_div(length, wanted));
  };

  AttendTiling tiling{};
  tiling.window_tiles = tiles_window(p) ? tiles_of_block<kDim>(rows) : 1;
  tiling.page_tiles = page_tiles_for(p, tiles_pages(p) ? tiles_of_block<kDim>(rows) : 1);
  const auto stages = [&](int tiles) {
    const SharedBytes bytes = shared_bytes<Scorers>(p, tiles);
    return std::min(4, (limits.max_shared_bytes - bytes.fixed) / bytes.stage);
  };
  const int min_tiles = page_tiles_for(p, 1);
  while (tiling.page_tiles > min_tiles && stages(tiling.page_tiles) < 2)
    tiling.page_tiles = std::max(min_tiles, tiling.page_tiles - 2);
  tiling.stages = stages(tiling.page_tiles);
  const SharedBytes least = shared_bytes<Scorers>(p, min_tiles);
  SVDQ_CHECK(tiling.stages >= 2, "attend needs ", least.fixed + 2 * least.stage,
             " bytes of shared memory a block for head_dim ", p.keys.layout.head_dim,
             " and pages of ", least.stage, " bytes a head; this device gives ",
             limits.max_shared_bytes);
  const bool decode = decodes(p, tiling.page_tiles);
  if (decode) {
    // One page in flight a warp is several times what hides the memory's latency, so room for more
    // blocks, which hide that of instructions, comes first.
    const DeviceLimits quarter{limits.num_sms, limits.max_shared_bytes / 4};
    while (tiling.stages > 2 && page_warps(least, tiling.stages, quarter) < device::kDecodeWarps)
      --tiling.stages;
  }
  // A block of attend_decode has several warps, each with pages of its own.
  const int min_pages = decode ? 1 : kMinPages;
  tiling.split_pages = static_cast<int>(share(p.keys.table_stride, min_pages, tiling.page_tiles,
                                              decode ? kDecodeWarpsPerSm : kBlocksPerSm));
  const int64_t exact =
      share(p.window.rows, decode ? kPageTokens : kLeastExact, tiling.window_tiles, kBlocksPerSm);
  tiling.split_window = static_cast<int>(ceil_div(exact, kPageTokens) * kPageTokens);
  return tiling;
}

}  // namespace svdq::gpu
