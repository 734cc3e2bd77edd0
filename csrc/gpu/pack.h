// The pack stage on a GPU: keys and values of a prefill, or of a page that leaves the window.
#pragma once

#include "csrc/gpu/unpack.h"
#include "csrc/gpu/project.h"
#include "kernels/pack/pack.cuh"

namespace svdq::gpu {

inline constexpr int64_t kErrorTokens = 2048;  // decoded at once

// Decodes what was packed, some tokens after others, and writes how far it is off.
template <typename Stream>
void write_errors(const PackKeysParams& p, Stream& stream) {
  const int64_t numbers = int64_t{p.layout.num_heads} * p.layout.head_dim;
  const int64_t most = std::min<int64_t>(p.keys.num_tokens, kErrorTokens);
  float* decoded = stream.template allocate<float>(most * numbers);
  for (int64_t first = 0; first < p.keys.num_tokens; first += most) {
    const int64_t count = std::min(most, p.keys.num_tokens - first);
    unpack_keys({{p.layout, p.pages, p.page_table, p.slot + first, count},
                 p.codec,
                 p.position + first,
                 decoded},
                stream);
    stream.launch("key_errors", device::key_errors_launch(p.layout.num_heads, count),
                  device::key_errors_kernel, p.keys, first, count, p.layout.head_dim, decoded,
                  p.errors, p.errors_stride);
  }
}

template <int kDim, typename Stream>
void pack_keys_class(const PackKeysParams& p, Stream& stream) {
  check_aligned(p.codec.basis, "basis");
  check_aligned(p.pages, "k_pages");
  const device::HeadTable heads = head_table(p.layout);
  const int64_t pages = device::spanned_pages(p.slot, p.keys.num_tokens);
  const int64_t first_position = p.position - p.slot % kPageTokens;
  const auto rows = token_rows(p.keys, p.codec.rope, first_position, pages, stream);
  for_each_page_chunk(p.page_table, p.slot, p.keys.num_tokens,
                      [&](const device::PageIds& ids, int64_t first, int count) {
                        stream.launch("pack_keys", device::pack_keys_launch<kDim>(p, count),
                                      device::pack_keys_kernel<kDim>, p, rows, heads, ids, first);
                      });
}

template <typename Stream>
void pack_keys(const PackKeysParams& p, Stream& stream) {
  with_dim_class(p.layout.head_dim, [&]<int kDim>() { pack_keys_class<kDim>(p, stream); });
  if (p.errors && p.keys.num_tokens > 0) write_errors(p, stream);
}

template <int kDim, typename Stream>
void pack_values_class(const PackValuesParams& p, Stream& stream) {
  check_aligned(p.pages, "v_pages");
  const device::HeadTable heads = head_table(p.layout);
  const auto copy = p.values.dtype == DataType::kFloat32 ? device::copy_values_kernel<uint32_t>
                                                         : device::copy_values_kernel<uint16_t>;
  const bool aligned = device::aligned_rows(p.values);
  for_each_page_chunk(p.page_table, p.slot, p.values.num_tokens,
                      [&](const device::PageIds& ids, int64_t first, int count) {
                        const auto shape = device::pack_values_launch<kDim>(p, count);
                        if (p.layout.packs_values()) {
                          stream.launch("pack_values", shape, device::pack_values_kernel<kDim>, p,
                                        aligned, heads, ids, first);
                        } else {
                          stream.launch("copy_values", shape, copy, p, ids, first);
                        }
                      });
}

template <typename Stream>
void pack_values(const PackValuesParams& p, Stream& stream) {
  with_dim_class(p.layout.head_dim, [&]<int kDim>() { pack_values_class<kDim>(p, stream); });
}

}  // namespace svdq::gpu
