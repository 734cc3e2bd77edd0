// What the operators that score packed keys take alike, checked: queries, pages and what decodes
// them. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#pragma once

#include <cmath>

#include "csrc/torch/tensor_checks.h"

namespace svdq::torch_binding {

struct PackedQuery {
  PackedKeys keys;  // without outliers
  Queries queries;  // without data
};

// `num_pages` is what page ids must stay below.
inline PackedQuery check_packed_query(
    const Checker& check, const Layout& layout, const at::Tensor& query, const at::Tensor& k_pages,
    const at::Tensor& page_table, const at::Tensor& cache_seqlens, int64_t num_pages,
    const at::Tensor& basis, const at::Tensor& scale, const at::Tensor& mean,
    const std::optional<at::Tensor>& post_mean, const std::optional<at::Tensor>& inv_freq,
    const std::optional<at::Tensor>& first_position, int64_t sink_tokens, double sm_scale) {
  const int64_t heads = layout.num_heads(), dim = layout.head_dim(), rank = layout.rank();
  check.on_device(query, "query");
  check.shape(query, "query", {-1, -1, -1, dim});
  const DataType dtype = check.float_type(query, "query");
  const int64_t batch = query.size(0), num_qo_heads = query.size(1);
  check.require(num_qo_heads > 0 && num_qo_heads % heads == 0,
                "query must have a multiple of " + std::to_string(heads) + " heads, got " +
                    std::to_string(num_qo_heads));
  check.tensor(k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  check.tensor(page_table, "page_table", at::kInt, {batch, -1});
  check.lengths(cache_seqlens, "cache_seqlens", batch, page_table.size(1) * kPageTokens);
  check.used_pages(page_table, cache_seqlens, num_pages);
  check.tensor(basis, "basis", at::kBFloat16, {batch, rank, dim});
  check.tensor(scale, "scale", at::kFloat, {batch, rank});
  check.tensor(mean, "mean", at::kFloat, {batch, heads, dim});
  const float* post = check.post_mean(post_mean, layout.rope(), {batch, heads, dim});
  if (first_position) check.tensor(*first_position, "first_position", at::kInt, {batch});
  check.require(sink_tokens >= 0 && sink_tokens <= INT32_MAX,
                "sink_tokens must not be negative, got " + std::to_string(sink_tokens));
  check.require(std::isfinite(sm_scale),
                "sm_scale must be finite, got " + std::to_string(sm_scale));
  PackedKeys keys{};
  keys.layout = layout.view();
  keys.codec = {check.rope(inv_freq, layout.rope(), dim),
                static_cast<const uint16_t*>(basis.const_data_ptr()), scale.const_data_ptr<float>(),
                mean.const_data_ptr<float>(), post};
  keys.batch = static_cast<int>(batch);
  keys.pages = k_pages.const_data_ptr<uint8_t>();
  keys.num_pages = num_pages;
  keys.page_table = page_table.const_data_ptr<int32_t>();
  keys.table_stride = page_table.size(1);
  keys.cache_seqlens = cache_seqlens.const_data_ptr<int32_t>();
  keys.first_position = first_position ? first_position->const_data_ptr<int32_t>() : nullptr;
  keys.sink_tokens = static_cast<int>(sink_tokens);
  return {keys,
          {nullptr, dtype, static_cast<int>(num_qo_heads), query.size(2),
           static_cast<float>(sm_scale)}};
}

}  // namespace svdq::torch_binding
