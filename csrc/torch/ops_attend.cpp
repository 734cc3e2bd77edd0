// Operators that attend and merge. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/torch/packed_query.h"
#include "csrc/torch/call.h"

namespace svdq::torch_binding {
namespace {

// Exact rows [B, H, E, D] whose rows lie one after another; both tensors share strides.
void check_window_rows(const Checker& check, const at::Tensor& keys, const at::Tensor& values,
                       int64_t batch, int64_t heads, int64_t dim) {
  for (const auto& [tensor, name] : {std::pair{&keys, "window_keys"}, {&values, "window_values"}}) {
    check.on_device(*tensor, name);
    check.shape(*tensor, name, {batch, heads, -1, dim});
    check.float_type(*tensor, name);
    TORCH_CHECK_VALUE(
        tensor->size(2) == 0 ||
            (tensor->stride(3) == 1 && (tensor->size(2) == 1 || tensor->stride(2) == dim)),
        "svdq::attend: ", name, " must have contiguous rows, got strides ", tensor->strides());
  }
  check.dtype(values, "window_values", keys.scalar_type());
  check.require(
      keys.sizes() == values.sizes() && (keys.numel() == 0 || keys.strides() == values.strides()),
      "window_keys and window_values must have the same shape and strides");
}

// Slots [B, H, N] and keys [B, H, N, D]; both or neither.
void set_outliers(const Checker& check, const std::optional<at::Tensor>& slots,
                  const std::optional<at::Tensor>& keys, PackedKeys& packed) {
  const int64_t batch = packed.batch, heads = packed.layout.num_heads, dim = packed.layout.head_dim;
  check.require(slots.has_value() == keys.has_value(),
                "outlier_slots and outlier_keys must be given together");
  if (!slots) return;
  check.tensor(*slots, "outlier_slots", at::kInt, {batch, heads, -1});
  const int64_t count = slots->size(2);
  check.require(count <= INT32_MAX, "outlier_slots must have fewer than 2^31 slots a head, got " +
                                        std::to_string(count));
  check.on_device(*keys, "outlier_keys");
  check.shape(*keys, "outlier_keys", {batch, heads, count, dim});
  check.contiguous(*keys, "outlier_keys");
  check.ascending_slots(*slots, "outlier_slots");
  packed.outlier_slots = slots->const_data_ptr<int32_t>();
  packed.outlier_keys = keys->const_data_ptr();
  packed.outlier_dtype = check.float_type(*keys, "outlier_keys");
  packed.num_outliers = static_cast<int>(count);
}

std::tuple<at::Tensor, at::Tensor> attend(
    const at::Tensor& query, const at::Tensor& k_pages, const at::Tensor& v_pages,
    const at::Tensor& page_table, const at::Tensor& cache_seqlens, const at::Tensor& basis,
    const at::Tensor& scale, const at::Tensor& mean, at::IntArrayRef layout_ints,
    const std::optional<at::Tensor>& inv_freq, const std::optional<at::Tensor>& first_position,
    const at::Tensor& window_keys, const at::Tensor& window_values, const at::Tensor& window_lens,
    int64_t sink_tokens, double sm_scale, bool causal, const std::optional<at::Tensor>& post_mean,
    const std::optional<at::Tensor>& outlier_slots, const std::optional<at::Tensor>& outlier_keys,
    const std::optional<at::Tensor>& token_slots) {
  const Checker check("svdq::attend", query);
  const Layout layout = check.layout(layout_ints);
  const int64_t heads = layout.num_heads(), dim = layout.head_dim();
  check.shape(k_pages, "k_pages", {-1, layout.k_page_bytes()});
  const DataType v_dtype = check.value_pool(v_pages, layout);
  const int64_t num_pages = std::min(k_pages.size(0), v_pages.size(0));
  PackedQuery given =
      check_packed_query(check, layout, query, k_pages, page_table, cache_seqlens, num_pages, basis,
                         scale, mean, post_mean, inv_freq, first_position, sink_tokens, sm_scale);
  const int64_t batch = given.keys.batch;
  check_window_rows(check, window_keys, window_values, batch, heads, dim);
  check.require(
      window_keys.size(2) <= INT32_MAX,
      "window_keys must have fewer than 2^31 rows, got " + std::to_string(window_keys.size(2)));
  check.lengths(window_lens, "window_lens", batch, window_keys.size(2));
  if (token_slots) {
    const int64_t slots = page_table.size(1) * kPageTokens;
    check.tensor(*token_slots, "token_slots", at::kInt, {batch, heads, slots});
    check.require(sink_tokens == 0,
                  "sink_tokens must be 0 with token_slots, got " + std::to_string(sink_tokens));
    check.slots(*token_slots, "token_slots", INT32_MAX);
  }
  set_outliers(check, outlier_slots, outlier_keys, given.keys);

  const at::Tensor rows = query.contiguous();
  at::Tensor out = at::empty(rows.sizes(), rows.options());
  at::Tensor lse = at::empty({batch, given.queries.num_heads, given.queries.length},
                             rows.options().dtype(at::kFloat));
  if (rows.numel() == 0) return {out, lse};
  given.queries.data = rows.const_data_ptr();
  Call(query.device())(
      &Backend::attend,
      {
          .keys = given.keys,
          .queries = given.queries,
          .window = {window_keys.const_data_ptr(), window_values.const_data_ptr(),
                     check.float_type(window_keys, "window_keys"), window_keys.stride(0),
                     window_keys.stride(1), static_cast<int>(window_keys.size(2)),
                     window_lens.const_data_ptr<int32_t>()},
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdq, m) {
  m.def(
      "attend(Tensor query, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor "
      "cache_seqlens, Tensor basis,"
      " Tensor scale, Tensor mean, int[] layout, Tensor? inv_freq, Tensor? first_position, Tensor "
      "window_keys,"
      " Tensor window_values, Tensor window_lens, int sink_tokens, float sm_scale, bool causal,"
      " Tensor? post_mean=None, Tensor? outlier_slots=None, Tensor? outlier_keys=None, "
      "Tensor? token_slots=None) -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
}

TORCH_LIBRARY_IMPL(svdq, CPU, m) {
  m.impl("attend", &attend);
  m.impl("merge", &merge);
}

TORCH_LIBRARY_IMPL(svdq, CUDA, m) {
  m.impl("attend", &attend);
  m.impl("merge", &merge);
}

}  // namespace svdq::torch_binding
