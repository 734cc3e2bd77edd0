// Operators that read stored keys and values. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "csrc/torch/call.h"
#include "csrc/torch/hybrid_keys.h"
#include "csrc/torch/nouns.h"

namespace svdq::torch_binding {
namespace {

at::Tensor unpack_codes(const at::Tensor& k_pages, const at::Tensor& page_table, int64_t slot,
                        int64_t num_tokens, at::IntArrayRef layout_ints) {
  const Checker check("svdq::unpack_codes", k_pages);
  const Layout layout = check.layout(layout_ints);
  check.tensor(k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  const UnpackParams params =
      check_packed_tokens(check, layout, k_pages, page_table, slot, num_tokens);
  at::Tensor codes = at::empty({num_tokens, layout.rank()}, k_pages.options());
  Call(check.device())(&Backend::unpack_codes, {params, codes.mutable_data_ptr<uint8_t>()});
  return codes;
}

at::Tensor unpack_keys(const at::Tensor& k_pages, int64_t position, const at::Tensor& page_table,
                       int64_t slot, int64_t num_tokens, const at::Tensor& basis,
                       const at::Tensor& scale, const at::Tensor& mean,
                       const std::optional<at::Tensor>& post_mean,
                       const std::optional<at::Tensor>& inv_freq, at::IntArrayRef layout_ints) {
  const Checker check("svdq::unpack_keys", k_pages);
  const Layout layout = check.layout(layout_ints);
  check.tensor(k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  const KeyCodec codec = check_codec(check, layout, {basis, scale, mean, post_mean, inv_freq});
  UnpackParams params = check_packed_tokens(check, layout, k_pages, page_table, slot, num_tokens);
  const Call call(check.device());
  const auto decode = [&](const LayoutView& view, const KeyCodec& own) {
    at::Tensor keys = at::empty({view.num_heads, num_tokens, view.head_dim}, mean.options());
    params.layout = view;
    call(&Backend::unpack_keys, {params, own, position, keys.mutable_data_ptr<float>()});
    return keys;
  };
  if (layout.rope() != RopeMode::kHybrid) return decode(layout.view(), codec);
  at::Tensor keys = decode(layout.pre_view(), codec);
  return keys.add_(decode(layout.post_view(), post_codec(codec)));
}

at::Tensor unpack_values(const at::Tensor& v_pages, const at::Tensor& page_table, int64_t slot,
                         int64_t num_tokens, at::IntArrayRef layout_ints) {
  const Checker check("svdq::unpack_values", v_pages);
  const Layout layout = check.layout(layout_ints);
  const DataType dtype = check.value_pool(v_pages, layout);
  const UnpackParams params =
      check_packed_tokens(check, layout, v_pages, page_table, slot, num_tokens);
  at::Tensor values = at::empty({layout.num_heads(), num_tokens, layout.head_dim()},
                                v_pages.options().dtype(at::kFloat));
  Call(check.device())(&Backend::unpack_values, {params, dtype, values.mutable_data_ptr<float>()});
  return values;
}

// The same functions serve both devices: a Call runs the stages where the tensors lie.
void register_operators(torch::Library& m) {
  m.impl("unpack_codes", &unpack_codes);
  m.impl("unpack_keys", &unpack_keys);
  m.impl("unpack_values", &unpack_values);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdq, m) {
  m.def(
      "unpack_codes(Tensor k_pages, Tensor page_table, int slot, int num_tokens, int[] layout)"
      " -> Tensor");
  m.def(
      "unpack_keys(Tensor k_pages, int position, Tensor page_table, int slot, int num_tokens,"
      " Tensor basis, Tensor scale, Tensor mean, Tensor? post_mean, Tensor? inv_freq,"
      " int[] layout) -> Tensor");
  m.def(
      "unpack_values(Tensor v_pages, Tensor page_table, int slot, int num_tokens, int[] layout)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(svdq, CPU, m) { register_operators(m); }
TORCH_LIBRARY_IMPL(svdq, CUDA, m) { register_operators(m); }

}  // namespace svdq::torch_binding
