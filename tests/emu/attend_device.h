// The kernels of the attend stage run on parameters that lie on the host.
#pragma once

#include <algorithm>

#include "tests/emu/device_test.h"

#include "kernels/attend_exact.cuh"
#include "kernels/merge.cuh"
#include "tests/cpp/testing.h"

namespace svdq::testing {

// How a test cuts the work; the answer must not depend on it.
struct Cut {
  int split_pages = 2;
  int split_exact = 64;
  int stages = 3;
};

// A copy where kernels can reach it.
template <typename T>
DeviceArray<uint8_t> upload(const T* from, int64_t count, int64_t bytes_each = sizeof(T)) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(from);
  return DeviceArray<uint8_t>(std::vector<uint8_t>(bytes, bytes + count * bytes_each));
}

inline int64_t pool_pages(const AttendParams& p) {
  int32_t most = -1;
  for (int b = 0; b < p.batch; ++b) {
    for (int64_t n = 0; n * kPageTokens < p.cache_seqlens[b]; ++n)
      most = std::max(most, p.page_table[b * p.table_stride + n]);
  }
  return most + 1;
}

struct AttendAnswer {
  std::vector<uint8_t> out;  // [B, Hq, L, D] in the query's dtype
  std::vector<float> lse;    // [B, Hq, L]
};

// Calls launch(name, shape, kernel, params...) for every kernel of the stage, for one head_dim
// class.
template <int kDim, typename Launch>
AttendAnswer attend_on_device(const AttendParams& host, const Cut& cut, const Launch& launch) {
  const LayoutView& layout = host.layout;
  const int64_t dim = layout.head_dim, rows = device::query_rows(host);
  const int64_t heads = int64_t{host.batch} * layout.num_heads,
                exact_size = size_of(host.exact_dtype);
  int64_t longest = 0, most_exact = 0, key_bytes = 0;
  for (int b = 0; b < host.batch; ++b) {
    longest = std::max<int64_t>(longest, host.cache_seqlens[b]);
    most_exact = std::max<int64_t>(most_exact, host.exact_lens[b]);
  }
  for (int h = 0; h < layout.num_heads; ++h)
    key_bytes = std::max<int64_t>(
        key_bytes, layout.heads[h].core.page_bytes() + layout.heads[h].tail.page_bytes());

  device::AttendWork work{};
  const auto splits = [](int64_t n, int64_t of) {
    return static_cast<int>(std::max<int64_t>(1, (n + of - 1) / of));
  };
  work.row_tiles = splits(rows, device::kRowTile);
  work.split_pages = cut.split_pages;
  work.page_splits = splits(longest, int64_t{cut.split_pages} * kPageTokens);
  work.split_exact = cut.split_exact;
  work.exact_splits = splits(most_exact, cut.split_exact);
  work.stages = cut.stages;
  work.stage_bytes =
      static_cast<int>(key_bytes + (layout.value.packed() ? layout.value.page_bytes() : 0));

  const auto tiles = static_cast<size_t>(heads * work.row_tiles), slots = tiles * device::kRowTile;
  const bool pre = layout.rope == RopeMode::kPre;
  const size_t weight_tiles = pre ? static_cast<size_t>(heads * dim / device::kRowTile) : tiles;
  work.max_pages = splits(longest, kPageTokens);
  const DeviceArray<device::Words2> weights(weight_tiles * device::max_steps(layout.head_dim) * 32);
  const DeviceArray<float> step(weight_tiles * device::kRowTile),
      offset(weight_tiles * device::kRowTile);
  const DeviceArray<device::Floats2> offset_rotation(
      static_cast<size_t>(kPageTokens * host.rope.half)),
      page_rotation(static_cast<size_t>(host.batch * work.max_pages * host.rope.half));
  const DeviceArray<float> partial_out(slots * work.splits() * dim),
      partial_max(slots * work.splits()), partial_sum(slots * work.splits()), lse(heads * rows);
  work.weights = weights.data();
  work.step = step.data();
  work.offset = offset.data();
  work.offset_rotation = offset_rotation.data();
  work.page_rotation = page_rotation.data();
  work.partial_out = partial_out.data();
  work.partial_max = partial_max.data();
  work.partial_sum = partial_sum.data();

  const auto query = upload(static_cast<const uint8_t*>(host.query), heads * rows * dim,
                            size_of(host.query_dtype));
  const auto k_pages = upload(host.k_pages, pool_pages(host), layout.k_page_bytes);
  const auto v_pages = upload(host.v_pages, pool_pages(host), layout.v_page_bytes);
  const auto table = upload(host.page_table, host.batch * host.table_stride);
  const auto seqlens = upload(host.cache_seqlens, host.batch),
             exact_lens = upload(host.exact_lens, host.batch);
  const auto basis = upload(host.basis, host.batch * layout.rank * dim),
             scale = upload(host.scale, host.batch * layout.rank);
  const auto mean = upload(host.mean, heads * dim),
             inv_freq = upload(host.rope.inv_freq, host.rope.half);
  const auto first = upload(host.first_position, host.first_position ? host.batch : 0);
  const auto exact_keys = upload(static_cast<const uint8_t*>(host.exact_keys),
                                 host.batch * host.exact_batch_stride, exact_size);
  const auto exact_values = upload(static_cast<const uint8_t*>(host.exact_values),
                                   host.batch * host.exact_batch_stride, exact_size);
  const auto plans = upload(layout.heads, layout.num_heads);
  const DeviceArray<uint8_t> out(
      static_cast<size_t>(heads * rows * dim * size_of(host.query_dtype)));

  const auto as = [](auto* type, const DeviceArray<uint8_t>& array) {
    return reinterpret_cast<decltype(type)>(array.data());
  };
  AttendParams p = host;
  p.layout.heads = as(layout.heads, plans);
  p.rope.inv_freq = as(host.rope.inv_freq, inv_freq);
  p.query = query.data();
  p.k_pages = k_pages.data();
  p.v_pages = v_pages.data();
  p.page_table = as(host.page_table, table);
  p.cache_seqlens = as(host.cache_seqlens, seqlens);
  p.basis = as(host.basis, basis);
  p.scale = as(host.scale, scale);
  p.mean = as(host.mean, mean);
  p.first_position = host.first_position ? as(host.first_position, first) : nullptr;
  p.exact_keys = exact_keys.data();
  p.exact_values = exact_values.data();
  p.exact_lens = as(host.exact_lens, exact_lens);
  p.out = out.data();
  p.lse = lse.data();

  const auto attend_pages = [&]<typename Scores>() {
    const auto kernel = layout.value.bits == 4   ? device::attend_pages_kernel<Scores, 4>
                        : layout.value.bits == 2 ? device::attend_pages_kernel<Scores, 2>
                                                 : device::attend_pages_kernel<Scores, 0>;
    launch("attend_pages", device::attend_pages_launch<Scores>(p, work), kernel, p, work);
  };
  if (pre) {
    launch("columns", device::columns_launch<kDim>(p, work), device::columns_kernel<kDim>, p, work);
    launch("rotations", device::rotations_launch(p, work), device::rotations_kernel, p, work);
    attend_pages.template operator()<device::ReconstructedScores<kDim>>();
  } else {
    launch("absorb", device::absorb_launch<kDim>(p, work), device::absorb_kernel<kDim>, p, work);
    attend_pages.template operator()<device::AbsorbedScores<kDim>>();
  }
  launch("attend_exact", device::attend_exact_launch<kDim>(p, work),
         device::attend_exact_kernel<kDim>, p, work);
  launch("merge_splits", device::merge_splits_launch(p, work), device::merge_splits_kernel, p,
         work);
  return {out.read(), lse.read()};
}

}  // namespace svdq::testing
