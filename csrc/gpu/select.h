// The select stage on a GPU: its scratch memory and its launches. Everything follows from shapes; no
// length is read on the host.
#pragma once

#include <vector>

#include "csrc/gpu/rotations.h"
#include "kernels/select_absorb.cuh"
#include "kernels/select_scores.cuh"
#include "kernels/select_top.cuh"

namespace svdq::gpu {

// Query rows that a token's scores are computed for at once.
inline int select_rows(int64_t rows) {
  int tile = 1;
  while (tile < device::kRowTile && tile < rows) tile *= 2;
  return tile;
}

// The heads with their leading channels alone, which are first in the basis and in a page.
inline std::vector<HeadPlan> leading_heads(const SelectParams& p) {
  std::vector<HeadPlan> heads;
  for (int h = 0; h < p.layout.num_heads; ++h)
    heads.push_back(device::leading_channels(p.layout.heads[h], p.channels));
  return heads;
}

template <typename Queue>
device::SelectWork plan_select(const SelectParams& p, const std::vector<HeadPlan>& leading,
                               Queue& queue) {
  device::SelectWork work{};
  work.tile_rows = select_rows(device::query_rows(p));
  work.row_tiles = static_cast<int>(divide_up(device::query_rows(p), work.tile_rows));
  int channels = 0;
  for (const HeadPlan& head : leading) {
    channels = std::max(channels, head.rank());
    work.code_bytes = std::max(work.code_bytes, device::leading_bytes(head));
  }
  work.output_tiles = static_cast<int>(divide_up((channels + 1) * work.tile_rows, 8));
  work.turn_steps = static_cast<int>(divide_up(device::select_half(p), 8));
  work.max_pages = static_cast<int>(p.table_stride);

  const int64_t heads = int64_t{p.batch} * p.layout.num_heads, tiles = heads * work.row_tiles;
  const int64_t outputs = tiles * work.output_tiles;
  work.fragments =
      queue.template allocate<device::Words2>(outputs * work.turn_steps * device::kWarpSize);
  work.step = queue.template allocate<float>(outputs * 8);
  work.constant = queue.template allocate<float>(outputs * 8);
  const int64_t samples = tiles * device::kSampleRuns * work.tile_rows;
  work.sample_max = queue.template allocate<float>(samples);
  work.sample_sum = queue.template allocate<float>(samples);
  work.weights = queue.template allocate<float>(heads * work.max_pages * kPageTokens);
  return work;
}

template <int kRows, typename Queue>
void score_tokens(const SelectParams& p, const device::SelectWork& work,
                  const device::HeadTable& heads, Queue& queue) {
  queue.launch("select_norms", device::select_norms_launch(p, work),
               device::select_norms_kernel<kRows>, p, work, heads);
  queue.launch("select_scores", device::select_scores_launch(p, work),
               device::select_scores_kernel<kRows>, p, work, heads);
}

template <typename Queue>
void select(const SelectParams& p, Queue& queue) {
  SVDQ_CHECK(p.channels % kQuad == 0 && p.channels > 0 && p.channels <= kMaxSelectChannels,
             "select takes a multiple of ", kQuad, " channels up to ", kMaxSelectChannels, ", got ",
             p.channels);
  SVDQ_CHECK(p.budget >= 1, "select needs a budget of at least 1 token, got ", p.budget);
  check_aligned(p.k_pages, "k_pages");
  const std::vector<HeadPlan> leading = leading_heads(p);
  device::SelectWork work = plan_select(p, leading, queue);
  if (work.max_pages > 0) {
    LayoutView layout = p.layout;
    layout.heads = leading.data();
    const device::HeadTable heads = head_table(layout);
    const Rope rope{p.rope.inv_freq, device::select_half(p)};
    work.page_rotation =
        rotations(rope, kPageTokens / 2, p.first_position, p.batch, work.max_pages, queue).pages;
    queue.launch("select_absorb", device::select_absorb_launch(p, work),
                 device::select_absorb_kernel, p, work, heads);
    switch (work.tile_rows) {
      case 1:
        score_tokens<1>(p, work, heads, queue);
        break;
      case 2:
        score_tokens<2>(p, work, heads, queue);
        break;
      case 4:
        score_tokens<4>(p, work, heads, queue);
        break;
      default:
        score_tokens<8>(p, work, heads, queue);
        break;
    }
  }
  queue.launch("select_top", device::select_top_launch(p), device::select_top_kernel, p, work);
}

}  // namespace svdq::gpu
