// Reading pages back on a GPU; same results as csrc/core/unpack.h, which says what the outputs are.
#pragma once

#include "csrc/gpu/rope.h"
#include "kernels/pack/unpack.cuh"

namespace svdq::gpu {

template <typename Stream>
void unpack_codes(const UnpackCodesParams& params, Stream& stream) {
  const UnpackParams& p = params.packed;
  const device::HeadTable heads = head_table(p.layout);
  for_each_page_chunk(p.page_table, p.slot, p.num_tokens,
                      [&](const device::PageIds& ids, int64_t first, int count) {
                        stream.launch("unpack_codes", device::unpack_launch(p, count),
                                      device::unpack_codes_kernel, p, heads, ids, first,
                                      params.codes);
                      });
}

template <int kDim, typename Stream>
void unpack_keys_class(const UnpackParams& p, device::DecodeParams d, int64_t position,
                       Stream& stream) {
  const device::HeadTable heads = head_table(p.layout);
  const auto rotates = rotations(d.rope, position - p.slot % kPageTokens, nullptr, 1,
                                 device::spanned_pages(p.slot, p.num_tokens), stream);
  d.offset_rotation = rotates.slots;
  d.page_rotation = rotates.pages;
  for_each_page_chunk(p.page_table, p.slot, p.num_tokens,
                      [&](const device::PageIds& ids, int64_t first, int count) {
                        stream.launch(
                            "unpack_keys",
                            device::unpack_launch(p, count, sizeof(device::UnpackPlan<kDim>)),
                            device::unpack_keys_kernel<kDim>, p, heads, ids, first, d);
                      });
}

template <typename Stream>
void unpack_keys(const UnpackKeysParams& p, Stream& stream) {
  if (p.packed.num_tokens == 0) return;
  const device::DecodeParams d{p.codec.rope,  nullptr,      nullptr, p.codec.basis,
                               p.codec.scale, p.codec.mean, p.keys};
  with_dim_class(p.packed.layout.head_dim,
                 [&]<int kDim>() { unpack_keys_class<kDim>(p.packed, d, p.position, stream); });
}

template <typename Stream>
void unpack_values(const UnpackValuesParams& params, Stream& stream) {
  const UnpackParams& p = params.packed;
  const device::HeadTable heads = head_table(p.layout);
  for_each_page_chunk(
      p.page_table, p.slot, p.num_tokens,
      [&](const device::PageIds& ids, int64_t first, int count) {
        if (p.layout.packs_values()) {
          const int bytes = device::unpack_rows_bytes(p.layout.head_dim);
          stream.launch("unpack_values", device::unpack_launch(p, count, bytes),
                        device::unpack_values_kernel, p, heads, ids, first, params.values);
        } else {
          stream.launch("widen_values", device::unpack_launch(p, count),
                        device::widen_values_kernel, p, ids, first, params.dtype, params.values);
        }
      });
}

}  // namespace svdq::gpu
