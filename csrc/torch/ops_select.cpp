// Operators of key sparsity. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "csrc/torch/packed_query.h"
#include "csrc/torch/call.h"

namespace svdq::torch_binding {
namespace {

std::tuple<at::Tensor, at::Tensor> select(
    const at::Tensor& query, const at::Tensor& k_pages, const at::Tensor& page_table,
    const at::Tensor& cache_seqlens, const at::Tensor& basis, const at::Tensor& scale,
    const at::Tensor& mean, at::IntArrayRef layout_ints, const std::optional<at::Tensor>& inv_freq,
    const std::optional<at::Tensor>& first_position, int64_t sink_tokens, double sm_scale,
    int64_t budget, int64_t channels, const std::optional<at::Tensor>& post_mean,
    const std::optional<at::Tensor>& outlier_slots) {
  const Checker check("svdq::select", query);
  const Layout layout = check.layout(layout_ints);
  check.shape(k_pages, "k_pages", {-1, layout.k_page_bytes()});
  PackedQuery given = check_packed_query(check, layout, query, k_pages, page_table, cache_seqlens,
                                         k_pages.size(0), basis, scale, mean, post_mean, inv_freq,
                                         first_position, sink_tokens, sm_scale);
  const int64_t batch = given.keys.batch, heads = layout.num_heads();
  check.require(given.queries.length > 0, "query must have tokens, got none");
  check.require(channels >= 4 && channels <= kMaxSelectChannels && channels % 4 == 0,
                "channels must be a multiple of 4 up to " + std::to_string(kMaxSelectChannels) +
                    ", got " + std::to_string(channels));
  int64_t outliers = 0;
  if (outlier_slots) {
    check.tensor(*outlier_slots, "outlier_slots", at::kInt, {batch, heads, -1});
    check.ascending_slots(*outlier_slots, "outlier_slots");
    outliers = outlier_slots->size(2);
  }
  check.require(budget >= 1 && budget + outliers < INT32_MAX,
                "budget must be 1 to 2^31 - 2 less the outliers, got " + std::to_string(budget));

  const at::Tensor rows = query.contiguous();
  at::Tensor slots = at::empty({batch, heads, budget + outliers}, cache_seqlens.options());
  at::Tensor indices = at::empty({batch, heads, outliers}, cache_seqlens.options());
  if (batch == 0) return {slots, indices};
  given.queries.data = rows.const_data_ptr();
  given.keys.outlier_slots = outliers ? outlier_slots->const_data_ptr<int32_t>() : nullptr;
  given.keys.num_outliers = static_cast<int>(outliers);
  Call(query.device())(
      &Backend::select,
      {.keys = given.keys,
       .queries = given.queries,
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
  const int64_t pages = batch * ((count + kPageTokens - 1) / kPageTokens);
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdq, m) {
  m.def(
      "select(Tensor query, Tensor k_pages, Tensor page_table, Tensor cache_seqlens, Tensor basis,"
      " Tensor scale, Tensor mean, int[] layout, Tensor? inv_freq, Tensor? first_position,"
      " int sink_tokens, float sm_scale, int budget, int channels, Tensor? post_mean=None,"
      " Tensor? outlier_slots=None) -> (Tensor slots, Tensor outlier_indices)");
  m.def(
      "gather(Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor slots, int[] layout) ->"
      " (Tensor k_pages, Tensor v_pages)");
}

TORCH_LIBRARY_IMPL(svdq, CPU, m) {
  m.impl("select", &select);
  m.impl("gather", &gather);
}

TORCH_LIBRARY_IMPL(svdq, CUDA, m) {
  m.impl("select", &select);
  m.impl("gather", &gather);
}

}  // namespace svdq::torch_binding
