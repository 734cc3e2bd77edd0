// Operators that fit, pack and unpack: tensors are checked and turned into the stage's parameters.
// Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "csrc/core/bit_plan.h"
#include "csrc/torch/key_coder.h"
#include "csrc/torch/call.h"
#include "csrc/torch/tensor_checks.h"

namespace svdq::torch_binding {
namespace {

constexpr float kLargestHalf = 65504.0f;
// Keys up to so many are looked through before they are fitted; it takes no time that counts.
constexpr int64_t kCheckedTokens = 4096;

void check_within(const Checker& check, const TokenSource& source, const char* name, int64_t heads,
                  int64_t dim, float limit) {
  const Call call(check.device(), heads * dim * source.num_tokens);
  // While decoding, the host does not wait for a device; what is not a number gets code 0 there, or
  // makes the scale of its own values NaN.
  if (check.device().is_cuda() && source.num_tokens <= kPageTokens) return;
  check.require(
      call(&Backend::all_finite, {source, static_cast<int>(heads), static_cast<int>(dim), limit}),
      std::string(name) + (limit == kLargestHalf
                               ? " must be finite and at most 65504 in magnitude to be packed"
                               : " must be finite, got NaN or infinite numbers"));
}

void check_finite(const Checker& check, const TokenSource& source, const char* name, int64_t heads,
                  int64_t dim) {
  check_within(check, source, name, heads, dim, std::numeric_limits<float>::max());
}

// Eigenvectors as rows [H, D, D] by falling eigenvalue [H, D], of `covariance` [H, D, D], which may be
// overwritten. Where the backend has no solver, LAPACK solves through torch.
std::tuple<at::Tensor, at::Tensor> find_components(const Call& call, at::Tensor& covariance) {
  const int64_t heads = covariance.size(0), dim = covariance.size(1);
  if (call.backend().components) {
    at::Tensor components = at::empty_like(covariance),
               variance = at::empty({heads, dim}, covariance.options());
    call(&Backend::components,
         {covariance.mutable_data_ptr<float>(), static_cast<int>(heads), static_cast<int>(dim),
          components.mutable_data_ptr<float>(), variance.mutable_data_ptr<float>()});
    return {components, variance};
  }
  // LAPACK takes one matrix after the other: every thread some heads. Ascending eigenvalues,
  // eigenvectors in columns.
  std::vector<at::Tensor> some_values(heads), some_vectors(heads);
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd no_autograd;
    for (int64_t h = begin; h < end; ++h)
      std::tie(some_values[h], some_vectors[h]) = at::linalg_eigh(covariance[h]);
  });
  // Gathered here: another thread knows nothing of this one's inference mode.
  const at::Tensor values = at::stack(some_values), vectors = at::stack(some_vectors);
  at::Tensor components = vectors.transpose(1, 2).flip(1).contiguous();
  // The component of largest magnitude, the first of equals, is positive.
  const at::Tensor largest = components.abs().argmax(-1, true);
  components.mul_(at::where(components.gather(-1, largest) < 0, -1.0f, 1.0f));
  return {components, values.flip(1).clamp_min(0).contiguous()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fit_basis(const at::Tensor& keys,
                                                         const std::optional<at::Tensor>& inv_freq,
                                                         int64_t position) {
  const Checker check("svdq::fit_basis", keys);
  check.shape(keys, "keys", {-1, -1, -1});
  const int64_t heads = keys.size(0), dim = keys.size(2);
  try {
    check_head_dim(dim);
  } catch (const std::invalid_argument& error) {
    check.require(false, std::string("keys: ") + error.what());
  }
  const TokenSource source = check.tokens(keys, "keys", heads, dim);
  check.require(heads > 0 && source.num_tokens > 0,
                "keys must have at least one head and one token, got " + std::to_string(heads) +
                    " and " + std::to_string(source.num_tokens));
  const Rope rope = inv_freq ? check.rope(*inv_freq, dim) : Rope{nullptr, 0};

  const auto options = keys.options().dtype(at::kFloat);
  at::Tensor mean = at::empty({heads, dim}, options),
             covariance = at::empty({heads, dim, dim}, options);
  const Call call(check.device());
  call(&Backend::covariance,
       {source, static_cast<int>(heads), static_cast<int>(dim), rope, position,
        mean.mutable_data_ptr<float>(), covariance.mutable_data_ptr<float>()});
  // What is not finite in a key is not in the covariance: no pass of its own looks for it.
  if (!at::isfinite(covariance).all().item<bool>()) {
    check_finite(check, source, "keys", heads, dim);
    check.require(false, "keys must be small enough for float32 to hold their squares");
  }
  const auto [components, variance] = find_components(call, covariance);
  return {mean, components, variance};
}

at::Tensor allocate_bits(const at::Tensor& variance, at::IntArrayRef schedule) {
  const Checker check("svdq::allocate_bits", variance);
  check.shape(variance, "variance", {-1, -1});
  check.dtype(variance, "variance", at::kFloat);
  Bands bands{};
  try {
    bands = plan_schedule(static_cast<int>(variance.size(1)), schedule.vec());
  } catch (const std::invalid_argument& error) {
    check.require(false, error.what());
  }
  at::Tensor out = at::empty({variance.size(0), kNumWidths}, at::kInt);
  for (int64_t h = 0; h < variance.size(0); ++h) {
    for (int w = 0; w < kNumWidths; ++w) out[h][w] = bands.count[w];
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fit_quantizer(
    const at::Tensor& keys, const std::optional<at::Tensor>& inv_freq, int64_t position,
    const at::Tensor& mean, const at::Tensor& components, at::IntArrayRef layout_ints, bool clip) {
  const Checker check("svdq::fit_quantizer", keys);
  const Layout layout = check.layout(layout_ints);
  const int64_t heads = layout.num_heads(), dim = layout.head_dim();
  const TokenSource source = check.tokens(keys, "keys", heads, dim);
  check.require(source.num_tokens > 0, "keys must have at least one token, got none");
  check.tensor(mean, "mean", at::kFloat, {heads, dim});
  check.tensor(components, "components", at::kFloat, {heads, dim, dim});
  check.require(
      layout.rope() != RopeMode::kHybrid,
      "layout must code one space, pre or post: the parts of a hybrid layout are fitted one "
      "after the other");
  const Rope rope = check.rope(inv_freq, layout.rope(), dim);
  const Call call(check.device());
  // The search on the CPU looks at a sample and finds what is not finite there by itself.
  const bool finds_bad = clip && !check.device().is_cuda() && source.num_tokens > kCheckedTokens;
  if (!finds_bad) check_finite(check, source, "keys", heads, dim);

  at::Tensor basis = at::empty({layout.rank(), dim}, keys.options().dtype(at::kBFloat16));
  at::Tensor scale = at::empty({layout.rank()}, mean.options()),
             centred = at::empty({heads, dim}, mean.options());
  call(&Backend::fit_quantizer,
       {source, layout.view(), rope, position, clip, mean.const_data_ptr<float>(),
        components.const_data_ptr<float>(), static_cast<uint16_t*>(basis.mutable_data_ptr()),
        scale.mutable_data_ptr<float>(), centred.mutable_data_ptr<float>()});
  if (finds_bad && !at::isfinite(scale).all().item<bool>())
    check_finite(check, source, "keys", heads, dim);
  return {basis, scale, centred};
}

void pack_keys_(at::Tensor& k_pages, const at::Tensor& keys,
                const std::optional<at::Tensor>& inv_freq, int64_t position,
                const at::Tensor& basis, const at::Tensor& scale, const at::Tensor& mean,
                at::IntArrayRef layout_ints, const at::Tensor& page_table, int64_t slot,
                const std::optional<at::Tensor>& post_mean,
                const std::optional<at::Tensor>& errors) {
  const Checker check("svdq::pack_keys_", k_pages);
  const Layout layout = check.layout(layout_ints);
  const int64_t heads = layout.num_heads(), dim = layout.head_dim();
  const TokenSource source = check.tokens(keys, "keys", heads, dim);
  check.tensor(k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  const KeyCodec codec = check_codec(check, layout, basis, scale, mean, post_mean, inv_freq);
  check.pages(page_table, slot, source.num_tokens, k_pages.size(0));
  if (errors) check.tensor(*errors, "errors", at::kFloat, {heads, source.num_tokens});
  check_finite(check, source, "keys", heads, dim);
  float* error_data = errors ? errors->mutable_data_ptr<float>() : nullptr;

  const Call call(check.device());
  uint8_t* pages = k_pages.mutable_data_ptr<uint8_t>();
  const int32_t* table = page_table.const_data_ptr<int32_t>();
  if (layout.rope() != RopeMode::kHybrid) {
    call(&Backend::pack_keys, {source, layout.view(), codec, position, pages, table, slot,
                               error_data, source.num_tokens});
    return;
  }
  const Destination to{pages, table, slot};
  pack_pre(call, layout, codec, source, position, to);
  if (layout.post_rank() == 0 && !errors) return;
  for_each_residual(
      call, layout, codec, keys, position, to, [&](int64_t first, const at::Tensor& rest) {
        call(&Backend::pack_keys,
             {float_source(rest), layout.post_view(), post_codec(codec), 0, pages, table,
              slot + first, error_data ? error_data + first : nullptr, source.num_tokens});
      });
}

at::Tensor residual_keys(const at::Tensor& keys, const std::optional<at::Tensor>& inv_freq,
                         int64_t position, const at::Tensor& basis, const at::Tensor& scale,
                         const at::Tensor& mean, at::IntArrayRef layout_ints) {
  const Checker check("svdq::residual_keys", keys);
  const Layout layout = check.layout(layout_ints);
  check.require(layout.rope() == RopeMode::kHybrid, "layout must be hybrid");
  const int64_t heads = layout.num_heads(), dim = layout.head_dim();
  const TokenSource source = check.tokens(keys, "keys", heads, dim);
  const KeyCodec codec = check_codec(check, layout, basis, scale, mean, mean, inv_freq);
  check_finite(check, source, "keys", heads, dim);

  // Pages for one run of tokens after the other.
  const int64_t num_pages =
      (std::min(kResidualTokens, source.num_tokens) + kPageTokens - 1) / kPageTokens;
  at::Tensor pages = at::empty({num_pages, layout.k_page_bytes()}, keys.options().dtype(at::kByte));
  std::vector<int32_t> table(num_pages);
  std::iota(table.begin(), table.end(), 0);
  at::Tensor out = at::empty({heads, source.num_tokens, dim}, keys.options());
  const Call call(check.device());
  for (int64_t first = 0; first < source.num_tokens; first += kResidualTokens) {
    const int64_t count = std::min(kResidualTokens, source.num_tokens - first);
    const at::Tensor some = keys.narrow(1, first, count);
    const Destination own{pages.mutable_data_ptr<uint8_t>(), table.data(), 0};
    pack_pre(call, layout, codec, check.tokens(some, "keys", heads, dim), position + first, own);
    for_each_residual(
        call, layout, codec, some, position + first, own,
        [&](int64_t, const at::Tensor& rest) { out.narrow(1, first, count).copy_(rest); });
  }
  return out;
}

void pack_values_(at::Tensor& v_pages, const at::Tensor& values, at::IntArrayRef layout_ints,
                  const at::Tensor& page_table, int64_t slot) {
  const Checker check("svdq::pack_values_", v_pages);
  const Layout layout = check.layout(layout_ints);
  const TokenSource source = check.tokens(values, "values", layout.num_heads(), layout.head_dim());
  check.value_pool(v_pages, layout);
  const bool packed = layout.value().packed();
  if (!packed) check.dtype(values, "values", v_pages.scalar_type());
  check.pages(page_table, slot, source.num_tokens, v_pages.size(0));
  check_within(check, source, "values", layout.num_heads(), layout.head_dim(),
               packed ? kLargestHalf : std::numeric_limits<float>::max());
  Call(check.device())(&Backend::pack_values,
                       {source, layout.view(), static_cast<uint8_t*>(v_pages.mutable_data_ptr()),
                        page_table.const_data_ptr<int32_t>(), slot});
}

void append_window_(at::Tensor& window_keys, at::Tensor& window_values, const at::Tensor& keys,
                    const at::Tensor& values, int64_t start) {
  const Checker check("svdq::append_window_", window_keys);
  check.shape(window_keys, "window_keys", {-1, -1, -1});
  const int64_t heads = window_keys.size(0), rows = window_keys.size(1), dim = window_keys.size(2);
  check.tokens(window_keys, "window_keys", heads, dim);
  check.tokens(window_values, "window_values", heads, dim);
  check.shape(window_values, "window_values", {heads, rows, dim});
  const TokenSource new_keys = check.tokens(keys, "keys", heads, dim);
  const TokenSource new_values = check.tokens(values, "values", heads, dim);
  check.shape(values, "values", {heads, keys.size(1), dim});
  check.dtype(window_values, "window_values", window_keys.scalar_type());
  check.dtype(keys, "keys", window_keys.scalar_type());
  check.dtype(values, "values", window_keys.scalar_type());
  check.require(dim % kLanes == 0,
                "keys must have a head_dim that is a multiple of 16, got " + std::to_string(dim));
  check.require(start >= 0 && keys.size(1) <= rows && start <= rows - keys.size(1),
                "start must leave room for " + std::to_string(keys.size(1)) + " tokens in " +
                    std::to_string(rows) + " exact rows, got " + std::to_string(start));
  check_finite(check, new_keys, "keys", heads, dim);
  check_finite(check, new_values, "values", heads, dim);
  window_keys.narrow(1, start, keys.size(1)).copy_(keys);
  window_values.narrow(1, start, keys.size(1)).copy_(values);
}

UnpackParams unpack_params(const Checker& check, const Layout& layout, const at::Tensor& pages,
                           const at::Tensor& page_table, int64_t slot, int64_t num_tokens) {
  check.pages(page_table, slot, num_tokens, pages.size(0));
  return {layout.view(), static_cast<const uint8_t*>(pages.const_data_ptr()),
          page_table.const_data_ptr<int32_t>(), slot, num_tokens};
}

at::Tensor unpack_codes_op(const at::Tensor& k_pages, at::IntArrayRef layout_ints,
                           const at::Tensor& page_table, int64_t slot, int64_t num_tokens) {
  const Checker check("svdq::unpack_codes", k_pages);
  const Layout layout = check.layout(layout_ints);
  check.tensor(k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  const UnpackParams params = unpack_params(check, layout, k_pages, page_table, slot, num_tokens);
  at::Tensor codes = at::empty({num_tokens, layout.rank()}, k_pages.options());
  Call(check.device())(&Backend::unpack_codes, {params, codes.mutable_data_ptr<uint8_t>()});
  return codes;
}

at::Tensor unpack_keys_op(const at::Tensor& k_pages, const std::optional<at::Tensor>& inv_freq,
                          int64_t position, const at::Tensor& basis, const at::Tensor& scale,
                          const at::Tensor& mean, at::IntArrayRef layout_ints,
                          const at::Tensor& page_table, int64_t slot, int64_t num_tokens,
                          const std::optional<at::Tensor>& post_mean) {
  const Checker check("svdq::unpack_keys", k_pages);
  const Layout layout = check.layout(layout_ints);
  check.tensor(k_pages, "k_pages", at::kByte, {-1, layout.k_page_bytes()});
  const KeyCodec codec = check_codec(check, layout, basis, scale, mean, post_mean, inv_freq);
  UnpackParams params = unpack_params(check, layout, k_pages, page_table, slot, num_tokens);
  const Call call(check.device());
  const auto decode = [&](const LayoutView& view, const KeyCodec& own) {
    at::Tensor keys = at::empty({view.num_heads, num_tokens, view.head_dim}, mean.options());
    params.layout = view;
    call(&Backend::unpack_keys, {params, own, position, keys.mutable_data_ptr<float>()});
    return keys;
  };
  if (layout.rope() != RopeMode::kHybrid) return decode(layout.view(), codec);
  at::Tensor keys = decode(layout.pre_view(), codec);
  return keys.add_(decode(layout.post_view(), post_codec(codec)));
}

at::Tensor unpack_values_op(const at::Tensor& v_pages, at::IntArrayRef layout_ints,
                            const at::Tensor& page_table, int64_t slot, int64_t num_tokens) {
  const Checker check("svdq::unpack_values", v_pages);
  const Layout layout = check.layout(layout_ints);
  const DataType dtype = check.value_pool(v_pages, layout);
  const UnpackParams params = unpack_params(check, layout, v_pages, page_table, slot, num_tokens);
  at::Tensor values = at::empty({layout.num_heads(), num_tokens, layout.head_dim()},
                                v_pages.options().dtype(at::kFloat));
  Call(check.device())(&Backend::unpack_values, {params, dtype, values.mutable_data_ptr<float>()});
  return values;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdq, m) {
  m.def(
      "fit_basis(Tensor keys, Tensor? inv_freq, int position) -> (Tensor mean, Tensor components, "
      "Tensor variance)");
  m.def("allocate_bits(Tensor variance, int[] schedule) -> Tensor");
  m.def(
      "fit_quantizer(Tensor keys, Tensor? inv_freq, int position, Tensor mean, Tensor components, "
      "int[] layout, bool clip)"
      " -> (Tensor basis, Tensor scale, Tensor centred_mean)");
  m.def(
      "pack_keys_(Tensor(a!) k_pages, Tensor keys, Tensor? inv_freq, int position, Tensor basis, "
      "Tensor scale, Tensor mean,"
      " int[] layout, Tensor page_table, int slot, Tensor? post_mean=None, Tensor(b!)? errors=None)"
      " -> ()");
  m.def(
      "residual_keys(Tensor keys, Tensor? inv_freq, int position, Tensor basis, Tensor scale, "
      "Tensor mean, int[] layout) -> Tensor");
  m.def(
      "pack_values_(Tensor(a!) v_pages, Tensor values, int[] layout, Tensor page_table, int slot) "
      "-> ()");
  m.def(
      "append_window_(Tensor(a!) window_keys, Tensor(b!) window_values, Tensor keys, Tensor "
      "values, "
      "int start) -> ()");
  m.def(
      "unpack_codes(Tensor k_pages, int[] layout, Tensor page_table, int slot, int num_tokens) -> "
      "Tensor");
  m.def(
      "unpack_keys(Tensor k_pages, Tensor? inv_freq, int position, Tensor basis, Tensor scale, "
      "Tensor mean, int[] layout,"
      " Tensor page_table, int slot, int num_tokens, Tensor? post_mean=None) -> Tensor");
  m.def(
      "unpack_values(Tensor v_pages, int[] layout, Tensor page_table, int slot, int num_tokens) -> "
      "Tensor");
}

// The same functions serve both devices: a Call runs the stages where the tensors lie.
static void register_stages(torch::Library& m) {
  m.impl("fit_basis", &fit_basis);
  m.impl("allocate_bits", &allocate_bits);
  m.impl("fit_quantizer", &fit_quantizer);
  m.impl("pack_keys_", &pack_keys_);
  m.impl("residual_keys", &residual_keys);
  m.impl("pack_values_", &pack_values_);
  m.impl("append_window_", &append_window_);
  m.impl("unpack_codes", &unpack_codes_op);
  m.impl("unpack_keys", &unpack_keys_op);
  m.impl("unpack_values", &unpack_values_op);
}

TORCH_LIBRARY_IMPL(svdq, CPU, m) { register_stages(m); }
TORCH_LIBRARY_IMPL(svdq, CUDA, m) { register_stages(m); }

}  // namespace svdq::torch_binding
