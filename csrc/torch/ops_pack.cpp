// Operators that store keys and values. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "csrc/torch/call.h"
#include "csrc/torch/finite_checks.h"
#include "csrc/torch/hybrid_keys.h"
#include "csrc/torch/nouns.h"

namespace svdq::torch_binding {
namespace {

void pack_keys_(at::Tensor& k_pages, const at::Tensor& keys, int64_t position,
                const at::Tensor& page_table, int64_t slot, const at::Tensor& basis,
                const at::Tensor& scale, const at::Tensor& mean,
                const std::optional<at::Tensor>& post_mean,
                const std::optional<at::Tensor>& inv_freq, at::IntArrayRef layout_ints,
                const std::optional<at::Tensor>& errors) {
  const Checker check("svdq::pack_keys_", k_pages);
  const Layout layout = check.layout(layout_ints);
  const int64_t heads = layout.num_heads(), dim = layout.head_dim();
  const TokenSource source = check.tokens(keys, "keys", heads, dim);
  check.tensor(k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  const KeyCodec codec = check_codec(check, layout, {basis, scale, mean, post_mean, inv_freq});
  check.pages(page_table, slot, source.num_tokens, k_pages.size(0));
  if (errors) check.tensor(*errors, "errors", at::kFloat, {heads, source.num_tokens});
  check.no_overlap({{k_pages, "k_pages"}, {errors, "errors"}}, {{keys, "keys"},
                                                                {page_table, "page_table"},
                                                                {basis, "basis"},
                                                                {scale, "scale"},
                                                                {mean, "mean"},
                                                                {post_mean, "post_mean"},
                                                                {inv_freq, "inv_freq"}});
  check_finite(check, source, "keys", heads, dim);
  float* error_data = errors ? errors->mutable_data_ptr<float>() : nullptr;

  pack_keys_of(Call(check.device()), layout, codec, keys, source, position,
               {k_pages.mutable_data_ptr<uint8_t>(), page_table.const_data_ptr<int32_t>(), slot},
               error_data);
}

at::Tensor residual_keys(const at::Tensor& keys, int64_t position, const at::Tensor& basis,
                         const at::Tensor& scale, const at::Tensor& mean,
                         const std::optional<at::Tensor>& inv_freq, at::IntArrayRef layout_ints) {
  const Checker check("svdq::residual_keys", keys);
  const Layout layout = check.layout(layout_ints);
  check.require(layout.rope() == RopeMode::kHybrid, "layout must be hybrid");
  const int64_t heads = layout.num_heads(), dim = layout.head_dim();
  const TokenSource source = check.tokens(keys, "keys", heads, dim);
  const std::optional<at::Tensor> post_mean = mean;  // is not read
  const KeyCodec codec = check_codec(check, layout, {basis, scale, mean, post_mean, inv_freq});
  check_finite(check, source, "keys", heads, dim);

  // The same pages take kResidualTokens tokens after the other.
  const int64_t num_pages = page_count(std::min(kResidualTokens, source.num_tokens));
  at::Tensor pages = at::empty({num_pages, layout.k_page_bytes()}, keys.options().dtype(at::kByte));
  std::vector<int32_t> table(num_pages);
  std::iota(table.begin(), table.end(), 0);
  at::Tensor out = at::empty({heads, source.num_tokens, dim}, keys.options());
  const Call call(check.device());
  for (int64_t first = 0; first < source.num_tokens; first += kResidualTokens) {
    const int64_t count = std::min(kResidualTokens, source.num_tokens - first);
    const at::Tensor some = keys.narrow(1, first, count);
    const Destination own{pages.mutable_data_ptr<uint8_t>(), table.data(), 0};
    pack_pre(call, layout, codec, check.tokens(some, "keys", heads, dim), position + first, own);
    for_each_residual(
        call, layout, codec, some, position + first, own,
        [&](int64_t, const at::Tensor& rest) { out.narrow(1, first, count).copy_(rest); });
  }
  return out;
}

void pack_values_(at::Tensor& v_pages, const at::Tensor& values, const at::Tensor& page_table,
                  int64_t slot, at::IntArrayRef layout_ints) {
  const Checker check("svdq::pack_values_", v_pages);
  const Layout layout = check.layout(layout_ints);
  const TokenSource source = check.tokens(values, "values", layout.num_heads(), layout.head_dim());
  check.value_pool(v_pages, layout);
  const bool packed = layout.packs_values();
  if (!packed) check.dtype(values, "values", v_pages.scalar_type());
  check.pages(page_table, slot, source.num_tokens, v_pages.size(0));
  check.no_overlap({{v_pages, "v_pages"}}, {{values, "values"}, {page_table, "page_table"}});
  check_within(check, source, "values", layout.num_heads(), layout.head_dim(),
               packed ? kLargestHalf : std::numeric_limits<float>::max());
  Call(check.device())(&Backend::pack_values,
                       {source, layout.view(), static_cast<uint8_t*>(v_pages.mutable_data_ptr()),
                        page_table.const_data_ptr<int32_t>(), slot});
}

void append_window_(at::Tensor& window_keys, at::Tensor& window_values, const at::Tensor& keys,
                    const at::Tensor& values, int64_t start) {
  const Checker check("svdq::append_window_", window_keys);
  check.shape(window_keys, "window_keys", {-1, -1, -1});
  const int64_t heads = window_keys.size(0), rows = window_keys.size(1), dim = window_keys.size(2);
  check.tokens(window_keys, "window_keys", heads, dim);
  check.tokens(window_values, "window_values", heads, dim);
  check.shape(window_values, "window_values", {heads, rows, dim});
  const TokenSource new_keys = check.tokens(keys, "keys", heads, dim);
  const TokenSource new_values = check.tokens(values, "values", heads, dim);
  check.shape(values, "values", {heads, keys.size(1), dim});
  check.dtype(window_values, "window_values", window_keys.scalar_type());
  check.dtype(keys, "keys", window_keys.scalar_type());
  check.dtype(values, "values", window_keys.scalar_type());
  check.require(dim % kLanes == 0,
                "keys must have a head_dim that is a multiple of 16, got " + std::to_string(dim));
  check.require(start >= 0 && keys.size(1) <= rows && start <= rows - keys.size(1),
                "start must leave room for " + std::to_string(keys.size(1)) + " tokens in " +
                    std::to_string(rows) + " exact rows, got " + std::to_string(start));
  check.no_overlap({{window_keys, "window_keys"}, {window_values, "window_values"}},
                   {{keys, "keys"}, {values, "values"}});
  check_finite(check, new_keys, "keys", heads, dim);
  check_finite(check, new_values, "values", heads, dim);
  window_keys.narrow(1, start, keys.size(1)).copy_(keys);
  window_values.narrow(1, start, keys.size(1)).copy_(values);
}

// The same functions serve both devices: a Call runs the stages where the tensors lie.
void register_operators(torch::Library& m) {
  m.impl("pack_keys_", &pack_keys_);
  m.impl("residual_keys", &residual_keys);
  m.impl("pack_values_", &pack_values_);
  m.impl("append_window_", &append_window_);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdq, m) {
  m.def(
      "pack_keys_(Tensor(a!) k_pages, Tensor keys, int position, Tensor page_table, int slot,"
      " Tensor basis, Tensor scale, Tensor mean, Tensor? post_mean, Tensor? inv_freq,"
      " int[] layout, Tensor(b!)? errors=None) -> ()");
  m.def(
      "residual_keys(Tensor keys, int position, Tensor basis, Tensor scale, Tensor mean,"
      " Tensor? inv_freq, int[] layout) -> Tensor");
  m.def(
      "pack_values_(Tensor(a!) v_pages, Tensor values, Tensor page_table, int slot, int[] layout)"
      " -> ()");
  m.def(
      "append_window_(Tensor(a!) window_keys, Tensor(b!) window_values, Tensor keys, Tensor values,"
      " int start) -> ()");
}

TORCH_LIBRARY_IMPL(svdq, CPU, m) { register_operators(m); }
TORCH_LIBRARY_IMPL(svdq, CUDA, m) { register_operators(m); }

// Torch makes lazily negated, conjugated and zero tensors real before an operator sees them, but aborts where the
// operator writes to its arguments and returns none. Those see them as they are, and refuse them.
void register_writing(torch::Library& m) {
  for (const char* name : {"pack_keys_", "pack_values_", "append_window_", "decode_step_"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(svdq, Negative, m) { register_writing(m); }
TORCH_LIBRARY_IMPL(svdq, Conjugate, m) { register_writing(m); }
TORCH_LIBRARY_IMPL(svdq, ZeroTensor, m) { register_writing(m); }

}  // namespace svdq::torch_binding
