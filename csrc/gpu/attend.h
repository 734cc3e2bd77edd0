// The attend stage on a GPU: how a call is cut into blocks, its scratch memory, and its launches.
// Everything follows from shapes; no length is read on the host.
#pragma once

#include <numeric>
#include <type_traits>

#include "csrc/gpu/rope.h"
#include "kernels/attend/decode.cuh"
#include "kernels/attend/window.cuh"
#include "kernels/attend/tiles.cuh"
#include "kernels/attend/merge.cuh"

namespace svdq::gpu {

// How a call is cut. The answer does not depend on it, except for rounding.
struct AttendTiling {
  int split_pages;   // pages of a block, or of a warp of attend_decode, at least 1
  int split_window;  // the window of a block, a multiple of 64
  int stages;        // pages in flight or in use, 2 to 4
  // 8-row tiles of a block: 1, or an even number up to kMaxTiles. More than 1 asks for values,
  // the window alike, that tiles_pages or tiles_window takes.
  int page_tiles = 1;
  int window_tiles = 1;
};

// Bytes of a page that go through shared memory: the largest head's keys, and packed values.
inline int stage_bytes(const LayoutView& layout) {
  int keys = 0;
  for (int h = 0; h < layout.num_heads; ++h) keys = std::max(keys, layout.heads[h].page_bytes());
  return keys + (layout.value.packed() ? static_cast<int>(layout.value.page_bytes()) : 0);
}

// The same where blocks take several tiles: values of 16 bits go through shared memory too.
template <int kDim>
int tiles_stage_bytes(const LayoutView& layout) {
  const int values = kPageTokens * device::TokenMatrix<kDim>::kRowBytes;
  return stage_bytes(layout) + (layout.value.packed() ? 0 : values);
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

// Whether blocks may take several tiles. Float values have no tensor-core product of their
// accuracy, so they keep plain arithmetic.
inline bool tiles_pages(const AttendParams& p) {
  return p.keys.layout.value.packed() || p.v_dtype != DataType::kFloat32;
}

// The window must be read in vectors, and queries rounded to the keys' dtype would not do.
inline bool tiles_window(const AttendParams& p) {
  const auto aligned = [](const void* data, int64_t to) {
    return reinterpret_cast<uintptr_t>(data) % to == 0;
  };
  return p.window.dtype != DataType::kFloat32 && p.window.dtype == p.queries.dtype &&
         aligned(p.queries.data, 4) && aligned(p.window.keys, 16) && aligned(p.window.values, 16) &&
         p.window.batch_stride % 8 == 0 && p.window.head_stride % 8 == 0;
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

// Whether a warp has registers for all channels of a page: it holds an output for each, and with
// pre-RoPE channels some columns of the keys.
inline bool fits_warp(const LayoutView& layout) {
  return layout.rope == RopeMode::kPost || layout.head_dim <= 256;
}

// Whether pages of one tile go to attend_decode, where a split is a warp.
inline bool decodes(const AttendParams& p, int page_tiles) {
  return page_tiles == 1 && p.keys.layout.value.packed() && fits_warp(p.keys.layout);
}

// Tiles of a block that asks for `tiles`: what attend_decode cannot serve, two tiles can. Gathered
// pages are few and decoded from by few rows, so more tiles are not compiled for them.
inline int page_tiles_for(const AttendParams& p, int tiles) {
  if (p.token_slots) tiles = 1;
  return tiles == 1 && p.keys.layout.value.packed() && !fits_warp(p.keys.layout) ? 2 : tiles;
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
  int fixed = device::kPagesPlanBytes<typename Scorers::Plain>;
  if constexpr (!std::is_void_v<typename Scorers::Decode>) {
    if (decodes(p, 1)) fixed = device::kDecodePlanBytes<typename Scorers::Decode>;
  }
  return {fixed, stage_bytes(p.keys.layout)};
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
  constexpr int kMinPages = 4;          // fewer do not pay for a partial result
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
  tiling.split_pages = static_cast<int>(share(p.keys.table_stride, kMinPages, tiling.page_tiles,
                                              decode ? kDecodeWarpsPerSm : kBlocksPerSm));
  const int64_t exact = share(p.window.rows, kLeastExact, tiling.window_tiles, kBlocksPerSm);
  tiling.split_window = static_cast<int>(ceil_div(exact, kPageTokens) * kPageTokens);
  return tiling;
}

template <typename Scorers, typename Stream>
device::AttendWorkspace plan_workspace(const AttendParams& p, const AttendTiling& tiling,
                                       Stream& stream) {
  const LayoutView& layout = p.keys.layout;
  device::AttendWorkspace workspace{};
  workspace.page_tiles = page_tiles_for(p, tiling.page_tiles);
  const SharedBytes bytes = shared_bytes<Scorers>(p, workspace.page_tiles);
  workspace.page_warps = page_warps(bytes, tiling.stages, stream.limits());
  workspace.window_tiles = tiling.window_tiles;
  workspace.query_steps = query_steps(layout);
  const int64_t block_tiles = std::lcm(workspace.page_tiles, tiling.window_tiles);
  const int64_t tiles = ceil_div(device::query_rows(p), block_tiles * device::kRowTile);
  workspace.row_tiles = static_cast<int>(tiles * block_tiles);
  workspace.max_pages = static_cast<int>(p.keys.table_stride);
  workspace.split_pages = tiling.split_pages;
  workspace.page_splits = static_cast<int>(ceil_div(workspace.max_pages, tiling.split_pages));
  workspace.split_window = tiling.split_window;
  workspace.window_splits = static_cast<int>(ceil_div(p.window.rows, tiling.split_window));
  workspace.stages = tiling.stages;
  workspace.stage_bytes = bytes.stage;

  const int64_t heads = int64_t{p.keys.batch} * layout.num_heads;
  const auto weights = [&](bool used, int64_t tiles) {
    if (!used) return device::Weights{};
    const int64_t all = heads * tiles;
    return device::Weights{stream.template allocate<device::Words2>(
                               all * device::max_steps(layout.head_dim) * device::kWarpSize),
                           stream.template allocate<float>(all * device::kRowTile),
                           stream.template allocate<float>(all * device::kRowTile)};
  };
  workspace.folded = weights(layout.rope != RopeMode::kPre, workspace.row_tiles);
  workspace.columns = weights(layout.rope != RopeMode::kPost, layout.head_dim / device::kRowTile);
  const int64_t slots = heads * workspace.row_tiles * device::kRowTile * workspace.splits();
  workspace.partial_out = stream.template allocate<float>(slots * layout.head_dim);
  workspace.partial_max = stream.template allocate<float>(slots);
  workspace.partial_sum = stream.template allocate<float>(slots);
  return workspace;
}

template <typename Scores, typename Stream>
void attend_page_tiles(const AttendParams& p, const device::AttendWorkspace& workspace,
                       const device::HeadTable& heads, Stream& stream) {
  constexpr int kDim = Scores::kDim;
  using Lean = typename Scores::Lean;  // exact values take registers for their probabilities' terms
  const auto run = [&]<typename Use, typename Values>() {
    stream.launch("attend_page_tiles", device::attend_page_tiles_launch<Use>(p, workspace),
                  device::attend_page_tiles_kernel<Use, Values>, p, workspace, heads);
  };
  if constexpr (Scores::kGathered) {  // see page_tiles_for
    if constexpr (kDim > 256) {
      p.keys.layout.value.bits == 4
          ? run.template operator()<Scores, device::PackedTileValues<kDim, 4>>()
          : run.template operator()<Scores, device::PackedTileValues<kDim, 2>>();
    }
  } else if (p.keys.layout.value.bits == 4) {
    run.template operator()<Scores, device::PackedTileValues<kDim, 4>>();
  } else if (p.keys.layout.value.bits == 2) {
    run.template operator()<Scores, device::PackedTileValues<kDim, 2>>();
  } else if (p.v_dtype == DataType::kBFloat16) {
    run.template operator()<Lean, device::WindowTileValues<kDim, DataType::kBFloat16>>();
  } else {
    run.template operator()<Lean, device::WindowTileValues<kDim, DataType::kFloat16>>();
  }
}

// The kernel over pages that the work is cut for.
template <typename Scorers, typename Stream>
void attend_pages(const AttendParams& p, const device::AttendWorkspace& workspace,
                  const device::HeadTable& heads, Stream& stream) {
  using Decode = typename Scorers::Decode;
  using Plain = typename Scorers::Plain;
  if (workspace.page_tiles > 1) {
    attend_page_tiles<typename Scorers::Tiled>(p, workspace, heads, stream);
  } else if (decodes(p, 1)) {
    if constexpr (!std::is_void_v<Decode>) {
      const auto kernel = p.keys.layout.value.bits == 4 ? device::attend_decode_kernel<Decode, 4>
                                                        : device::attend_decode_kernel<Decode, 2>;
      stream.launch("attend_decode", device::attend_decode_launch<Decode>(p, workspace), kernel, p,
                    workspace, heads);
    }
  } else {
    stream.launch("attend_pages", device::attend_pages_launch<Plain>(p, workspace),
                  device::attend_pages_kernel<Plain>, p, workspace, heads);
  }
}

template <int kDim, typename Stream>
void attend_window(const AttendParams& p, const device::AttendWorkspace& workspace,
                   Stream& stream) {
  if (workspace.window_tiles == 1) {
    stream.launch("attend_window", device::attend_window_launch<kDim>(p, workspace),
                  device::attend_window_kernel<kDim>, p, workspace);
    return;
  }
  const auto kernel = p.window.dtype == DataType::kBFloat16
                          ? device::attend_window_tiles_kernel<kDim, DataType::kBFloat16>
                          : device::attend_window_tiles_kernel<kDim, DataType::kFloat16>;
  stream.launch("attend_window_tiles", device::attend_window_tiles_launch<kDim>(p, workspace),
                kernel, p, workspace);
}

// Prepares what multiplies the codes of pre-RoPE channels.
template <int kDim, typename Stream>
void prepare_pre(const AttendParams& p, device::AttendWorkspace& workspace, Stream& stream) {
  if (p.token_slots && p.keys.codec.rope.rotary_pairs > 0) {
    workspace.pair_frequencies = stream.template allocate<uint64_t>(p.keys.codec.rope.rotary_pairs);
    stream.launch("pair_frequencies", device::pair_frequencies_launch(p.keys.codec.rope),
                  device::pair_frequencies_kernel, p.keys.codec.rope, workspace.pair_frequencies);
  } else {
    const auto rotates = rotations(p.keys.codec.rope, 0, p.keys.first_position, p.keys.batch,
                                   workspace.max_pages, stream);
    workspace.offset_rotation = rotates.slots;
    workspace.page_rotation = rotates.pages;
  }
  stream.launch("columns", device::columns_launch<kDim>(p, workspace), device::columns_kernel<kDim>,
                p, workspace, head_table(p.keys.layout));
}

// Likewise of post-RoPE channels, which follow the core's in the basis and have a mean of their own.
template <int kDim, typename Stream>
void prepare_post(const AttendParams& p, const device::AttendWorkspace& workspace, Stream& stream) {
  AttendParams post = p;
  if (p.keys.layout.rope == RopeMode::kHybrid) post.keys.codec.mean = p.keys.codec.post_mean;
  device::HeadTable heads = head_table(p.keys.layout);
  for (int h = 0; h < p.keys.layout.num_heads; ++h)
    heads.of[h].first_channel = p.keys.layout.heads[h].first_post_channel();
  stream.launch("absorb", device::fold_query_launch<kDim>(p, workspace),
                device::fold_query_kernel<kDim>, post, workspace, heads);
}

// `cut` null: planned.
template <int kDim, typename Scorers, typename Stream>
void attend_keys(const AttendParams& p, const AttendTiling* tiling, Stream& stream) {
  device::AttendWorkspace workspace = plan_workspace<Scorers>(
      p, tiling ? *tiling : plan_tiling<Scorers>(p, stream.limits()), stream);
  if (workspace.page_splits > 0) {
    if (p.keys.layout.rope != RopeMode::kPost) prepare_pre<kDim>(p, workspace, stream);
    if (p.keys.layout.rope != RopeMode::kPre) prepare_post<kDim>(p, workspace, stream);
    attend_pages<Scorers>(p, workspace, head_table(p.keys.layout), stream);
  }
  if (workspace.window_splits > 0) attend_window<kDim>(p, workspace, stream);
  stream.launch("merge_splits", device::merge_splits_launch(p, workspace),
                device::merge_splits_kernel, p, workspace);
}

template <int kDim, typename Stream>
void attend_class(const AttendParams& p, const AttendTiling* tiling, Stream& stream) {
  SVDQ_CHECK(!p.token_slots || p.keys.sink_tokens == 0,
             "attend over gathered pages takes no sink_tokens, got ", p.keys.sink_tokens);
  const auto attend = [&]<bool kGatheredPages>() {
    if (p.keys.layout.rope == RopeMode::kPre) {
      attend_keys<kDim, ReconstructedScorers<kDim, kGatheredPages>>(p, tiling, stream);
    } else {
      attend_keys<kDim, HybridScorers<kDim, kGatheredPages>>(p, tiling, stream);
    }
  };
  if (p.keys.layout.rope == RopeMode::kPost) {
    attend_keys<kDim, FoldedScorers<kDim>>(p, tiling, stream);
  } else if (p.token_slots) {
    attend.template operator()<true>();
  } else {
    attend.template operator()<false>();
  }
}

template <typename Stream>
void attend(const AttendParams& p, Stream& stream) {
  with_dim_class(p.keys.layout.head_dim,
                 [&]<int kDim>() { attend_class<kDim>(p, nullptr, stream); });
}

template <typename Stream>
void merge(const MergeParams& p, Stream& stream) {
  if (p.rows == 0) return;
  stream.launch("merge", device::merge_launch(p), device::merge_kernel, p);
}

}  // namespace svdq::gpu
