// Checks of operator arguments. Every message names the operator, the argument, what was expected
// and what came.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <cmath>
#include <initializer_list>
#include <string>
#include <vector>

#include "csrc/core/layout.h"
#include "csrc/torch/overlap.h"
#include "kernels/params.h"

namespace svdq::torch_binding {

// The operator a check speaks for, and the device that its tensors must lie on.
class Checker {
 public:
  Checker(const char* op, const at::Tensor& on) : op_(op), device_(on.device()) {}

  const char* op() const { return op_; }
  const at::Device& device() const { return device_; }

  void require(bool condition, const std::string& message) const {
    TORCH_CHECK_VALUE(condition, op_, ": ", message);
  }

  // -1 in `shape` stands for any size.
  void shape(const at::Tensor& tensor, const char* name, std::vector<int64_t> shape) const {
    bool matches = tensor.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; matches && i < shape.size(); ++i) {
      matches = shape[i] == -1 || tensor.size(static_cast<int64_t>(i)) == shape[i];
    }
    std::string expected;
    for (const int64_t size : shape)
      expected += (expected.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
    TORCH_CHECK_VALUE(matches, op_, ": ", name, " must have shape [", expected, "], got ",
                      tensor.sizes());
  }

  void on_device(const at::Tensor& tensor, const char* name) const {
    on_device(tensor, name, device_);
  }

  void on_device(const at::Tensor& tensor, const char* name, const at::Device& device) const {
    TORCH_CHECK_VALUE(tensor.device() == device && tensor.layout() == at::kStrided, op_, ": ", name,
                      " must be a dense tensor on ", device, ", got ", tensor.layout(), " on ",
                      tensor.device());
    // Kernels read memory, where none of these stands.
    TORCH_CHECK_VALUE(!tensor.is_neg() && !tensor.is_conj() && !tensor._is_zerotensor(), op_, ": ",
                      name, " must hold its numbers in memory, got a tensor that is lazily ",
                      tensor.is_neg()    ? "negated: call resolve_neg()"
                      : tensor.is_conj() ? "conjugated: call resolve_conj()"
                                         : "zero: call clone()");
    const size_t bytes = at::detail::computeStorageNbytes(
        tensor.sizes(), tensor.strides(), tensor.element_size(), tensor.storage_offset());
    TORCH_CHECK_VALUE(tensor.storage().nbytes() >= bytes || tensor.is_meta(), op_, ": ", name,
                      " must hold its numbers in memory, but its storage has ",
                      tensor.storage().nbytes(), " bytes of ", bytes);
  }

  // Refuses an output that shares memory with itself or with another argument, as torch's in-place operators
  // do. Arguments that were not given are null.
  void no_overlap(std::initializer_list<Named> outputs, std::initializer_list<Named> inputs) const {
    for (const Named* out = outputs.begin(); out != outputs.end(); ++out) {
      if (!out->tensor) continue;
      require(!overlaps_itself(*out->tensor),
              std::string(out->name) + " is written to, so its numbers must not share memory");
      const auto apart = [&](const Named& other) {
        require(!other.tensor || !overlap(*out->tensor, *other.tensor),
                std::string(out->name) + " is written to, so it must not share memory with " +
                    other.name);
      };
      for (const Named* other = out + 1; other != outputs.end(); ++other) apart(*other);
      for (const Named& other : inputs) apart(other);
    }
  }

  void dtype(const at::Tensor& tensor, const char* name, at::ScalarType expected) const {
    TORCH_CHECK_VALUE(tensor.scalar_type() == expected, op_, ": ", name, " must be ", expected,
                      ", got ", tensor.scalar_type());
  }

  void contiguous(const at::Tensor& tensor, const char* name) const {
    TORCH_CHECK_VALUE(tensor.is_contiguous(), op_, ": ", name, " must be contiguous, got strides ",
                      tensor.strides());
  }

  // Dense tensor of one dtype and shape, contiguous.
  void tensor(const at::Tensor& tensor, const char* name, at::ScalarType expected,
              std::vector<int64_t> sizes) const {
    on_device(tensor, name);
    dtype(tensor, name, expected);
    shape(tensor, name, std::move(sizes));
    contiguous(tensor, name);
  }

  DataType float_type(const at::Tensor& tensor, const char* name) const {
    switch (tensor.scalar_type()) {
      case at::kFloat:
        return DataType::kFloat32;
      case at::kBFloat16:
        return DataType::kBFloat16;
      case at::kHalf:
        return DataType::kFloat16;
      default:
        TORCH_CHECK_VALUE(false, op_, ": ", name, " must be float32, bfloat16 or float16, got ",
                          tensor.scalar_type());
    }
  }

  // [H, T, D] of a float type with a contiguous last dimension.
  TokenSource tokens(const at::Tensor& tensor, const char* name, int64_t num_heads,
                     int64_t head_dim) const {
    on_device(tensor, name);
    const DataType type = float_type(tensor, name);
    shape(tensor, name, {num_heads, -1, head_dim});
    TORCH_CHECK_VALUE(tensor.stride(2) == 1, op_, ": ", name,
                      " must have a contiguous last dimension, got strides ", tensor.strides());
    return {tensor.const_data_ptr(), type, tensor.stride(0), tensor.stride(1), tensor.size(1)};
  }

  // The layout integers, as a ValueError of this operator where they are wrong.
  Layout layout(at::IntArrayRef ints) const {
    try {
      return Layout(ints.vec());
    } catch (const std::invalid_argument& error) {
      TORCH_CHECK_VALUE(false, op_, ": ", error.what());
    }
  }

  // The mean of the post-RoPE channels: required for hybrid layouts, refused for others.
  const float* post_mean(const std::optional<at::Tensor>& mean, RopeMode mode,
                         std::vector<int64_t> sizes) const {
    TORCH_CHECK_VALUE(mean.has_value() == (mode == RopeMode::kHybrid), op_,
                      mean ? ": post_mean must be None for a layout that is not hybrid"
                           : ": post_mean is needed for a hybrid layout");
    if (!mean) return nullptr;
    tensor(*mean, "post_mean", at::kFloat, std::move(sizes));
    return mean->const_data_ptr<float>();
  }

  // Frequencies of the rotation that `mode` needs: refused after RoPE, else required.
  Rope rope(const std::optional<at::Tensor>& inv_freq, RopeMode mode, int64_t head_dim) const {
    if (mode == RopeMode::kPost) {
      TORCH_CHECK_VALUE(!inv_freq.has_value(), op_,
                        ": inv_freq must be None for a layout that codes rotated keys");
      return {nullptr, 0};
    }
    TORCH_CHECK_VALUE(inv_freq.has_value(), op_,
                      ": inv_freq is needed for a layout that codes keys before RoPE");
    return rope(*inv_freq, head_dim);
  }

  Rope rope(const at::Tensor& inv_freq, int64_t head_dim) const {
    tensor(inv_freq, "inv_freq", at::kFloat, {-1});
    TORCH_CHECK_VALUE(2 * inv_freq.size(0) <= head_dim, op_,
                      ": inv_freq must have at most head_dim / 2 = ", head_dim / 2,
                      " numbers, got ", inv_freq.size(0));
    return {inv_freq.const_data_ptr<float>(), static_cast<int>(inv_freq.size(0))};
  }

  // Pages that slots slot .. slot + num_tokens - 1 need: all in the table, all in the pool. The
  // table lies on the CPU whatever the device, so that a wrong page is found before anything is
  // written.
  void pages(const at::Tensor& page_table, int64_t slot, int64_t num_tokens,
             int64_t num_pages) const {
    TORCH_CHECK_VALUE(slot >= 0, op_, ": slot must not be negative, got ", slot);
    TORCH_CHECK_VALUE(num_tokens >= 0, op_, ": num_tokens must not be negative, got ", num_tokens);
    on_device(page_table, "page_table", at::kCPU);
    dtype(page_table, "page_table", at::kInt);
    shape(page_table, "page_table", {-1});
    contiguous(page_table, "page_table");
    const int64_t slots = page_table.size(0) * kPageTokens;
    TORCH_CHECK_VALUE(num_tokens <= slots && slot <= slots - num_tokens, op_, ": page_table holds ",
                      slots, " slots, too few for num_tokens = ", num_tokens, " from slot ", slot,
                      " on");
    if (num_tokens > 0) {
      page_ids(page_table.const_data_ptr<int32_t>(), slot / kPageTokens,
               (slot + num_tokens - 1) / kPageTokens + 1, num_pages);
    }
  }

  void page_ids(const int32_t* page_table, int64_t first, int64_t last, int64_t num_pages) const {
    for (int64_t i = first; i < last; ++i) {
      TORCH_CHECK_VALUE(page_table[i] >= 0 && page_table[i] < num_pages, op_, ": page_table[", i,
                        "] must name one of ", num_pages, " pages, got ", page_table[i]);
    }
  }

  // Lengths [batch] of 0 to `most`. The host does not look at those on a device; kernels answer NaN.
  void lengths(const at::Tensor& lens, const char* name, int64_t batch, int64_t most) const {
    tensor(lens, name, at::kInt, {batch});
    if (!lens.is_cpu()) return;
    for (int64_t b = 0; b < batch; ++b) {
      const int32_t len = lens.const_data_ptr<int32_t>()[b];
      TORCH_CHECK_VALUE(len >= 0 && len <= most, op_, ": ", name, "[", b, "] must be 0 to ", most,
                        ", got ", len);
    }
  }

  // The pages of a table [B, N] that sequences of these lengths use, likewise.
  void used_pages(const at::Tensor& page_table, const at::Tensor& cache_seqlens,
                  int64_t num_pages) const {
    if (!page_table.is_cpu()) return;
    for (int64_t b = 0; b < page_table.size(0); ++b) {
      const int64_t len = cache_seqlens.const_data_ptr<int32_t>()[b];
      page_ids(page_table.const_data_ptr<int32_t>() + b * page_table.size(1), 0, page_count(len),
               num_pages);
    }
  }

  // Slots 0 .. most - 1 or 2^31 - 1, likewise.
  void slots(const at::Tensor& slots, const char* name, int64_t most) const {
    if (!slots.is_cpu()) return;
    const int32_t* data = slots.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < slots.numel(); ++i) {
      TORCH_CHECK_VALUE((data[i] >= 0 && data[i] < most) || data[i] == INT32_MAX, op_, ": ", name,
                        " must be 0 to ", most - 1, " or 2^31 - 1, got ", data[i]);
    }
  }

  // Numbers are finite; they are read on the CPU alone.
  void finite(const at::Tensor& numbers, const char* name) const {
    if (!numbers.is_cpu()) return;
    const float* data = numbers.const_data_ptr<float>();
    for (int64_t i = 0; i < numbers.numel(); ++i) {
      TORCH_CHECK_VALUE(std::isfinite(data[i]), op_, ": ", name, " must be finite, got ", data[i]);
    }
  }

  // Outliers' slots [B, H, N]: a head's ascend from 0 on, then 2^31 - 1.
  void ascending_slots(const at::Tensor& slots, const char* name) const {
    if (!slots.is_cpu()) return;
    const int32_t* data = slots.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < slots.numel(); ++i) {
      const int64_t least = i % slots.size(2) == 0 ? 0 : int64_t{data[i - 1]} + 1;
      TORCH_CHECK_VALUE(data[i] >= least || data[i] == INT32_MAX, op_, ": ", name,
                        " must ascend from 0 on in every head, then be 2^31 - 1, got ", data[i],
                        " where at least ", least, " is expected");
    }
  }

  // The pool of value pages: bytes where values are packed, numbers of a float type of that size
  // where they are exact.
  DataType value_pool(const at::Tensor& v_pages, const Layout& layout) const {
    on_device(v_pages, "v_pages");
    contiguous(v_pages, "v_pages");
    if (layout.packs_values()) {
      dtype(v_pages, "v_pages", at::kByte);
      shape(v_pages, "v_pages", {-1, layout.v_page_bytes()});
      return DataType::kFloat32;
    }
    const DataType type = float_type(v_pages, "v_pages");
    TORCH_CHECK_VALUE(v_pages.element_size() * 8 == layout.value_bits(0), op_,
                      ": v_pages must have numbers of ", layout.value_bits(0), " bits, got ",
                      v_pages.scalar_type());
    shape(v_pages, "v_pages", {-1, layout.v_page_bytes() / v_pages.element_size()});
    return type;
  }

 private:
  const char* op_;
  at::Device device_;
};

}  // namespace svdq::torch_binding
