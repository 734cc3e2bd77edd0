// The decode step of a layer as one operator. Shapes, dtypes and meaning are documented in python/svdq/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "csrc/torch/call.h"
#include "csrc/torch/finite_checks.h"
#include "csrc/torch/hybrid_keys.h"
#include "csrc/torch/nouns.h"

namespace svdq::torch_binding {
namespace {

// The tensors that a step changes, and what they are checked against.
struct StepTensors {
  at::Tensor& k_pages;
  at::Tensor& v_pages;
  const at::Tensor& page_table;
  at::Tensor& cache_seqlens;
  const std::optional<at::Tensor>& first_position;
  at::Tensor& window_keys;
  at::Tensor& window_values;
  at::Tensor& window_lens;
  at::Tensor& faults;
  CodecTensors codec;
  int64_t sink_tokens;
  int64_t residual_length;
};

// What the host knows of one sequence on the CPU.
struct HostStep {
  int64_t slots, lens;  // before the step
  DueTokens due;

  int64_t kept() const { return lens - due.count; }
};

int64_t first_position_of(const StepTensors& t, int64_t b) {
  return t.first_position ? t.first_position->const_data_ptr<int32_t>()[b] : 0;
}

// Plans the step of every sequence on the CPU and refuses what does not fit.
std::vector<HostStep> plan_on_host(const Checker& check, const StepTensors& t, int64_t length) {
  std::vector<HostStep> plan;
  const int64_t pages = t.page_table.size(1), rows = t.window_keys.size(2);
  const int64_t pool = std::min(t.k_pages.size(0), t.v_pages.size(0));
  for (int64_t b = 0; b < t.window_lens.size(0); ++b) {
    const int32_t lens = t.window_lens.const_data_ptr<int32_t>()[b];
    const int32_t slots = t.cache_seqlens.const_data_ptr<int32_t>()[b];
    const HostStep step{slots, lens,
                        due_tokens(slots, lens, static_cast<int>(t.sink_tokens),
                                   static_cast<int>(t.residual_length))};
    const int64_t needed = step.kept() + length;
    check.require(needed <= rows, "sequence " + std::to_string(b) + " needs " +
                                      std::to_string(needed) + " window rows, the capacity is " +
                                      std::to_string(rows));
    if (step.due.count > 0) {
      const int64_t page = slots / kPageTokens;
      check.require(page < pages,
                    "sequence " + std::to_string(b) + " needs " + std::to_string(page + 1) +
                        " pages, the capacity of page_table is " + std::to_string(pages));
      check.page_ids(t.page_table.const_data_ptr<int32_t>() + b * pages, page, page + 1, pool);
    }
    plan.push_back(step);
  }
  return plan;
}

// Packs the due tokens of a sequence and moves the window's later rows down.
void pack_on_host(const Checker& check, const Call& call, const Layout& layout, StepTensors& t,
                  const HostStep& step, int64_t b) {
  const int64_t heads = layout.num_heads(), dim = layout.head_dim();
  const int64_t first = step.due.first, count = step.due.count, stop = first + count;
  at::Tensor all_keys = t.window_keys.select(0, b), all_values = t.window_values.select(0, b);
  const at::Tensor keys = all_keys.narrow(1, first, count);
  const at::Tensor values = all_values.narrow(1, first, count);
  const auto own = [&](const at::Tensor& x) { return x.select(0, b); };
  const at::Tensor basis = own(t.codec.basis), scale = own(t.codec.scale), mean = own(t.codec.mean);
  std::optional<at::Tensor> post_mean;
  if (t.codec.post_mean) post_mean = own(*t.codec.post_mean);
  const KeyCodec codec =
      check_codec(check, layout, {basis, scale, mean, post_mean, t.codec.inv_freq});
  const int32_t* table = t.page_table.const_data_ptr<int32_t>() + b * t.page_table.size(1);
  pack_keys_of(call, layout, codec, keys, check.tokens(keys, "window_keys", heads, dim),
               first_position_of(t, b) + step.slots,
               {t.k_pages.mutable_data_ptr<uint8_t>(), table, step.slots});
  call(&Backend::pack_values,
       {check.tokens(values, "window_values", heads, dim), layout.view(),
        static_cast<uint8_t*>(t.v_pages.mutable_data_ptr()), table, step.slots});
  for (at::Tensor* rows : {&all_keys, &all_values}) {  // source and target may overlap
    rows->narrow(1, first, step.lens - stop).copy_(rows->narrow(1, stop, step.lens - stop).clone());
  }
}

// Packs what is due and appends the new rows, as the first kernel of a step does on a device.
void begin_on_host(const Checker& check, const Call& call, const Layout& layout, StepTensors& t,
                   const std::vector<HostStep>& steps, const at::Tensor& keys,
                   const at::Tensor& values, const StepPlan& plan) {
  const int64_t length = keys.size(2);
  for (size_t i = 0; i < steps.size(); ++i) {
    const HostStep& step = steps[i];
    const int64_t b = static_cast<int64_t>(i), kept = step.kept();
    const int64_t slots = step.slots + step.due.count;
    if (step.due.count > 0) pack_on_host(check, call, layout, t, step, b);
    t.window_keys.select(0, b).narrow(1, kept, length).copy_(keys.select(0, b));
    t.window_values.select(0, b).narrow(1, kept, length).copy_(values.select(0, b));
    const int64_t after_sinks = std::max<int64_t>(slots - t.sink_tokens, 0);
    plan.lens[b] = t.window_lens.mutable_data_ptr<int32_t>()[b] =
        static_cast<int32_t>(kept + length);
    plan.slots[b] = t.cache_seqlens.mutable_data_ptr<int32_t>()[b] = static_cast<int32_t>(slots);
    plan.position[b] = static_cast<int32_t>(first_position_of(t, b) + after_sinks + kept);
    plan.kept[b] = static_cast<int32_t>(kept);
  }
}

void check_gain(const Checker& check, const at::Tensor& gain, const std::vector<int64_t>& shape) {
  check.on_device(gain, "gain");
  check.float_type(gain, "gain");
  check.shape(gain, "gain", shape);
}

// Queries and new keys that belong to keys times their gain [B, H, D].
std::pair<at::Tensor, at::Tensor> with_gain(const at::Tensor& query, const at::Tensor& keys,
                                            const at::Tensor& gain) {
  const int64_t heads = keys.size(1);
  const at::Tensor inverse = gain.reciprocal().to(query.scalar_type()).unsqueeze(2).unsqueeze(2);
  const at::Tensor matching =
      (query.unflatten(1, {heads, query.size(1) / heads}) * inverse).flatten(1, 2);
  return {matching, keys * gain.unsqueeze(2).to(keys.scalar_type())};
}

// Rows of a batch [B, H, L, D], those of sequence 0.
TokenSource first_rows(const Checker& check, const at::Tensor& rows, const char* name) {
  return {rows.const_data_ptr(), check.float_type(rows, name), rows.stride(1), rows.stride(2),
          rows.size(2)};
}

at::Tensor dense_rows(const at::Tensor& rows) {
  return rows.stride(3) == 1 ? rows : rows.contiguous();
}

StepPlan step_plan(const at::Tensor& plan) {
  const auto column = [&](int64_t i) { return plan.select(0, i).mutable_data_ptr<int32_t>(); };
  return {column(0), column(1), column(2), column(3)};
}

StepParams step_params(const Checker& check, const Layout& layout, StepTensors& t,
                       const at::Tensor& keys, const at::Tensor& values, const StepPlan& plan) {
  return {
      .new_keys = first_rows(check, keys, "keys"),
      .new_values = first_rows(check, values, "values"),
      .keys_batch_stride = keys.stride(0),
      .values_batch_stride = values.stride(0),
      .window_keys = t.window_keys.mutable_data_ptr(),
      .window_values = t.window_values.mutable_data_ptr(),
      .window_lens = t.window_lens.mutable_data_ptr<int32_t>(),
      .cache_seqlens = t.cache_seqlens.mutable_data_ptr<int32_t>(),
      .k_pages = t.k_pages.mutable_data_ptr<uint8_t>(),
      .v_pages = static_cast<uint8_t*>(t.v_pages.mutable_data_ptr()),
      .residual_length = static_cast<int>(t.residual_length),
      .value_limit = layout.packs_values() ? kLargestHalf : std::numeric_limits<float>::max(),
      .faults = t.faults.mutable_data_ptr<int32_t>(),
      .plan = plan,
  };
}

at::Tensor decode_step_(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                        double sm_scale, const std::optional<at::Tensor>& gain, at::Tensor& k_pages,
                        at::Tensor& v_pages, const at::Tensor& page_table,
                        at::Tensor& cache_seqlens, const std::optional<at::Tensor>& first_position,
                        int64_t sink_tokens, const at::Tensor& basis, const at::Tensor& scale,
                        const at::Tensor& mean, const std::optional<at::Tensor>& post_mean,
                        const std::optional<at::Tensor>& inv_freq, at::IntArrayRef layout_ints,
                        at::Tensor& window_keys, at::Tensor& window_values, at::Tensor& window_lens,
                        int64_t residual_length, at::Tensor& faults, double softcap,
                        const std::optional<at::Tensor>& sinks, int64_t window_size) {
  const Checker check("svdq::decode_step_", query);
  const Layout layout = check.layout(layout_ints);
  const int64_t heads = layout.num_heads(), dim = layout.head_dim(), batch = query.size(0);
  Queries queries = check_queries(check, layout, query, sm_scale);
  const int64_t length = queries.length;
  check.require(length >= 1 && length <= kPageTokens,
                "query must have 1 to 64 tokens, got " + std::to_string(length));
  check.shape(keys, "keys", {batch, heads, length, dim});
  check.shape(values, "values", {batch, heads, length, dim});
  for (const auto& [tensor, name] :
       {std::pair{&keys, "keys"}, {&values, "values"}, {&query, "query"}}) {
    check.on_device(*tensor, name);
    check.dtype(*tensor, name, window_keys.scalar_type());
  }
  check.require(residual_length >= 0 && residual_length <= INT32_MAX,
                "residual_length must not be negative, got " + std::to_string(residual_length));
  check.tensor(faults, "faults", at::kInt, {batch});
  check.contiguous(window_keys, "window_keys");
  check.contiguous(window_values, "window_values");
  const DataType v_dtype = check.value_pool(v_pages, layout);
  if (!layout.packs_values()) check.dtype(values, "values", v_pages.scalar_type());
  const std::optional<at::Tensor> none;
  const CodecTensors codec{basis, scale, mean, post_mean, inv_freq};
  const int64_t pool = std::min(k_pages.size(0), v_pages.size(0));
  PackedKeys packed = check_packed_keys(
      check, layout,
      {k_pages, page_table, cache_seqlens, first_position, none, &none, sink_tokens, codec}, batch,
      pool);
  check_window(check, layout, {window_keys, window_values, window_lens}, batch);
  check.no_overlap({{k_pages, "k_pages"},
                    {v_pages, "v_pages"},
                    {cache_seqlens, "cache_seqlens"},
                    {window_keys, "window_keys"},
                    {window_values, "window_values"},
                    {window_lens, "window_lens"},
                    {faults, "faults"}},
                   {{query, "query"},
                    {keys, "keys"},
                    {values, "values"},
                    {gain, "gain"},
                    {page_table, "page_table"},
                    {first_position, "first_position"},
                    {basis, "basis"},
                    {scale, "scale"},
                    {mean, "mean"},
                    {post_mean, "post_mean"},
                    {inv_freq, "inv_freq"},
                    {sinks, "sinks"}});
  StepTensors t{k_pages,        v_pages,     page_table,    cache_seqlens,
                first_position, window_keys, window_values, window_lens,
                faults,         codec,       sink_tokens,   residual_length};

  if (gain) check_gain(check, *gain, {batch, heads, dim});
  const Call call(query.device());
  const bool as_stage = call.backend().decode_step != nullptr;
  // Kernels apply the gain themselves.
  const auto [matching, stored] =
      gain && query.is_cpu() ? with_gain(query, keys, *gain) : std::pair{query, keys};
  const at::Tensor new_keys = dense_rows(as_stage ? keys : stored), new_values = dense_rows(values);
  const at::Tensor rows = (as_stage ? query : matching).contiguous();
  std::vector<HostStep> steps;
  if (query.is_cpu()) {
    steps = plan_on_host(check, t, length);
    const float limit = layout.packs_values() ? kLargestHalf : std::numeric_limits<float>::max();
    for (int64_t b = 0; b < batch; ++b) {
      const at::Tensor k = dense_rows(stored).select(0, b), v = new_values.select(0, b);
      check_finite(check, check.tokens(k, "keys", heads, dim), "keys", heads, dim);
      check_within(check, check.tokens(v, "values", heads, dim), "values", heads, dim, limit);
    }
  }
  const at::Tensor columns = at::empty({kStepPlanColumns, batch}, window_lens.options());
  const StepPlan plan = step_plan(columns);
  const at::Tensor lens = columns.select(0, 0);
  const std::optional<at::Tensor> position = columns.select(0, 1);
  const LogitRules rules =
      check_rules(check, {softcap, sinks, window_size, position}, queries.num_heads, batch);
  // The host makes its step first, and attend checks the lengths that it leaves; a device's lie there.
  if (!as_stage) {
    begin_on_host(check, call, layout, t, steps, new_keys, new_values, plan);
  } else if (query.is_cpu()) {
    columns.zero_();
  }
  Window window = check_window(check, layout, {window_keys, window_values, lens}, batch);
  window.sink_rows = packed.sink_tokens;
  at::Tensor out = at::empty(rows.sizes(), rows.options());
  at::Tensor lse = at::empty({batch, queries.num_heads, length}, rows.options().dtype(at::kFloat));
  queries.data = rows.const_data_ptr();
  packed.cache_seqlens = plan.slots;
  AttendParams attend{.keys = packed,
                      .queries = queries,
                      .window = window,
                      .rules = rules,
                      .v_pages = static_cast<const uint8_t*>(v_pages.const_data_ptr()),
                      .v_dtype = v_dtype,
                      .causal = true,
                      .token_slots = nullptr,
                      .out = out.mutable_data_ptr(),
                      .lse = lse.mutable_data_ptr<float>(),
                      .step = {}};
  if (!as_stage) {
    if (rows.numel() > 0) call(&Backend::attend, attend);
    return out;
  }
  const at::Tensor own_gain = gain ? gain->contiguous() : at::Tensor();
  attend.step = {.faults = t.faults.const_data_ptr<int32_t>(),
                 .kept = plan.kept,
                 .window_lens = t.window_lens.mutable_data_ptr<int32_t>(),
                 .cache_seqlens = t.cache_seqlens.mutable_data_ptr<int32_t>(),
                 .gain = gain ? own_gain.const_data_ptr() : nullptr,
                 .gain_dtype = gain ? check.float_type(own_gain, "gain") : DataType::kFloat32};
  call(&Backend::decode_step, {step_params(check, layout, t, new_keys, new_values, plan), attend});
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdq, m) {
  m.def(
      "decode_step_(Tensor query, Tensor keys, Tensor values, float sm_scale, Tensor? gain,"
      " Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor page_table, Tensor(c!) cache_seqlens,"
      " Tensor? first_position, int sink_tokens, Tensor basis, Tensor scale, Tensor mean,"
      " Tensor? post_mean, Tensor? inv_freq, int[] layout, Tensor(d!) window_keys,"
      " Tensor(e!) window_values, Tensor(f!) window_lens, int residual_length,"
      " Tensor(g!) faults, float softcap=0.0, Tensor? sinks=None, int window_size=0)"
      " -> Tensor out");
}

TORCH_LIBRARY_IMPL(svdq, CPU, m) { m.impl("decode_step_", &decode_step_); }
TORCH_LIBRARY_IMPL(svdq, CUDA, m) { m.impl("decode_step_", &decode_step_); }

}  // namespace svdq::torch_binding
