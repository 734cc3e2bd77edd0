// Operators that fit bases and quantizers. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "csrc/core/bit_plan.h"
#include "csrc/torch/call.h"
#include "csrc/torch/finite_checks.h"
#include "csrc/torch/tensor_checks.h"

namespace svdq::torch_binding {
namespace {

// Up to so many keys, a check before fitting takes no time that matters.
constexpr int64_t kCheckedTokens = 4096;

// Numbers times 2^exponent. In two steps, since the power itself may be out of float32's range.
at::Tensor times_power(const at::Tensor& numbers, const at::Tensor& exponent) {
  const at::Tensor half = exponent.div(2, "floor");
  return at::ldexp(at::ldexp(numbers, half), exponent - half);
}

// Eigenvectors as rows [H, D, D] by falling eigenvalue [H, D], of `covariance` [H, D, D].
//
// Solvers multiply three numbers of a matrix with the square of the rounding error. Where that underflows they fail
// or answer NaN. In float64, which LAPACK solves in through torch, it never does. A backend's own solver has float32:
// its largest number is scaled to about 1 by a power of two, and those below 2^-36, far within its error, are left out.
std::tuple<at::Tensor, at::Tensor> find_components(const Call& call, const at::Tensor& covariance) {
  const int64_t heads = covariance.size(0), dim = covariance.size(1);
  if (call.backend().components) {
    const at::Tensor exponent = std::get<1>(at::frexp(covariance.abs().amax({1, 2})));
    at::Tensor scaled = times_power(covariance, exponent.neg().view({heads, 1, 1}));
    scaled.masked_fill_(scaled.abs() < 0x1p-36, 0);
    at::Tensor components = at::empty_like(covariance),
               variance = at::empty({heads, dim}, covariance.options());
    call(&Backend::components,
         {scaled.mutable_data_ptr<float>(), static_cast<int>(heads), static_cast<int>(dim),
          components.mutable_data_ptr<float>(), variance.mutable_data_ptr<float>()});
    return {components, times_power(variance, exponent.view({heads, 1}))};
  }
  // LAPACK takes one matrix after the other: every thread some heads. Ascending eigenvalues,
  // eigenvectors in columns.
  std::vector<at::Tensor> some_values(heads), some_vectors(heads);
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd no_autograd;
    for (int64_t h = begin; h < end; ++h)
      std::tie(some_values[h], some_vectors[h]) = at::linalg_eigh(covariance[h].to(at::kDouble));
  });
  // Gathered here: another thread knows nothing of this one's inference mode.
  const at::Tensor values = at::stack(some_values).to(at::kFloat),
                   vectors = at::stack(some_vectors).to(at::kFloat);
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
  // Keys that are not finite make a covariance that is not finite, so no pass over the keys is needed.
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

// The same functions serve both devices: a Call runs the stages where the tensors lie.
void register_operators(torch::Library& m) {
  m.impl("fit_basis", &fit_basis);
  m.impl("allocate_bits", &allocate_bits);
  m.impl("fit_quantizer", &fit_quantizer);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdq, m) {
  m.def(
      "fit_basis(Tensor keys, Tensor? inv_freq, int position)"
      " -> (Tensor mean, Tensor components, Tensor variance)");
  m.def("allocate_bits(Tensor variance, int[] schedule) -> Tensor");
  m.def(
      "fit_quantizer(Tensor keys, Tensor? inv_freq, int position, Tensor mean, Tensor components,"
      " int[] layout, bool clip) -> (Tensor basis, Tensor scale, Tensor centred_mean)");
}

TORCH_LIBRARY_IMPL(svdq, CPU, m) { register_operators(m); }
TORCH_LIBRARY_IMPL(svdq, CUDA, m) { register_operators(m); }

}  // namespace svdq::torch_binding
