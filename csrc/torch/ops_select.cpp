// Operators of key sparsity. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

#include "csrc/torch/target.h"
#include "csrc/torch/tensor_checks.h"

namespace svdq::torch_binding {
namespace {

std::tuple<at::Tensor, at::Tensor> select(
    const at::Tensor& query, const at::Tensor& k_pages, const at::Tensor& page_table,
    const at::Tensor& cache_seqlens, const at::Tensor& basis, const at::Tensor& scale,
    const at::Tensor& mean, at::IntArrayRef layout_ints, const std::optional<at::Tensor>& inv_freq,
    const std::optional<at::Tensor>& first_position, int64_t sink_tokens, double sm_scale,
    int64_t budget, int64_t channels, const std::optional<at::Tensor>& tail_mean,
    const std::optional<at::Tensor>& outlier_slots) {
  const Checker check("svdq::select", query);
  const Layout layout = check.layout(layout_ints);
  const int64_t heads = layout.num_heads(), dim = layout.head_dim(), rank = layout.rank();
  check.on_device(query, "query");
  check.shape(query, "query", {-1, -1, -1, dim});
  const DataType query_dtype = check.float_type(query, "query");
  const int64_t batch = query.size(0), num_qo_heads = query.size(1), q_len = query.size(2);
  check.require(num_qo_heads > 0 && num_qo_heads % heads == 0 && q_len > 0,
                "query must have tokens and a multiple of " + std::to_string(heads) +
                    " heads, got " + std::to_string(q_len) + " and " +
                    std::to_string(num_qo_heads));
  check.tensor(k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  check.tensor(page_table, "page_table", at::kInt, {batch, -1});
  check.lengths(cache_seqlens, "cache_seqlens", batch, page_table.size(1) * kPageTokens);
  check.used_pages(page_table, cache_seqlens, k_pages.size(0));
  check.tensor(basis, "basis", at::kBFloat16, {batch, rank, dim});
  check.tensor(scale, "scale", at::kFloat, {batch, rank});
  check.tensor(mean, "mean", at::kFloat, {batch, heads, dim});
  const float* tail_mean_data = check.tail_mean(tail_mean, layout.rope(), {batch, heads, dim});
  if (first_position) check.tensor(*first_position, "first_position", at::kInt, {batch});
  check.require(sink_tokens >= 0 && sink_tokens <= INT32_MAX,
                "sink_tokens must not be negative, got " + std::to_string(sink_tokens));
  check.require(std::isfinite(sm_scale),
                "sm_scale must be finite, got " + std::to_string(sm_scale));
  check.require(channels >= 4 && channels <= kMaxSelectChannels && channels % 4 == 0,
                "channels must be a multiple of 4 up to " + std::to_string(kMaxSelectChannels) +
                    ", got " + std::to_string(channels));
  const Rope rope = check.rope(inv_freq, layout.rope(), dim);
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
  at::Tensor places = at::empty({batch, heads, outliers}, cache_seqlens.options());
  if (batch == 0) return {slots, places};
  Target(query.device())
      .select({
          .layout = layout.view(),
          .rope = rope,
          .batch = static_cast<int>(batch),
          .num_qo_heads = static_cast<int>(num_qo_heads),
          .q_len = q_len,
          .query = rows.const_data_ptr(),
          .query_dtype = query_dtype,
          .k_pages = k_pages.const_data_ptr<uint8_t>(),
          .num_pages = k_pages.size(0),
          .page_table = page_table.const_data_ptr<int32_t>(),
          .table_stride = page_table.size(1),
          .cache_seqlens = cache_seqlens.const_data_ptr<int32_t>(),
          .basis = static_cast<const uint16_t*>(basis.const_data_ptr()),
          .scale = scale.const_data_ptr<float>(),
          .mean = mean.const_data_ptr<float>(),
          .tail_mean = tail_mean_data,
          .first_position = first_position ? first_position->const_data_ptr<int32_t>() : nullptr,
          .outlier_slots = outliers ? outlier_slots->const_data_ptr<int32_t>() : nullptr,
          .outliers = static_cast<int>(outliers),
          .sink_tokens = static_cast<int>(sink_tokens),
          .sm_scale = static_cast<float>(sm_scale),
          .channels = static_cast<int>(channels),
          .budget = static_cast<int>(budget),
          .slots = slots.mutable_data_ptr<int32_t>(),
          .outlier_places = outliers ? places.mutable_data_ptr<int32_t>() : nullptr,
      });
  return {slots, places};
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
  Target(k_pages.device())
      .gather({
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
      " int sink_tokens, float sm_scale, int budget, int channels, Tensor? tail_mean=None,"
      " Tensor? outlier_slots=None) -> (Tensor slots, Tensor outlier_places)");
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
