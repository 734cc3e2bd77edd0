// Operators that attend and merge. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/torch/call.h"
#include "csrc/torch/nouns.h"

namespace svdq::torch_binding {
namespace {

std::tuple<at::Tensor, at::Tensor> attend(
    const at::Tensor& query, double sm_scale, const at::Tensor& k_pages,
    const at::Tensor& page_table, const at::Tensor& cache_seqlens,
    const std::optional<at::Tensor>& first_position, const std::optional<at::Tensor>& outlier_slots,
    const std::optional<at::Tensor>& outlier_keys, int64_t sink_tokens, const at::Tensor& basis,
    const at::Tensor& scale, const at::Tensor& mean, const std::optional<at::Tensor>& post_mean,
    const std::optional<at::Tensor>& inv_freq, at::IntArrayRef layout_ints,
    const at::Tensor& v_pages, const std::optional<at::Tensor>& token_slots,
    const at::Tensor& window_keys, const at::Tensor& window_values, const at::Tensor& window_lens,
    bool causal, double softcap, const std::optional<at::Tensor>& sinks, int64_t window_size,
    const std::optional<at::Tensor>& query_position) {
  const Checker check("svdq::attend", query);
  const Layout layout = check.layout(layout_ints);
  check.shape(k_pages, "k_pages", {-1, layout.k_page_bytes()});
  const DataType v_dtype = check.value_pool(v_pages, layout);
  Queries queries = check_queries(check, layout, query, sm_scale);
  const int64_t batch = query.size(0);
  PackedKeys keys = check_packed_keys(check, layout,
                                      {k_pages,
                                       page_table,
                                       cache_seqlens,
                                       first_position,
                                       outlier_slots,
                                       &outlier_keys,
                                       sink_tokens,
                                       {basis, scale, mean, post_mean, inv_freq}},
                                      batch, std::min(k_pages.size(0), v_pages.size(0)));
  Window window = check_window(check, layout, {window_keys, window_values, window_lens}, batch);
  window.sink_rows = keys.sink_tokens;
  const LogitRules rules =
      check_rules(check, {softcap, sinks, window_size, query_position}, queries.num_heads, batch);
  if (token_slots) {
    const int64_t slots = page_table.size(1) * kPageTokens;
    check.tensor(*token_slots, "token_slots", at::kInt, {batch, layout.num_heads(), slots});
    check.slots(*token_slots, "token_slots", INT32_MAX);
    keys.sink_tokens = 0;  // gathered pages do not hold them
  }

  const at::Tensor rows = query.contiguous();
  at::Tensor out = at::empty(rows.sizes(), rows.options());
  at::Tensor lse =
      at::empty({batch, queries.num_heads, queries.length}, rows.options().dtype(at::kFloat));
  if (rows.numel() == 0) return {out, lse};
  queries.data = rows.const_data_ptr();
  Call(query.device())(
      &Backend::attend,
      {
          .keys = keys,
          .queries = queries,
          .window = window,
          .rules = rules,
          .v_pages = static_cast<const uint8_t*>(v_pages.const_data_ptr()),
          .v_dtype = v_dtype,
          .causal = causal,
          .token_slots = token_slots ? token_slots->const_data_ptr<int32_t>() : nullptr,
          .out = out.mutable_data_ptr(),
          .lse = lse.mutable_data_ptr<float>(),
      });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor> merge(const at::Tensor& out_a, const at::Tensor& lse_a,
                                         const at::Tensor& out_b, const at::Tensor& lse_b) {
  const Checker check("svdq::merge", out_a);
  check.on_device(out_a, "out_a");
  check.on_device(out_b, "out_b");
  check.shape(out_a, "out_a", {-1, -1, -1, -1});
  check.shape(out_b, "out_b", out_a.sizes().vec());
  const DataType dtype = check.float_type(out_a, "out_a");
  check.dtype(out_b, "out_b", out_a.scalar_type());
  const std::vector<int64_t> rows = {out_a.size(0), out_a.size(1), out_a.size(2)};
  for (const auto& [lse, name] : {std::pair{&lse_a, "lse_a"}, {&lse_b, "lse_b"}}) {
    check.on_device(*lse, name);
    check.dtype(*lse, name, at::kFloat);
    check.shape(*lse, name, rows);
  }
  const at::Tensor a = out_a.contiguous(), b = out_b.contiguous(), la = lse_a.contiguous(),
                   lb = lse_b.contiguous();
  at::Tensor out = at::empty(a.sizes(), a.options()), lse = at::empty(rows, la.options());
  Call(out_a.device(), a.numel())(
      &Backend::merge, {la.numel(), static_cast<int>(a.size(3)), dtype, a.const_data_ptr(),
                        la.const_data_ptr<float>(), b.const_data_ptr(), lb.const_data_ptr<float>(),
                        out.mutable_data_ptr(), lse.mutable_data_ptr<float>()});
  return {out, lse};
}

// The same functions serve both devices: a Call runs the stages where the tensors lie.
void register_operators(torch::Library& m) {
  m.impl("attend", &attend);
  m.impl("merge", &merge);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdq, m) {
  m.def(
      "attend(Tensor query, float sm_scale, Tensor k_pages, Tensor page_table, Tensor "
      "cache_seqlens,"
      " Tensor? first_position, Tensor? outlier_slots, Tensor? outlier_keys, int sink_tokens,"
      " Tensor basis, Tensor scale, Tensor mean, Tensor? post_mean, Tensor? inv_freq,"
      " int[] layout, Tensor v_pages, Tensor? token_slots, Tensor window_keys,"
      " Tensor window_values, Tensor window_lens, bool causal, float softcap=0.0,"
      " Tensor? sinks=None, int window_size=0, Tensor? query_position=None)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
}

TORCH_LIBRARY_IMPL(svdq, CPU, m) { register_operators(m); }
TORCH_LIBRARY_IMPL(svdq, CUDA, m) { register_operators(m); }

}  // namespace svdq::torch_binding
