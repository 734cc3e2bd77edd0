#include "csrc/torch/nouns.h"

#include <cmath>
#include <utility>
#include <vector>

namespace svdq::torch_binding {
namespace {

void check_outliers(const Checker& check, const PackedTensors& given, PackedKeys& packed) {
  const int64_t batch = packed.batch, heads = packed.layout.num_heads, dim = packed.layout.head_dim;
  const std::optional<at::Tensor>& slots = given.outlier_slots;
  check.require(!given.outlier_keys || slots.has_value() == given.outlier_keys->has_value(),
                "outlier_slots and outlier_keys must be given together");
  if (!slots) return;
  check.tensor(*slots, "outlier_slots", at::kInt, {batch, heads, -1});
  const int64_t count = slots->size(2);
  check.require(count <= INT32_MAX, "outlier_slots must have fewer than 2^31 slots a head, got " +
                                        std::to_string(count));
  check.ascending_slots(*slots, "outlier_slots");
  packed.num_outliers = static_cast<int>(count);
  packed.outlier_slots = count ? slots->const_data_ptr<int32_t>() : nullptr;
  if (!given.outlier_keys) return;
  const at::Tensor& keys = **given.outlier_keys;
  check.on_device(keys, "outlier_keys");
  check.shape(keys, "outlier_keys", {batch, heads, count, dim});
  check.contiguous(keys, "outlier_keys");
  packed.outlier_keys = keys.const_data_ptr();
  packed.outlier_dtype = check.float_type(keys, "outlier_keys");
}

}  // namespace

KeyCodec check_codec(const Checker& check, const Layout& layout, const CodecTensors& given,
                     std::optional<int64_t> batch) {
  const int64_t heads = layout.num_heads(), dim = layout.head_dim();
  const auto sizes = [&](std::vector<int64_t> sizes) {
    if (batch) sizes.insert(sizes.begin(), *batch);
    return sizes;
  };
  check.tensor(given.basis, "basis", at::kBFloat16, sizes({layout.rank(), dim}));
  check.tensor(given.scale, "scale", at::kFloat, sizes({layout.rank()}));
  check.tensor(given.mean, "mean", at::kFloat, sizes({heads, dim}));
  const float* post_mean = check.post_mean(given.post_mean, layout.rope(), sizes({heads, dim}));
  return {check.rope(given.inv_freq, layout.rope(), dim),
          static_cast<const uint16_t*>(given.basis.const_data_ptr()),
          given.scale.const_data_ptr<float>(), given.mean.const_data_ptr<float>(), post_mean};
}

PackedKeys check_packed_keys(const Checker& check, const Layout& layout, const PackedTensors& given,
                             int64_t batch, int64_t num_pages) {
  check.tensor(given.k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  check.tensor(given.page_table, "page_table", at::kInt, {batch, -1});
  check.lengths(given.cache_seqlens, "cache_seqlens", batch,
                given.page_table.size(1) * kPageTokens);
  check.used_pages(given.page_table, given.cache_seqlens, num_pages);
  if (given.first_position) {
    check.tensor(*given.first_position, "first_position", at::kInt, {batch});
  }
  check.require(given.sink_tokens >= 0 && given.sink_tokens <= INT32_MAX,
                "sink_tokens must not be negative, got " + std::to_string(given.sink_tokens));
  PackedKeys packed{};
  packed.layout = layout.view();
  packed.codec = check_codec(check, layout, given.codec, batch);
  packed.batch = static_cast<int>(batch);
  packed.pages = given.k_pages.const_data_ptr<uint8_t>();
  packed.num_pages = num_pages;
  packed.page_table = given.page_table.const_data_ptr<int32_t>();
  packed.table_stride = given.page_table.size(1);
  packed.cache_seqlens = given.cache_seqlens.const_data_ptr<int32_t>();
  packed.first_position =
      given.first_position ? given.first_position->const_data_ptr<int32_t>() : nullptr;
  packed.sink_tokens = static_cast<int>(given.sink_tokens);
  check_outliers(check, given, packed);
  return packed;
}

Queries check_queries(const Checker& check, const Layout& layout, const at::Tensor& query,
                      double sm_scale) {
  check.on_device(query, "query");
  check.shape(query, "query", {-1, -1, -1, layout.head_dim()});
  const DataType dtype = check.float_type(query, "query");
  const int64_t heads = query.size(1);
  check.require(heads > 0 && heads % layout.num_heads() == 0,
                "query must have a multiple of " + std::to_string(layout.num_heads()) +
                    " heads, got " + std::to_string(heads));
  check.require(std::isfinite(sm_scale),
                "sm_scale must be finite, got " + std::to_string(sm_scale));
  return {nullptr, dtype, static_cast<int>(heads), query.size(2), static_cast<float>(sm_scale)};
}

Window check_window(const Checker& check, const Layout& layout, const WindowTensors& given,
                    int64_t batch) {
  const at::Tensor &keys = given.keys, &values = given.values;
  const int64_t dim = layout.head_dim();
  for (const auto& [tensor, name] : {std::pair{&keys, "window_keys"}, {&values, "window_values"}}) {
    check.on_device(*tensor, name);
    check.shape(*tensor, name, {batch, layout.num_heads(), -1, dim});
    check.float_type(*tensor, name);
    // Tokens of a head lie one after another.
    TORCH_CHECK_VALUE(
        tensor->size(2) == 0 ||
            (tensor->stride(3) == 1 && (tensor->size(2) == 1 || tensor->stride(2) == dim)),
        check.op(), ": ", name, " must have contiguous rows, got strides ", tensor->strides());
  }
  check.dtype(values, "window_values", keys.scalar_type());
  check.require(
      keys.sizes() == values.sizes() && (keys.numel() == 0 || keys.strides() == values.strides()),
      "window_keys and window_values must have the same shape and strides");
  check.require(keys.size(2) <= INT32_MAX,
                "window_keys must have fewer than 2^31 rows, got " + std::to_string(keys.size(2)));
  check.lengths(given.lens, "window_lens", batch, keys.size(2));
  return {keys.const_data_ptr(),
          values.const_data_ptr(),
          check.float_type(keys, "window_keys"),
          keys.stride(0),
          keys.stride(1),
          static_cast<int>(keys.size(2)),
          given.lens.const_data_ptr<int32_t>()};
}

LogitRules check_rules(const Checker& check, const RuleTensors& given, int64_t num_query_heads,
                       int64_t batch) {
  // Bounds that neither vanish in a float nor leave its range where scores are in units of log2.
  check.require(
      given.softcap == 0 || (given.softcap >= 1e-30 && given.softcap <= 1e30),
      "softcap must be 0, for none, or 1e-30 to 1e30, got " + std::to_string(given.softcap));
  check.require(given.window_size >= 0 && given.window_size <= INT32_MAX,
                "window_size must be 0, for none, or a positive 32-bit number, got " +
                    std::to_string(given.window_size));
  check.require(given.window_size == 0 || given.query_position.has_value(),
                "query_position must be given with window_size");
  LogitRules rules{};
  rules.softcap = static_cast<float>(given.softcap);
  rules.window_size = static_cast<int>(given.window_size);
  if (given.sinks) {
    check.tensor(*given.sinks, "sinks", at::kFloat, {num_query_heads});
    check.finite(*given.sinks, "sinks");
    rules.sinks = given.sinks->const_data_ptr<float>();
  }
  if (given.query_position) {
    check.tensor(*given.query_position, "query_position", at::kInt, {batch});
    rules.query_position = given.query_position->const_data_ptr<int32_t>();
  }
  return rules;
}

UnpackParams check_packed_tokens(const Checker& check, const Layout& layout,
                                 const at::Tensor& pages, const at::Tensor& page_table,
                                 int64_t slot, int64_t num_tokens) {
  check.pages(page_table, slot, num_tokens, pages.size(0));
  return {layout.view(), static_cast<const uint8_t*>(pages.const_data_ptr()),
          page_table.const_data_ptr<int32_t>(), slot, num_tokens};
}

}  // namespace svdq::torch_binding
