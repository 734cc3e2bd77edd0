// The attend and merge stages on a GPU: scratch memory and launches of a call that attend_plan.h cuts. No
// length is read on the host.
#pragma once

#include "csrc/gpu/attend_plan.h"
#include "kernels/attend/prepare.cuh"
#include "kernels/step_params.h"

namespace svdq::gpu {

template <typename Scorers, typename Stream>
device::AttendWorkspace plan_workspace(const AttendParams& p, const AttendTiling& tiling,
                                       Stream& stream) {
  const LayoutView& layout = p.keys.layout;
  device::AttendWorkspace workspace{};
  workspace.page_tiles = page_tiles_for(p, tiling.page_tiles);
  const SharedBytes bytes = shared_bytes<Scorers>(p, workspace.page_tiles);
  const bool decode = decodes(p, workspace.page_tiles);
  workspace.page_warps = decode ? page_warps(bytes, tiling.stages, stream.limits()) : 1;
  workspace.window_tiles = decode ? 1 : tiling.window_tiles;
  workspace.query_steps = query_steps(layout);
  const int64_t block_tiles = std::lcm(workspace.page_tiles, workspace.window_tiles);
  const int64_t tiles = ceil_div(device::query_rows(p), block_tiles * device::kRowTile);
  workspace.row_tiles = static_cast<int>(tiles * block_tiles);
  workspace.max_pages = static_cast<int>(p.keys.table_stride);
  workspace.page_splits =
      static_cast<int>(ceil_div(workspace.max_pages, tiling.split_pages * workspace.page_warps));
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
  workspace.tickets = stream.template allocate<int>(heads * workspace.row_tiles);
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
    if constexpr (kDim > 256) run.template operator()<Scores, device::PackedTileValues<kDim>>();
  } else if (p.keys.layout.packs_values()) {
    run.template operator()<Scores, device::PackedTileValues<kDim>>();
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
      stream.launch("attend_decode", device::attend_decode_launch<Decode>(p, workspace),
                    device::attend_decode_kernel<Decode>, p, workspace, heads);
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

// Memory for the rotations of pre-RoPE channels.
template <typename Stream>
void allocate_rotations(const AttendParams& p, device::AttendWorkspace& workspace, Stream& stream) {
  const int64_t pairs = p.keys.codec.rope.rotary_pairs;
  if (pairs == 0) return;
  if (p.token_slots) {
    workspace.pair_frequencies = stream.template allocate<uint64_t>(pairs);
  } else {
    workspace.offset_rotation = stream.template allocate<device::Floats2>(kPageTokens * pairs);
    workspace.page_rotation =
        stream.template allocate<device::Floats2>(p.keys.batch * workspace.max_pages * pairs);
  }
}

inline device::PrepareBlocks prepare_blocks(const AttendParams& p,
                                            const device::AttendWorkspace& workspace) {
  constexpr int64_t kTurns = 4 * device::kAttendThreads;  // rotations of a block
  const RopeMode rope = p.keys.layout.rope;
  const int64_t pairs = p.keys.codec.rope.rotary_pairs;
  device::PrepareBlocks blocks{rope == RopeMode::kPre ? 0 : workspace.row_tiles, 0, 0};
  if (rope == RopeMode::kPost) return blocks;
  const int64_t places = p.token_slots ? 1 : kPageTokens + workspace.max_pages;
  blocks.columns = p.keys.layout.head_dim / device::kRowTile;
  blocks.rotations = static_cast<int>(ceil_div(places * pairs, kTurns * p.keys.layout.num_heads));
  return blocks;
}

// csrc/gpu/step.h
template <int kDim, typename Stream>
void begin_step(const StepParams& p, const AttendParams& a,
                const device::AttendWorkspace& workspace, const device::HeadTable& heads,
                const device::PrepareBlocks& blocks, Stream& stream);

// `tiling` null: planned; `step` null: attend alone.
template <int kDim, typename Scorers, typename Stream>
void attend_keys(const AttendParams& p, const AttendTiling* tiling, Stream& stream,
                 const StepParams* step) {
  const AttendTiling planned = tiling ? *tiling : plan_tiling<Scorers>(p, stream.limits());
  device::AttendWorkspace workspace = plan_workspace<Scorers>(p, planned, stream);
  const device::HeadTable heads = head_table(p.keys.layout);
  device::PrepareBlocks blocks{};
  if (workspace.page_splits > 0) {
    allocate_rotations(p, workspace, stream);
    blocks = prepare_blocks(p, workspace);
  }
  if (step) {
    begin_step<kDim>(*step, p, workspace, heads, blocks, stream);
  } else if (blocks.count() > 0) {
    stream.launch("prepare", device::prepare_launch<kDim>(p, blocks), device::prepare_kernel<kDim>,
                  p, workspace, heads, blocks);
  }
  if (workspace.page_splits > 0) {
    attend_pages<Scorers>(p, workspace, heads, stream);
    if (decodes(p, workspace.page_tiles)) return;  // to the window too
  }
  if (workspace.window_splits > 0) attend_window<kDim>(p, workspace, stream);
  stream.launch("merge_splits", device::merge_splits_launch(p, workspace),
                device::merge_splits_kernel, p, workspace);
}

template <int kDim, typename Stream>
void attend_class(const AttendParams& p, const AttendTiling* tiling, Stream& stream,
                  const StepParams* step = nullptr) {
  SVDQ_CHECK(!p.token_slots || p.keys.sink_tokens == 0,
             "attend over gathered pages takes no sink_tokens, got ", p.keys.sink_tokens);
  const auto attend = [&]<bool kGatheredPages>() {
    if (p.keys.layout.rope == RopeMode::kPre) {
      attend_keys<kDim, ReconstructedScorers<kDim, kGatheredPages>>(p, tiling, stream, step);
    } else {
      attend_keys<kDim, HybridScorers<kDim, kGatheredPages>>(p, tiling, stream, step);
    }
  };
  if (p.keys.layout.rope == RopeMode::kPost) {
    attend_keys<kDim, FoldedScorers<kDim>>(p, tiling, stream, step);
  } else if (p.token_slots) {
    attend.template operator()<true>();
  } else {
    attend.template operator()<false>();
  }
}

template <typename Stream>
void attend(const AttendParams& p, Stream& stream) {
  check_aligned(p.keys.pages, "k_pages");
  check_aligned(p.v_pages, "v_pages");
  check_aligned(p.keys.codec.basis, "basis");
  with_dim_class(p.keys.layout.head_dim,
                 [&]<int kDim>() { attend_class<kDim>(p, nullptr, stream); });
}

template <typename Stream>
void merge(const MergeParams& p, Stream& stream) {
  if (p.rows == 0) return;
  stream.launch("merge", device::merge_launch(p), device::merge_kernel, p);
}

}  // namespace svdq::gpu
