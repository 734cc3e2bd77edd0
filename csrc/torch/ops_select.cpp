// Operators of key sparsity. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/torch/call.h"
#include "csrc/torch/nouns.h"

namespace svdq::torch_binding {
namespace {

std::tuple<at::Tensor, at::Tensor> select(
    const at::Tensor& query, double sm_scale, const at::Tensor& k_pages,
    const at::Tensor& page_table, const at::Tensor& cache_seqlens,
    const std::optional<at::Tensor>& first_position, const std::optional<at::Tensor>& outlier_slots,
    int64_t sink_tokens, const at::Tensor& basis, const at::Tensor& scale, const at::Tensor& mean,
    const std::optional<at::Tensor>& post_mean, const std::optional<at::Tensor>& inv_freq,
    at::IntArrayRef layout_ints, int64_t budget, int64_t channels) {
  const Checker check("svdq::select", query);
  const Layout layout = check.layout(layout_ints);
  check.shape(k_pages, "k_pages", {-1, layout.k_page_bytes()});
  Queries queries = check_queries(check, layout, query, sm_scale);
  const int64_t batch = query.size(0), heads = layout.num_heads();
  const PackedKeys keys = check_packed_keys(check, layout,
                                            {k_pages,
                                             page_table,
                                             cache_seqlens,
                                             first_position,
                                             outlier_slots,
                                             nullptr,
                                             sink_tokens,
                                             {basis, scale, mean, post_mean, inv_freq}},
                                            batch, k_pages.size(0));
  check.require(queries.length > 0, "query must have tokens, got none");
  check.require(channels >= 4 && channels <= kMaxSelectChannels && channels % 4 == 0,
                "channels must be a multiple of 4 up to " + std::to_string(kMaxSelectChannels) +
                    ", got " + std::to_string(channels));
  const int64_t outliers = keys.num_outliers;
  check.require(budget >= 1 && budget + outliers < INT32_MAX,
                "budget must be 1 to 2^31 - 2 less the outliers, got " + std::to_string(budget));

  const at::Tensor rows = query.contiguous();
  at::Tensor slots = at::empty({batch, heads, budget + outliers}, cache_seqlens.options());
  at::Tensor indices = at::empty({batch, heads, outliers}, cache_seqlens.options());
  if (batch == 0) return {slots, indices};
  queries.data = rows.const_data_ptr();
  Call(query.device())(
      &Backend::select,
      {.keys = keys,
       .queries = queries,
       .channels = static_cast<int>(channels),
       .budget = static_cast<int>(budget),
       .slots = slots.mutable_data_ptr<int32_t>(),
       .outlier_indices = outliers ? indices.mutable_data_ptr<int32_t>() : nullptr});
  return {slots, indices};
}

std::tuple<at::Tensor, at::Tensor> gather(const at::Tensor& k_pages, const at::Tensor& v_pages,
                                          const at::Tensor& page_table, const at::Tensor& slots,
                                          at::IntArrayRef layout_ints) {
  const Checker check("svdq::gather", k_pages);
  const Layout layout = check.layout(layout_ints);
  const int64_t batch = slots.dim() == 3 ? slots.size(0) : -1;
  check.tensor(k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  check.value_pool(v_pages, layout);
  check.tensor(slots, "slots", at::kInt, {-1, layout.num_heads(), -1});
  check.tensor(page_table, "page_table", at::kInt, {batch, -1});
  const int64_t num_pages = std::min(k_pages.size(0), v_pages.size(0)), count = slots.size(2);
  check.slots(slots, "slots", page_table.size(1) * kPageTokens);
  if (page_table.is_cpu()) {
    const int32_t* slot = slots.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < slots.numel(); ++i) {
      if (slot[i] == INT32_MAX) continue;
      const int64_t page = slot[i] / kPageTokens;
      const int64_t b = i / (layout.num_heads() * count);
      check.page_ids(page_table.const_data_ptr<int32_t>() + b * page_table.size(1), page, page + 1,
                     num_pages);
    }
  }
  const int64_t pages = batch * (page_count(count));
  at::Tensor k_out = at::empty({pages, k_pages.size(1)}, k_pages.options());
  at::Tensor v_out = at::empty({pages, v_pages.size(1)}, v_pages.options());
  if (pages == 0) return {k_out, v_out};
  Call(k_pages.device())(&Backend::gather,
                         {
                             .layout = layout.view(),
                             .batch = static_cast<int>(batch),
                             .k_pages = k_pages.const_data_ptr<uint8_t>(),
                             .v_pages = static_cast<const uint8_t*>(v_pages.const_data_ptr()),
                             .num_pages = num_pages,
                             .page_table = page_table.const_data_ptr<int32_t>(),
                             .table_stride = page_table.size(1),
                             .slots = slots.const_data_ptr<int32_t>(),
                             .num_slots = count,
                             .k_out = k_out.mutable_data_ptr<uint8_t>(),
                             .v_out = static_cast<uint8_t*>(v_out.mutable_data_ptr()),
                         });
  return {k_out, v_out};
}

// The same functions serve both devices: a Call runs the stages where the tensors lie.
void register_operators(torch::Library& m) {
  m.impl("select", &select);
  m.impl("gather", &gather);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdq, m) {
  m.def(
      "select(Tensor query, float sm_scale, Tensor k_pages, Tensor page_table, Tensor "
      "cache_seqlens,"
      " Tensor? first_position, Tensor? outlier_slots, int sink_tokens,"
      " Tensor basis, Tensor scale, Tensor mean, Tensor? post_mean, Tensor? inv_freq,"
      " int[] layout, int budget, int channels) -> (Tensor slots, Tensor outlier_indices)");
  m.def(
      "gather(Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor slots, int[] layout)"
      " -> (Tensor k_pages, Tensor v_pages)");
}

TORCH_LIBRARY_IMPL(svdq, CPU, m) { register_operators(m); }
TORCH_LIBRARY_IMPL(svdq, CUDA, m) { register_operators(m); }

}  // namespace svdq::torch_binding
