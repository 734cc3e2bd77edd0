// The kernels of the attend stage run on parameters that lie on the host.
#pragma once

#include <algorithm>

#include "tests/kernels/device_test.h"

#if defined(__CUDACC__)
#include "csrc/cuda/attend_classes.cuh"
#else
#include "tests/kernels/attend_emulated.h"
#endif
#include "csrc/gpu/attend.h"
#include "tests/core/testing.h"

namespace svdq::testing {

// A copy where kernels can reach it.
template <typename T>
DeviceArray<uint8_t> upload(const T* from, int64_t count, int64_t bytes_each = sizeof(T)) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(from);
  return DeviceArray<uint8_t>(std::vector<uint8_t>(bytes, bytes + count * bytes_each));
}

struct AttendAnswer {
  std::vector<uint8_t> out;  // [B, Hq, L, D] in the query's dtype
  std::vector<float> lse;    // [B, Hq, L]
};

// Runs the stage on a copy of the parameters; `cut` null: as planned.
template <typename Stream>
AttendAnswer attend_on_device(const AttendParams& host, const gpu::AttendTiling* tiling,
                              Stream& stream) {
  const LayoutView& layout = host.keys.layout;
  const int64_t dim = layout.head_dim, rows = device::query_rows(host);
  const int64_t heads = int64_t{host.keys.batch} * layout.num_heads,
                window_size = size_of(host.window.dtype);

  const auto query = upload(static_cast<const uint8_t*>(host.queries.data), heads * rows * dim,
                            size_of(host.queries.dtype));
  const auto k_pages = upload(host.keys.pages, host.keys.num_pages, layout.k_page_bytes);
  const auto v_pages = upload(host.v_pages, host.keys.num_pages, layout.v_page_bytes);
  const auto table = upload(host.keys.page_table, host.keys.batch * host.keys.table_stride);
  const auto seqlens = upload(host.keys.cache_seqlens, host.keys.batch),
             window_lens = upload(host.window.lens, host.keys.batch);
  const auto basis = upload(host.keys.codec.basis, host.keys.batch * layout.rank * dim),
             scale = upload(host.keys.codec.scale, host.keys.batch * layout.rank);
  const auto outlier_slots = upload(host.keys.outlier_slots, heads * host.keys.num_outliers);
  const auto outlier_keys =
      upload(static_cast<const uint8_t*>(host.keys.outlier_keys),
             heads * host.keys.num_outliers * dim, size_of(host.keys.outlier_dtype));
  const auto post_mean =
      upload(host.keys.codec.post_mean, host.keys.codec.post_mean ? heads * dim : 0);
  const auto mean = upload(host.keys.codec.mean, heads * dim),
             inv_freq = upload(host.keys.codec.rope.inv_freq, host.keys.codec.rope.rotary_pairs);
  const auto first =
      upload(host.keys.first_position, host.keys.first_position ? host.keys.batch : 0);
  const auto sinks = upload(host.rules.sinks, host.rules.sinks ? host.queries.num_heads : 0);
  const auto query_position =
      upload(host.rules.query_position, host.rules.query_position ? host.keys.batch : 0);
  const auto token_slots =
      upload(host.token_slots, host.token_slots ? heads * host.keys.table_stride * kPageTokens : 0);
  const auto window_keys = upload(static_cast<const uint8_t*>(host.window.keys),
                                  host.keys.batch * host.window.batch_stride, window_size);
  const auto window_values = upload(static_cast<const uint8_t*>(host.window.values),
                                    host.keys.batch * host.window.batch_stride, window_size);
  const DeviceArray<uint8_t> out(
      static_cast<size_t>(heads * rows * dim * size_of(host.queries.dtype)));

  const DeviceArray<float> lse(static_cast<size_t>(heads * rows));

  const auto as = [](auto* type, const DeviceArray<uint8_t>& array) {
    return reinterpret_cast<decltype(type)>(array.data());
  };
  AttendParams p = host;
  p.keys.codec.rope.inv_freq = as(host.keys.codec.rope.inv_freq, inv_freq);
  p.queries.data = query.data();
  p.keys.pages = k_pages.data();
  p.v_pages = v_pages.data();
  p.keys.page_table = as(host.keys.page_table, table);
  p.keys.cache_seqlens = as(host.keys.cache_seqlens, seqlens);
  p.keys.codec.basis = as(host.keys.codec.basis, basis);
  p.keys.codec.scale = as(host.keys.codec.scale, scale);
  p.keys.codec.mean = as(host.keys.codec.mean, mean);
  p.keys.codec.post_mean =
      host.keys.codec.post_mean ? as(host.keys.codec.post_mean, post_mean) : nullptr;
  p.keys.first_position = host.keys.first_position ? as(host.keys.first_position, first) : nullptr;
  p.keys.outlier_slots =
      host.keys.num_outliers ? as(host.keys.outlier_slots, outlier_slots) : nullptr;
  p.keys.outlier_keys = host.keys.num_outliers ? outlier_keys.data() : nullptr;
  p.token_slots = host.token_slots ? as(host.token_slots, token_slots) : nullptr;
  p.rules.sinks = host.rules.sinks ? as(host.rules.sinks, sinks) : nullptr;
  p.rules.query_position = as(host.rules.query_position, query_position);
  p.window.keys = window_keys.data();
  p.window.values = window_values.data();
  p.window.lens = as(host.window.lens, window_lens);
  p.out = out.data();
  p.lse = lse.data();

  gpu::with_dim_class(layout.head_dim,
                      [&]<int kDim>() { gpu::attend_class<kDim>(p, tiling, stream); });
  return {out.read(), lse.read()};
}

}  // namespace svdq::testing
