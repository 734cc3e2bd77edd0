// The attend and merge stages on a GPU: scratch memory and launches of a call that attend_plan.h cuts. No
// length is read on the host.
#pragma once

#include "csrc/gpu/attend_plan.h"
#include "csrc/gpu/rope.h"
#include "kernels/attend/merge.cuh"

namespace svdq::gpu {

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
  stream.launch("fold_query", device::fold_query_launch<kDim>(p, workspace),
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
  check_aligned(p.keys.pages, "k_pages");
  check_aligned(p.v_pages, "v_pages");
  with_dim_class(p.keys.layout.head_dim,
                 [&]<int kDim>() { attend_class<kDim>(p, nullptr, stream); });
}

template <typename Stream>
void merge(const MergeParams& p, Stream& stream) {
  if (p.rows == 0) return;
  stream.launch("merge", device::merge_launch(p), device::merge_kernel, p);
}

}  // namespace svdq::gpu
