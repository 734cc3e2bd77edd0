// The extension module svdq._C: constants of the format and the choice of backend. Operators on
// tensors are registered with torch when this library is loaded (ops_*.cpp).
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "csrc/core/absorb.h"
#include "csrc/core/backend.h"
#include "csrc/core/error.h"
#include "csrc/core/layout.h"
#include "csrc/torch/call.h"
#include "kernels/rotation.h"

namespace py = pybind11;

namespace svdq {
namespace {

std::pair<int64_t, int> place(const CodeAddress& at) { return {at.byte, at.shift}; }

void check_place(int width, int channel, int token) {
  bool known = false;
  for (const int w : kWidths) known |= w == width;
  SVDQ_CHECK(known && channel >= 0 && channel < kMaxHeadDim && token >= 0 && token < kPageTokens,
             "no code of width ", width, ", channel ", channel, ", token ", token);
}

// Bytes that scoring a key page by the first `channels` channels of every head reads: whole lines.
int64_t proxy_page_bytes(const std::vector<int64_t>& ints, int channels) {
  const Layout layout(ints);
  const LayoutView view = layout.view();
  int64_t bytes = 0;
  for (int h = 0; h < view.num_heads; ++h) {
    int left = channels;
    for (const Bands& bands : {view.heads[h].pre, view.heads[h].post}) {
      Bands proxy{};
      for (int w = 0; w < kNumWidths; ++w) {
        const int used = std::min(bands.count[w], left), unit = band_granularity(kWidths[w]);
        proxy.count[w] = (used + unit - 1) / unit * unit;
        left -= used;
      }
      bytes += proxy.page_bytes();
    }
  }
  return bytes;
}

// Bytes that a band of a key page takes.
int64_t checked_band_bytes(int width, int64_t channels) {
  SVDQ_CHECK(std::find(std::begin(kWidths), std::end(kWidths), width) != std::end(kWidths),
             "no code has width ", width);
  return band_bytes(width, channels);
}

// Reads every byte of a contiguous CPU tensor with all threads; returns the sum of its 64-bit
// words.
uint64_t read_pass(const at::Tensor& tensor) {
  SVDQ_CHECK(tensor.device().is_cpu() && tensor.is_contiguous(),
             "read_pass: needs a contiguous CPU tensor");
  const auto* words = static_cast<const uint64_t*>(tensor.const_data_ptr());
  const int64_t count = static_cast<int64_t>(tensor.nbytes() / sizeof(uint64_t));
  std::atomic<uint64_t> total{0};
  at::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    uint64_t sums[16] = {};
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
      for (int k = 0; k < 16; ++k) sums[k] += words[i + k];
    }
    for (; i < end; ++i) sums[0] += words[i];
    for (const uint64_t sum : sums) total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total.load();
}

}  // namespace
}  // namespace svdq

PYBIND11_MODULE(_C, m) {
  using namespace svdq;
  m.doc() =
      "Constants of the packed format and the choice of backend; operators are torch.ops.svdq.*";

  py::module_ format = m.def_submodule("format", "Constants of kernels/format.h");
  format.attr("VERSION") = kFormatVersion;
  format.attr("PAGE_TOKENS") = kPageTokens;
  format.attr("LINE_BYTES") = kLineBytes;
  format.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  format.attr("WIDTHS") = std::vector<int>(std::begin(kWidths), std::end(kWidths));
  format.attr("NO_SLOT") = kNoSlot;  // stands for no token in lists of slots
  format.attr("ROPE_MODES") = std::vector<std::string>{"pre", "post", "hybrid"};  // RopeMode
  format.def("band_bytes", &checked_band_bytes, py::arg("width"), py::arg("channels"),
             "Bytes that a band of a key page takes.");
  format.def("proxy_page_bytes", &proxy_page_bytes, py::arg("layout"), py::arg("channels"),
             "Bytes of a key page that scoring it by the first channels of every head reads.");
  format.def(
      "value_code_bytes",
      [](const std::vector<int64_t>& ints) {
        const Layout layout(ints);
        const LayoutView view = layout.view();
        int64_t bytes = view.v_page_bytes;
        for (int h = 0; h < view.num_heads; ++h) bytes -= view.heads[h].value.scale_bytes();
        return bytes;
      },
      py::arg("layout"), "Bytes of a value page without its scales.");
  format.attr("VALUE_BITS") = std::vector<int>(std::begin(kValueBits), std::end(kValueBits));
  format.attr("SCALE_SHIFT") = kScaleShift;
  format.attr("LARGEST_SCALE") = kLargestScale;
  format.def("value_step", &value_step, py::arg("bits"),
             "Distance between codes of values, in root mean squares of the rotated numbers.");
  format.def("rotation_sign", &rotation_sign, py::arg("channel"),
             "Sign of a channel before the Hadamard matrix of the values' rotation.");

  m.attr("MAX_SELECT_CHANNELS") = kMaxSelectChannels;
  // Precision that the CPU backends keep when they absorb pre-RoPE channels into queries.
  m.attr("ABSORB_ROWS") = kAbsorbRows;
  m.attr("ABSORBED_FASTEST") = kAbsorbedFastest;
  m.def(
      "absorbed_error", &absorbed_error,
      "Largest share of a RoPE pair's part of a score that absorbing it leaves out, by frequency.",
      py::arg("frequency"));
  m.def("absorbed_mean_error", &absorbed_mean_error, "The same of the mean's part.",
        py::arg("frequency"));

  m.def(
      "check_layout", [](const std::vector<int64_t>& ints) { Layout{ints}; }, py::arg("layout"),
      "Raises ValueError unless the integers are a valid layout.");
  m.def(
      "k_page_bytes", [](const std::vector<int64_t>& ints) { return Layout(ints).k_page_bytes(); },
      py::arg("layout"), "Bytes of a key page.");
  m.def(
      "v_page_bytes", [](const std::vector<int64_t>& ints) { return Layout(ints).v_page_bytes(); },
      py::arg("layout"), "Bytes of a value page.");
  m.def(
      "key_code_address",
      [](int width, int channel, int token) {
        check_place(width, channel, token);
        return place(key_code_address(width, channel, token));
      },
      py::arg("width"), py::arg("channel"), py::arg("token"),
      "Byte and shift of a key code inside its band.");
  m.def(
      "value_code_address",
      [](int width, int channel, int token) {
        check_place(width, channel, token);
        return place(value_code_address(width, channel, token));
      },
      py::arg("width"), py::arg("channel"), py::arg("token"),
      "Byte and shift of a value code inside its codes.");

#if defined(SVDQ_WITH_CUDA)
  m.attr("BUILT_WITH_CUDA") = true;
#else
  m.attr("BUILT_WITH_CUDA") = false;
#endif
  m.def(
      "backends",
      [] {
        std::vector<std::string> names;
        for (const Backend* backend : available_backends()) names.emplace_back(backend->name);
        return names;
      },
      "CPU backends that run on this machine, best first.");
  m.def(
      "backend", [] { return std::string(current_backend().name); },
      "Name of the CPU backend in use.");
  m.def("set_backend", &set_backend, py::arg("name"), "Use another CPU backend from now on.");
  m.def("read_pass", &read_pass, py::arg("tensor"),
        "Reads every byte of a contiguous CPU tensor with torch's threads, as a bandwidth measure; "
        "returns a checksum.");
  torch_binding::add_backends();
  current_backend();  // a wrong SVDQ_BACKEND fails at import, not in the middle of a model
}
