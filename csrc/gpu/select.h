// The select stage on a GPU: its scratch memory and its launches. Everything follows from shapes; no
// length is read on the host.
#pragma once

#include <vector>

#include "csrc/gpu/rope.h"
#include "kernels/select/absorb.cuh"
#include "kernels/select/score.cuh"
#include "kernels/select/top.cuh"

namespace svdq::gpu {

// Query rows that a token's scores are computed for at once.
inline int select_rows(int64_t rows) {
  int tile = 1;
  while (tile < device::kRowTile && tile < rows) tile *= 2;
  return tile;
}

// The heads with their leading channels alone, which are first in the basis and in a page.
inline std::vector<HeadPlan> proxy_heads(const SelectParams& p) {
  std::vector<HeadPlan> heads;
  for (int h = 0; h < p.keys.layout.num_heads; ++h)
    heads.push_back(device::proxy_channels(p.keys.layout.heads[h], p.channels));
  return heads;
}

template <typename Stream>
device::SelectWorkspace plan_select(const SelectParams& p, const std::vector<HeadPlan>& leading,
                                    Stream& stream) {
  device::SelectWorkspace workspace{};
  workspace.tile_rows = select_rows(device::query_rows(p));
  workspace.row_tiles = static_cast<int>(ceil_div(device::query_rows(p), workspace.tile_rows));
  int channels = 0;
  for (const HeadPlan& head : leading) {
    channels = std::max(channels, head.rank());
    workspace.code_bytes = std::max(workspace.code_bytes, device::proxy_bytes(head));
  }
  workspace.output_tiles = static_cast<int>(ceil_div((channels + 1) * workspace.tile_rows, 8));
  workspace.rotation_steps = static_cast<int>(ceil_div(device::select_half(p), 8));
  workspace.max_pages = static_cast<int>(p.keys.table_stride);

  const int64_t heads = int64_t{p.keys.batch} * p.keys.layout.num_heads,
                tiles = heads * workspace.row_tiles;
  const int64_t outputs = tiles * workspace.output_tiles;
  workspace.fragments = stream.template allocate<device::Words2>(
      outputs * workspace.rotation_steps * device::kWarpSize);
  workspace.step = stream.template allocate<float>(outputs * 8);
  workspace.constant = stream.template allocate<float>(outputs * 8);
  const int64_t samples = tiles * device::kSampleChunks * workspace.tile_rows;
  workspace.sample_max = stream.template allocate<float>(samples);
  workspace.sample_sum = stream.template allocate<float>(samples);
  workspace.weights = stream.template allocate<float>(heads * workspace.max_pages * kPageTokens);
  return workspace;
}

template <int kRows, typename Stream>
void score_tokens(const SelectParams& p, const device::SelectWorkspace& workspace,
                  const device::HeadTable& heads, Stream& stream) {
  stream.launch("select_norms", device::select_norms_launch(p, workspace),
                device::select_norms_kernel<kRows>, p, workspace, heads);
  stream.launch("select_scores", device::select_scores_launch(p, workspace),
                device::select_scores_kernel<kRows>, p, workspace, heads);
}

template <typename Stream>
void select(const SelectParams& p, Stream& stream) {
  SVDQ_CHECK(p.channels % kQuad == 0 && p.channels > 0 && p.channels <= kMaxSelectChannels,
             "select takes a multiple of ", kQuad, " channels up to ", kMaxSelectChannels, ", got ",
             p.channels);
  SVDQ_CHECK(p.budget >= 1, "select needs a budget of at least 1 token, got ", p.budget);
  check_aligned(p.keys.pages, "k_pages");
  const std::vector<HeadPlan> leading = proxy_heads(p);
  device::SelectWorkspace workspace = plan_select(p, leading, stream);
  if (workspace.max_pages > 0) {
    LayoutView layout = p.keys.layout;
    layout.heads = leading.data();
    const device::HeadTable heads = head_table(layout);
    const Rope rope{p.keys.codec.rope.inv_freq, device::select_half(p)};
    workspace.page_rotation = rotations(rope, kPageTokens / 2, p.keys.first_position, p.keys.batch,
                                        workspace.max_pages, stream)
                                  .pages;
    stream.launch("select_absorb", device::select_absorb_launch(p, workspace),
                  device::select_absorb_kernel, p, workspace, heads);
    switch (workspace.tile_rows) {
      case 1:
        score_tokens<1>(p, workspace, heads, stream);
        break;
      case 2:
        score_tokens<2>(p, workspace, heads, stream);
        break;
      case 4:
        score_tokens<4>(p, workspace, heads, stream);
        break;
      default:
        score_tokens<8>(p, workspace, heads, stream);
        break;
    }
  }
  stream.launch("select_top", device::select_top_launch(p), device::select_top_kernel, p,
                workspace);
}

}  // namespace svdq::gpu
