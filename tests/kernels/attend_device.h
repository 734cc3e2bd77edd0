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
  const LayoutView& layout = host.layout;
  const int64_t dim = layout.head_dim, rows = device::query_rows(host);
  const int64_t heads = int64_t{host.batch} * layout.num_heads,
                window_size = size_of(host.window_dtype);

  const auto query = upload(static_cast<const uint8_t*>(host.query), heads * rows * dim,
                            size_of(host.query_dtype));
  const auto k_pages = upload(host.k_pages, host.num_pages, layout.k_page_bytes);
  const auto v_pages = upload(host.v_pages, host.num_pages, layout.v_page_bytes);
  const auto table = upload(host.page_table, host.batch * host.table_stride);
  const auto seqlens = upload(host.cache_seqlens, host.batch),
             window_lens = upload(host.window_lens, host.batch);
  const auto basis = upload(host.basis, host.batch * layout.rank * dim),
             scale = upload(host.scale, host.batch * layout.rank);
  const auto outlier_slots = upload(host.outlier_slots, heads * host.outliers);
  const auto outlier_keys = upload(static_cast<const uint8_t*>(host.outlier_keys),
                                   heads * host.outliers * dim, size_of(host.outlier_dtype));
  const auto post_mean = upload(host.post_mean, host.post_mean ? heads * dim : 0);
  const auto mean = upload(host.mean, heads * dim),
             inv_freq = upload(host.rope.inv_freq, host.rope.rotary_pairs);
  const auto first = upload(host.first_position, host.first_position ? host.batch : 0);
  const auto token_slots =
      upload(host.token_slots, host.token_slots ? heads * host.table_stride * kPageTokens : 0);
  const auto window_keys = upload(static_cast<const uint8_t*>(host.window_keys),
                                  host.batch * host.window_batch_stride, window_size);
  const auto window_values = upload(static_cast<const uint8_t*>(host.window_values),
                                    host.batch * host.window_batch_stride, window_size);
  const DeviceArray<uint8_t> out(
      static_cast<size_t>(heads * rows * dim * size_of(host.query_dtype)));

  const DeviceArray<float> lse(static_cast<size_t>(heads * rows));

  const auto as = [](auto* type, const DeviceArray<uint8_t>& array) {
    return reinterpret_cast<decltype(type)>(array.data());
  };
  AttendParams p = host;
  p.rope.inv_freq = as(host.rope.inv_freq, inv_freq);
  p.query = query.data();
  p.k_pages = k_pages.data();
  p.v_pages = v_pages.data();
  p.page_table = as(host.page_table, table);
  p.cache_seqlens = as(host.cache_seqlens, seqlens);
  p.basis = as(host.basis, basis);
  p.scale = as(host.scale, scale);
  p.mean = as(host.mean, mean);
  p.post_mean = host.post_mean ? as(host.post_mean, post_mean) : nullptr;
  p.first_position = host.first_position ? as(host.first_position, first) : nullptr;
  p.outlier_slots = host.outliers ? as(host.outlier_slots, outlier_slots) : nullptr;
  p.outlier_keys = host.outliers ? outlier_keys.data() : nullptr;
  p.token_slots = host.token_slots ? as(host.token_slots, token_slots) : nullptr;
  p.window_keys = window_keys.data();
  p.window_values = window_values.data();
  p.window_lens = as(host.window_lens, window_lens);
  p.out = out.data();
  p.lse = lse.data();

  gpu::with_dim_class(layout.head_dim,
                      [&]<int kDim>() { gpu::attend_class<kDim>(p, tiling, stream); });
  return {out.read(), lse.read()};
}

}  // namespace svdq::testing
