// Tensors that share memory.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace svdq::torch_binding {

// An argument and its name; null where it was not given.
struct Named {
  Named(const at::Tensor& tensor, const char* name) : tensor(&tensor), name(name) {}
  Named(const std::optional<at::Tensor>& tensor, const char* name)
      : tensor(tensor ? &*tensor : nullptr), name(name) {}

  const at::Tensor* tensor;
  const char* name;
};

using Span = std::pair<const char*, const char*>;  // first byte, byte after the last

// All bytes from the first to the last that a tensor with numbers names.
inline Span extent(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const char* first = static_cast<const char*>(tensor.const_data_ptr());
  return {first, first + (last + 1) * tensor.element_size()};
}

// The bytes of a tensor, piece by piece in ascending order.
inline std::vector<Span> spans(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return {extent(tensor)};
  const int64_t last = tensor.dim() - 1;
  const int64_t run = tensor.stride(last) == 1 ? tensor.size(last) : 1;
  const int64_t bytes = tensor.element_size();
  std::vector<Span> found;
  std::vector<int64_t> index(tensor.dim(), 0);
  for (int64_t n = 0; n < tensor.numel() / run; ++n) {
    int64_t offset = 0;
    for (int64_t d = 0; d <= last; ++d) offset += index[d] * tensor.stride(d);
    const char* first = static_cast<const char*>(tensor.const_data_ptr()) + offset * bytes;
    found.emplace_back(first, first + run * bytes);
    for (int64_t d = run > 1 ? last - 1 : last; d >= 0 && ++index[d] == tensor.size(d); --d)
      index[d] = 0;
  }
  std::sort(found.begin(), found.end());
  return found;
}

inline bool overlaps_itself(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return false;
  const std::vector<Span> own = spans(tensor);
  for (size_t i = 1; i < own.size(); ++i) {
    if (own[i].first < own[i - 1].second) return true;
  }
  return false;
}

// Whether two tensors share a byte; neither overlaps itself, or it makes no difference.
inline bool overlap(const at::Tensor& a, const at::Tensor& b) {
  if (a.device() != b.device() || a.numel() == 0 || b.numel() == 0) return false;
  const auto apart = [](const Span& x, const Span& y) {
    return x.second <= y.first || y.second <= x.first;
  };
  if (apart(extent(a), extent(b))) return false;
  const std::vector<Span> some = spans(a), others = spans(b);
  for (size_t i = 0, j = 0; i < some.size() && j < others.size();) {
    if (!apart(some[i], others[j])) return true;
    some[i].second <= others[j].second ? ++i : ++j;
  }
  return false;
}

}  // namespace svdq::torch_binding
