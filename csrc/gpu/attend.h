// The attend stage on a GPU: how a call is cut into blocks, its scratch memory, and its launches.
// Everything follows from shapes; no length is read on the host.
#pragma once

#include <numeric>
#include <type_traits>

#include "csrc/gpu/rotations.h"
#include "kernels/attend_decode.cuh"
#include "kernels/attend_exact.cuh"
#include "kernels/attend_tiles.cuh"
#include "kernels/merge.cuh"

namespace svdq::gpu {

// How a call is cut. The answer does not depend on it, but for rounding.
struct AttendCut {
  int split_pages;  // pages of a block, or of a warp of attend_decode, at least 1
  int split_exact;  // exact rows of a block, a multiple of 64
  int stages;       // pages in flight or in use, 2 to 4
  // 8-row tiles of a block: 1, or an even number up to kMaxTiles. More than 1 asks for values,
  // exact rows alike, that tiles_pages or tiles_exact takes.
  int page_tiles = 1;
  int exact_tiles = 1;
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
  const int core = layout.rope == RopeMode::kPost ? 0 : layout.head_dim / 16;
  if (layout.rope == RopeMode::kPre) return core;
  int most = 0;
  for (int h = 0; h < layout.num_heads; ++h) {
    int steps = 0;
    for (int count : layout.heads[h].tail.count) steps += device::band_steps(count);
    most = std::max(most, steps);
  }
  return core + most;
}

// Whether blocks may take several tiles. Float values have no tensor-core product of their
// accuracy, so they keep plain arithmetic.
inline bool tiles_pages(const AttendParams& p) {
  return p.layout.value.packed() || p.v_dtype != DataType::kFloat32;
}

// Exact rows must be read in vectors, and queries rounded to the keys' dtype would not do.
inline bool tiles_exact(const AttendParams& p) {
  const auto aligned = [](const void* data, int64_t to) {
    return reinterpret_cast<uintptr_t>(data) % to == 0;
  };
  return p.exact_dtype != DataType::kFloat32 && p.exact_dtype == p.query_dtype &&
         aligned(p.query, 4) && aligned(p.exact_keys, 16) && aligned(p.exact_values, 16) &&
         p.exact_batch_stride % 8 == 0 && p.exact_head_stride % 8 == 0;
}

// Tiles of a block for so many query rows of a KV head. From the second tile on the tiled kernels
// copy a page once for all rows of the block and reconstruct its core channels once
// (docs/cuda.md, "Many query rows").
template <int kDim>
int tiles_of_block(int64_t rows) {
  if (rows <= device::kRowTile) return 1;
  const int64_t pairs = divide_up(rows, device::kWarpRows);
  return static_cast<int>(std::min<int64_t>(device::kMaxTiles<kDim>, 2 * pairs));
}

// Whether a warp has registers for all channels of a page: it holds an output for each, and with
// core channels some columns of the keys.
inline bool fits_warp(const LayoutView& layout) {
  return layout.rope == RopeMode::kPost || layout.head_dim <= 256;
}

// Whether pages of one tile go to attend_decode, where a split is a warp.
inline bool decodes(const AttendParams& p, int page_tiles) {
  return page_tiles == 1 && p.layout.value.packed() && fits_warp(p.layout);
}

// Tiles of a block that asks for `tiles`: what attend_decode cannot serve, two tiles can. Gathered
// pages are few and decoded from by few rows, so more tiles are not compiled for them.
inline int page_tiles_for(const AttendParams& p, int tiles) {
  if (p.token_slots) tiles = 1;
  return tiles == 1 && p.layout.value.packed() && !fits_warp(p.layout) ? 2 : tiles;
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
using AbsorbedScorers = Scorers<device::AbsorbedDecode<kDim>, device::AbsorbedScores<kDim>,
                                device::AbsorbedTiles<kDim>>;
// kOwnSlots: for gathered pages. Tail channels alone do not ask where a token came from.
template <int kDim, bool kOwnSlots>  // see fits_warp
using ReconstructedScorers =
    Scorers<std::conditional_t<kDim <= 256, device::ReconstructedDecode<kDim, 4, kOwnSlots>, void>,
            device::ReconstructedScores<kDim, kOwnSlots>,
            device::ReconstructedTiles<kDim, kDim == 128 ? 4 : 2, kOwnSlots>>;
template <int kDim, bool kOwnSlots>
using HybridScorers =
    Scorers<std::conditional_t<kDim <= 256, device::HybridDecode<kDim, kOwnSlots>, void>,
            device::HybridScores<kDim, kOwnSlots>, device::HybridTiles<kDim, kOwnSlots>>;

// Shared memory of a block of the kernel over pages, but for its stages, and what each page in
// flight takes there.
struct SharedBytes {
  int fixed, stage;
};

template <typename Scorers>
SharedBytes shared_bytes(const AttendParams& p, int page_tiles) {
  if (page_tiles > 1) {
    return {
        device::page_tiles_fixed_bytes<typename Scorers::Tiled>(page_tiles, query_steps(p.layout)),
        tiles_stage_bytes<Scorers::kDim>(p.layout)};
  }
  int fixed = device::kPagesPlanBytes<typename Scorers::Plain>;
  if constexpr (!std::is_void_v<typename Scorers::Decode>) {
    if (decodes(p, 1)) fixed = device::kDecodePlanBytes<typename Scorers::Decode>;
  }
  return {fixed, stage_bytes(p.layout)};
}

// Warps of a block of attend_decode: the most that have room.
inline int page_warps(const SharedBytes& bytes, int stages, const Machine& machine) {
  int warps = device::kDecodeWarps;
  while (warps > 1 && bytes.fixed + warps * stages * bytes.stage > machine.max_shared_bytes)
    warps /= 2;
  return warps;
}

template <typename Scorers>
AttendCut plan_cut(const AttendParams& p, const Machine& machine) {
  constexpr int kDim = Scorers::kDim;
  constexpr int kBlocksPerSm = 4;       // enough to hide each other's barriers
  constexpr int kDecodeWarpsPerSm = 8;  // two to a scheduler, with their copies in flight
  constexpr int kLeastPages = 4;        // fewer do not pay for a partial result
  constexpr int kLeastExact = 128;      // likewise
  const int64_t rows = device::query_rows(p);
  const auto share = [&](int64_t length, int64_t least, int tiles, int per_sm) {
    const int64_t blocks = divide_up(rows, tiles * device::kRowTile) * p.layout.num_heads * p.batch;
    const int64_t wanted = divide_up(int64_t{per_sm} * machine.num_sms, blocks);
    return std::max(least, divide_up(length, wanted));
  };

  AttendCut cut{};
  cut.exact_tiles = tiles_exact(p) ? tiles_of_block<kDim>(rows) : 1;
  cut.page_tiles = page_tiles_for(p, tiles_pages(p) ? tiles_of_block<kDim>(rows) : 1);
  const auto stages = [&](int tiles) {
    const SharedBytes bytes = shared_bytes<Scorers>(p, tiles);
    return std::min(4, (machine.max_shared_bytes - bytes.fixed) / bytes.stage);
  };
  const int least_tiles = page_tiles_for(p, 1);
  while (cut.page_tiles > least_tiles && stages(cut.page_tiles) < 2)
    cut.page_tiles = std::max(least_tiles, cut.page_tiles - 2);
  cut.stages = stages(cut.page_tiles);
  const SharedBytes least = shared_bytes<Scorers>(p, least_tiles);
  SVDQ_CHECK(cut.stages >= 2, "attend needs ", least.fixed + 2 * least.stage,
             " bytes of shared memory a block for head_dim ", p.layout.head_dim, " and pages of ",
             least.stage, " bytes a head; this device gives ", machine.max_shared_bytes);
  const bool decode = decodes(p, cut.page_tiles);
  if (decode) {
    // One page in flight a warp is several times what hides the memory's latency, so room for more
    // blocks, which hide that of instructions, comes first.
    const Machine quarter{machine.num_sms, machine.max_shared_bytes / 4};
    while (cut.stages > 2 && page_warps(least, cut.stages, quarter) < device::kDecodeWarps)
      --cut.stages;
  }
  cut.split_pages = static_cast<int>(share(p.table_stride, kLeastPages, cut.page_tiles,
                                           decode ? kDecodeWarpsPerSm : kBlocksPerSm));
  const int64_t exact = share(p.exact_rows, kLeastExact, cut.exact_tiles, kBlocksPerSm);
  cut.split_exact = static_cast<int>(divide_up(exact, kPageTokens) * kPageTokens);
  return cut;
}

template <typename Scorers, typename Queue>
device::AttendWork plan_work(const AttendParams& p, const AttendCut& cut, Queue& queue) {
  const LayoutView& layout = p.layout;
  device::AttendWork work{};
  work.page_tiles = page_tiles_for(p, cut.page_tiles);
  const SharedBytes bytes = shared_bytes<Scorers>(p, work.page_tiles);
  work.page_warps = page_warps(bytes, cut.stages, queue.machine());
  work.exact_tiles = cut.exact_tiles;
  work.query_steps = query_steps(layout);
  const int64_t block_tiles = std::lcm(work.page_tiles, cut.exact_tiles);
  const int64_t tiles = divide_up(device::query_rows(p), block_tiles * device::kRowTile);
  work.row_tiles = static_cast<int>(tiles * block_tiles);
  work.max_pages = static_cast<int>(p.table_stride);
  work.split_pages = cut.split_pages;
  work.page_splits = static_cast<int>(divide_up(work.max_pages, cut.split_pages));
  work.split_exact = cut.split_exact;
  work.exact_splits = static_cast<int>(divide_up(p.exact_rows, cut.split_exact));
  work.stages = cut.stages;
  work.stage_bytes = bytes.stage;

  const int64_t heads = int64_t{p.batch} * layout.num_heads;
  const auto weights = [&](bool used, int64_t tiles) {
    if (!used) return device::Weights{};
    const int64_t all = heads * tiles;
    return device::Weights{queue.template allocate<device::Words2>(
                               all * device::max_steps(layout.head_dim) * device::kWarpSize),
                           queue.template allocate<float>(all * device::kRowTile),
                           queue.template allocate<float>(all * device::kRowTile)};
  };
  work.absorbed = weights(layout.rope != RopeMode::kPre, work.row_tiles);
  work.columns = weights(layout.rope != RopeMode::kPost, layout.head_dim / device::kRowTile);
  const int64_t slots = heads * work.row_tiles * device::kRowTile * work.splits();
  work.partial_out = queue.template allocate<float>(slots * layout.head_dim);
  work.partial_max = queue.template allocate<float>(slots);
  work.partial_sum = queue.template allocate<float>(slots);
  return work;
}

template <typename Scores, typename Queue>
void attend_page_tiles(const AttendParams& p, const device::AttendWork& work,
                       const device::HeadTable& heads, Queue& queue) {
  constexpr int kDim = Scores::kDim;
  using Lean = typename Scores::Lean;  // exact values take registers for their probabilities' terms
  const auto run = [&]<typename Use, typename Values>() {
    queue.launch("attend_page_tiles", device::attend_page_tiles_launch<Use>(p, work),
                 device::attend_page_tiles_kernel<Use, Values>, p, work, heads);
  };
  if constexpr (Scores::kGathered) {  // see page_tiles_for
    if constexpr (kDim > 256) {
      p.layout.value.bits == 4
          ? run.template operator()<Scores, device::PackedTileValues<kDim, 4>>()
          : run.template operator()<Scores, device::PackedTileValues<kDim, 2>>();
    }
  } else if (p.layout.value.bits == 4) {
    run.template operator()<Scores, device::PackedTileValues<kDim, 4>>();
  } else if (p.layout.value.bits == 2) {
    run.template operator()<Scores, device::PackedTileValues<kDim, 2>>();
  } else if (p.v_dtype == DataType::kBFloat16) {
    run.template operator()<Lean, device::ExactTileValues<kDim, DataType::kBFloat16>>();
  } else {
    run.template operator()<Lean, device::ExactTileValues<kDim, DataType::kFloat16>>();
  }
}

// The kernel over pages that the work is cut for.
template <typename Scorers, typename Queue>
void attend_pages(const AttendParams& p, const device::AttendWork& work,
                  const device::HeadTable& heads, Queue& queue) {
  using Decode = typename Scorers::Decode;
  using Plain = typename Scorers::Plain;
  if (work.page_tiles > 1) {
    attend_page_tiles<typename Scorers::Tiled>(p, work, heads, queue);
  } else if (decodes(p, 1)) {
    if constexpr (!std::is_void_v<Decode>) {
      const auto kernel = p.layout.value.bits == 4 ? device::attend_decode_kernel<Decode, 4>
                                                   : device::attend_decode_kernel<Decode, 2>;
      queue.launch("attend_decode", device::attend_decode_launch<Decode>(p, work), kernel, p, work,
                   heads);
    }
  } else {
    queue.launch("attend_pages", device::attend_pages_launch<Plain>(p, work),
                 device::attend_pages_kernel<Plain>, p, work, heads);
  }
}

template <int kDim, typename Queue>
void attend_exact(const AttendParams& p, const device::AttendWork& work, Queue& queue) {
  if (work.exact_tiles == 1) {
    queue.launch("attend_exact", device::attend_exact_launch<kDim>(p, work),
                 device::attend_exact_kernel<kDim>, p, work);
    return;
  }
  const auto kernel = p.exact_dtype == DataType::kBFloat16
                          ? device::attend_exact_tiles_kernel<kDim, DataType::kBFloat16>
                          : device::attend_exact_tiles_kernel<kDim, DataType::kFloat16>;
  queue.launch("attend_exact_tiles", device::attend_exact_tiles_launch<kDim>(p, work), kernel, p,
               work);
}

// Prepares what multiplies the codes of core channels.
template <int kDim, typename Queue>
void prepare_core(const AttendParams& p, device::AttendWork& work, Queue& queue) {
  if (p.token_slots && p.rope.half > 0) {
    work.pair_turns = queue.template allocate<uint64_t>(p.rope.half);
    queue.launch("pair_turns", device::pair_turns_launch(p.rope), device::pair_turns_kernel, p.rope,
                 work.pair_turns);
  } else {
    const auto turns = rotations(p.rope, 0, p.first_position, p.batch, work.max_pages, queue);
    work.offset_rotation = turns.slots;
    work.page_rotation = turns.pages;
  }
  queue.launch("columns", device::columns_launch<kDim>(p, work), device::columns_kernel<kDim>, p,
               work, head_table(p.layout));
}

// Likewise of tail channels, which follow the core's in the basis and have a mean of their own.
template <int kDim, typename Queue>
void prepare_tail(const AttendParams& p, const device::AttendWork& work, Queue& queue) {
  AttendParams tail = p;
  if (p.layout.rope == RopeMode::kHybrid) tail.mean = p.tail_mean;
  device::HeadTable heads = head_table(p.layout);
  for (int h = 0; h < p.layout.num_heads; ++h)
    heads.of[h].first_channel = p.layout.heads[h].first_tail_channel();
  queue.launch("absorb", device::absorb_launch<kDim>(p, work), device::absorb_kernel<kDim>, tail,
               work, heads);
}

// `cut` null: planned.
template <int kDim, typename Scorers, typename Queue>
void attend_keys(const AttendParams& p, const AttendCut* cut, Queue& queue) {
  device::AttendWork work =
      plan_work<Scorers>(p, cut ? *cut : plan_cut<Scorers>(p, queue.machine()), queue);
  if (work.page_splits > 0) {
    if (p.layout.rope != RopeMode::kPost) prepare_core<kDim>(p, work, queue);
    if (p.layout.rope != RopeMode::kPre) prepare_tail<kDim>(p, work, queue);
    attend_pages<Scorers>(p, work, head_table(p.layout), queue);
  }
  if (work.exact_splits > 0) attend_exact<kDim>(p, work, queue);
  queue.launch("merge_splits", device::merge_splits_launch(p, work), device::merge_splits_kernel, p,
               work);
}

template <int kDim, typename Queue>
void attend_class(const AttendParams& p, const AttendCut* cut, Queue& queue) {
  SVDQ_CHECK(!p.token_slots || p.sink_tokens == 0,
             "attend over gathered pages takes no sink_tokens, got ", p.sink_tokens);
  const auto attend = [&]<bool kOwnSlots>() {
    if (p.layout.rope == RopeMode::kPre) {
      attend_keys<kDim, ReconstructedScorers<kDim, kOwnSlots>>(p, cut, queue);
    } else {
      attend_keys<kDim, HybridScorers<kDim, kOwnSlots>>(p, cut, queue);
    }
  };
  if (p.layout.rope == RopeMode::kPost) {
    attend_keys<kDim, AbsorbedScorers<kDim>>(p, cut, queue);
  } else if (p.token_slots) {
    attend.template operator()<true>();
  } else {
    attend.template operator()<false>();
  }
}

template <typename Queue>
void attend(const AttendParams& p, Queue& queue) {
  with_dim_class(p.layout.head_dim, [&]<int kDim>() { attend_class<kDim>(p, nullptr, queue); });
}

template <typename Queue>
void merge(const MergeParams& p, Queue& queue) {
  if (p.rows == 0) return;
  queue.launch("merge", device::merge_launch(p), device::merge_kernel, p);
}

}  // namespace svdq::gpu
