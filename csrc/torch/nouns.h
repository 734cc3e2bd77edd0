// The nouns of kernels/params.h from the flat arguments of operators. Every operator that takes the fields of
// a noun has them in the order of the structs here. Shapes, dtypes and meaning are documented in
// python/svdq/ops/.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "csrc/torch/tensor_checks.h"

namespace svdq::torch_binding {

struct CodecTensors {
  const at::Tensor& basis;
  const at::Tensor& scale;
  const at::Tensor& mean;
  const std::optional<at::Tensor>& post_mean;
  const std::optional<at::Tensor>& inv_freq;
};

struct PackedTensors {
  const at::Tensor& k_pages;
  const at::Tensor& page_table;
  const at::Tensor& cache_seqlens;
  const std::optional<at::Tensor>& first_position;
  const std::optional<at::Tensor>& outlier_slots;
  const std::optional<at::Tensor>* outlier_keys;  // null where the operator does not take them
  int64_t sink_tokens;
  CodecTensors codec;
};

struct WindowTensors {
  const at::Tensor& keys;
  const at::Tensor& values;
  const at::Tensor& lens;
};

struct RuleTensors {
  double softcap;
  const std::optional<at::Tensor>& sinks;
  int64_t window_size;
  const std::optional<at::Tensor>& query_position;
};

// The codec of one sequence, or of each sequence of a batch.
KeyCodec check_codec(const Checker& check, const Layout& layout, const CodecTensors& given,
                     std::optional<int64_t> batch = std::nullopt);

// Packed keys of a batch. The page table must name pages below `num_pages`.
PackedKeys check_packed_keys(const Checker& check, const Layout& layout, const PackedTensors& given,
                             int64_t batch, int64_t num_pages);

// Queries, still without data: stages read them contiguous.
Queries check_queries(const Checker& check, const Layout& layout, const at::Tensor& query,
                      double sm_scale);

Window check_window(const Checker& check, const Layout& layout, const WindowTensors& given,
                    int64_t batch);

// What a model does to its logits. Sinks on a CUDA device are not read: one that is not finite makes results NaN.
LogitRules check_rules(const Checker& check, const RuleTensors& given, int64_t num_query_heads,
                       int64_t batch);

// Packed tokens that start at `slot` of one sequence.
UnpackParams check_packed_tokens(const Checker& check, const Layout& layout,
                                 const at::Tensor& pages, const at::Tensor& page_table,
                                 int64_t slot, int64_t num_tokens);

}  // namespace svdq::torch_binding
