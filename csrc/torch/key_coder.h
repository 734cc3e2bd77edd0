// What keys are coded with, as arguments of operators, and the two steps of packing hybrid keys.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "csrc/torch/call.h"
#include "csrc/torch/tensor_checks.h"

namespace svdq::torch_binding {

// Checks the tensors of one sequence's codec.
inline KeyCodec check_codec(const Checker& check, const Layout& layout, const at::Tensor& basis,
                            const at::Tensor& scale, const at::Tensor& mean,
                            const std::optional<at::Tensor>& post_mean,
                            const std::optional<at::Tensor>& inv_freq) {
  const int64_t heads = layout.num_heads(), dim = layout.head_dim();
  check.tensor(basis, "basis", at::kBFloat16, {layout.rank(), dim});
  check.tensor(scale, "scale", at::kFloat, {layout.rank()});
  check.tensor(mean, "mean", at::kFloat, {heads, dim});
  return {check.rope(inv_freq, layout.rope(), dim),
          static_cast<const uint16_t*>(basis.const_data_ptr()), scale.const_data_ptr<float>(),
          mean.const_data_ptr<float>(), check.post_mean(post_mean, layout.rope(), {heads, dim})};
}

// The codec of the post-RoPE part of hybrid keys.
inline KeyCodec post_codec(const KeyCodec& codec) {
  return {Rope{}, codec.basis, codec.scale, codec.post_mean, nullptr};
}

inline TokenSource float_source(const at::Tensor& keys) {
  return {keys.const_data_ptr(), DataType::kFloat32, keys.stride(0), keys.stride(1), keys.size(1)};
}

// Tokens whose core is decoded at once: their float keys are a megabyte or two, whatever the prompt.
inline constexpr int64_t kResidualTokens = 512;

// Where tokens from slot `slot` on are packed.
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

// What packed pre-RoPE channels leave of `keys`, a run of tokens after the other: fn(first, residual)
// gets the rotated keys from token `first` on less their decoded core, [H, n, D] float.
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

}  // namespace svdq::torch_binding
