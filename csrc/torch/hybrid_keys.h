// The two steps of packing hybrid keys: pre-RoPE channels, then post-RoPE channels of their residual.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "csrc/core/layout.h"
#include "csrc/torch/call.h"

namespace svdq::torch_binding {

// The codec of the post-RoPE part of hybrid keys.
inline KeyCodec post_codec(const KeyCodec& codec) {
  return {Rope{}, codec.basis, codec.scale, codec.post_mean, nullptr};
}

inline TokenSource float_source(const at::Tensor& keys) {
  return {keys.const_data_ptr(), DataType::kFloat32, keys.stride(0), keys.stride(1), keys.size(1)};
}

// Tokens whose pre-RoPE channels are decoded at once, so that their float keys take a megabyte or two for
// a prompt of any length.
inline constexpr int64_t kResidualTokens = 512;

// Pages that take tokens from slot `slot` on.
struct Destination {
  uint8_t* pages;
  const int32_t* page_table;
  int64_t slot;
};

// Packs the pre-RoPE channels of keys, the first of which is at `position`.
inline void pack_pre(const Call& call, const Layout& layout, const KeyCodec& codec,
                     const TokenSource& source, int64_t position, const Destination& to) {
  if (layout.pre_rank() == 0) return;
  call(&Backend::pack_keys,
       {source, layout.pre_view(), codec, position, to.pages, to.page_table, to.slot});
}

// The residual of `keys` after their packed pre-RoPE channels, kResidualTokens tokens at a time:
// fn(first, residual) gets the rotated keys from token `first` on less their decoded pre-RoPE channels,
// [H, n, D] float.
template <typename Fn>
void for_each_residual(const Call& call, const Layout& layout, const KeyCodec& codec,
                       const at::Tensor& keys, int64_t position, const Destination& from,
                       const Fn& fn) {
  const LayoutView pre = layout.pre_view();
  for (int64_t first = 0; first < keys.size(1); first += kResidualTokens) {
    const int64_t count = std::min(kResidualTokens, keys.size(1) - first);
    at::Tensor residual =
        at::empty({pre.num_heads, count, pre.head_dim}, keys.options().dtype(at::kFloat));
    call(&Backend::unpack_keys, {{pre, from.pages, from.page_table, from.slot + first, count},
                                 codec,
                                 position + first,
                                 residual.mutable_data_ptr<float>()});
    residual.neg_().add_(keys.narrow(1, first, count));
    fn(first, residual);
  }
}

// Packs keys in any layout: pre-RoPE channels, then post-RoPE channels of what those leave. `errors`
// [H, T] may be null.
inline void pack_keys_of(const Call& call, const Layout& layout, const KeyCodec& codec,
                         const at::Tensor& keys, const TokenSource& source, int64_t position,
                         const Destination& to, float* errors = nullptr) {
  if (layout.rope() != RopeMode::kHybrid) {
    call(&Backend::pack_keys, {source, layout.view(), codec, position, to.pages, to.page_table,
                               to.slot, errors, source.num_tokens});
    return;
  }
  pack_pre(call, layout, codec, source, position, to);
  if (layout.post_rank() == 0 && !errors) return;
  for_each_residual(
      call, layout, codec, keys, position, to, [&](int64_t first, const at::Tensor& rest) {
        call(&Backend::pack_keys,
             {float_source(rest), layout.post_view(), post_codec(codec), 0, to.pages, to.page_table,
              to.slot + first, errors ? errors + first : nullptr, source.num_tokens});
      });
}

}  // namespace svdq::torch_binding
