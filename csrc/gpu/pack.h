// The pack stage on a GPU: keys and values of a prefill, or of a page that leaves the window.
#pragma once

#include "csrc/gpu/project.h"
#include "kernels/pack.cuh"

namespace svdq::gpu {

template <int kDim, typename Queue>
void pack_keys_class(const PackKeysParams& p, Queue& queue) {
  check_aligned(p.basis, "basis");
  check_aligned(p.pages, "k_pages");
  const device::HeadTable heads = head_table(p.layout);
  const int64_t pages = device::spanned_pages(p.slot, p.keys.num_tokens);
  const int64_t first_position = p.position - p.slot % kPageTokens;
  const auto rows = token_rows(p.keys, p.rope, first_position, pages, queue);
  for_each_page_run(p.page_table, p.slot, p.keys.num_tokens,
                    [&](const device::PageIds& ids, int64_t first, int count) {
                      queue.launch("pack_keys", device::pack_keys_launch<kDim>(p, count),
                                   device::pack_keys_kernel<kDim>, p, rows, heads, ids, first);
                    });
}

template <typename Queue>
void pack_keys(const PackKeysParams& p, Queue& queue) {
  with_dim_class(p.layout.head_dim, [&]<int kDim>() { pack_keys_class<kDim>(p, queue); });
}

template <int kDim, typename Queue>
void pack_values_class(const PackValuesParams& p, Queue& queue) {
  check_aligned(p.pages, "v_pages");
  const ValueLayout& value = p.layout.value;
  const auto pack =
      value.bits == 2 ? device::pack_values_kernel<kDim, 2> : device::pack_values_kernel<kDim, 4>;
  const auto copy = value.bits == 16 ? device::copy_values_kernel<uint16_t>
                                     : device::copy_values_kernel<uint32_t>;
  const bool aligned = device::aligned_rows(p.values);
  for_each_page_run(p.page_table, p.slot, p.values.num_tokens,
                    [&](const device::PageIds& ids, int64_t first, int count) {
                      const auto shape = device::pack_values_launch<kDim>(p, count);
                      if (value.packed()) {
                        queue.launch("pack_values", shape, pack, p, aligned, ids, first);
                      } else {
                        queue.launch("copy_values", shape, copy, p, ids, first);
                      }
                    });
}

template <typename Queue>
void pack_values(const PackValuesParams& p, Queue& queue) {
  with_dim_class(p.layout.head_dim, [&]<int kDim>() { pack_values_class<kDim>(p, queue); });
}

}  // namespace svdq::gpu
