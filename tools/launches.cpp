// Prints the launches of the stages on devices of several sizes, one JSON object a line, without running
// anything: for tools/check_kernels.py and tools/resource_table.py. Shapes are those of a
// decode step and of a prefill, for every class of head_dim, RoPE mode and value width.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "csrc/emulator/launch.h"

#include "csrc/core/layout.h"
#include "csrc/gpu/covariance.h"
#include "csrc/gpu/gather.h"
#include "csrc/gpu/pack.h"
#include "csrc/gpu/quantizer.h"
#include "csrc/gpu/select.h"
#include "csrc/gpu/step.h"

namespace svdq {
namespace {

// Prints launches instead of queueing them. Nothing reads the memory that it allocates.
class Printer {
 public:
  Printer(const gpu::DeviceLimits& limits, std::string shape)
      : limits_(limits), shape_(std::move(shape)) {}

  template <typename... Params>
  void launch(const char* name, const device::LaunchShape& shape, void (*kernel)(Params...),
              const std::type_identity_t<Params>&...) {
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(kernel), &info);
    int status = 0;
    char* symbol = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
    std::printf(
        "{\"launch\": \"%s\", \"kernel\": \"%s\", \"shape\": \"%s\", \"limit\": %d, "
        "\"threads\": %d, \"dynamic\": %d, \"blocks\": %lld, \"argument_bytes\": %d}\n",
        name, symbol, shape_.c_str(), limits_.max_shared_bytes, shape.threads, shape.smem_bytes,
        1LL * shape.grid_x * shape.grid_y * shape.grid_z,
        static_cast<int>((sizeof(Params) + ... + 0)));
    std::free(symbol);
  }
  template <typename T>
  T* allocate(int64_t) {
    static uint8_t anywhere[256] __attribute__((aligned(256)));
    return reinterpret_cast<T*>(anywhere);
  }
  template <typename T>
  void read(T* host, const T*, int64_t count) {
    std::fill_n(host, count, T{});
  }
  void add_gram(const float*, int, int64_t, int, float*) {}
  void eigenvectors(float*, float*, int, int, int*) {}
  const gpu::DeviceLimits& limits() const { return limits_; }

 private:
  gpu::DeviceLimits limits_;
  std::string shape_;
};

constexpr int kHeads = 8, kGroup = 4, kTokens = 32768;

// The schedule paper-1.25: a quarter of the channels at 4 bits, an eighth at 2. Hybrid heads have 8
// pre-RoPE channels in addition.
std::vector<int64_t> layout_ints(RopeMode rope, int dim, int v_bits) {
  const ValueCoding coding = v_bits <= 4 ? ValueCoding::kPlain : ValueCoding::kNumbers;
  std::vector<int64_t> ints = {kFormatVersion,
                               kHeads,
                               dim,
                               static_cast<int64_t>(rope),
                               static_cast<int64_t>(KeyCoding::kPlain),
                               static_cast<int64_t>(coding)};
  const int counts[kNumWidths] = {0, dim / 4, dim / 8, 0};
  for (int h = 0; h < kHeads; ++h) {
    const int pre[kNumWidths] = {4, 4, 0, 0}, none[kNumWidths] = {};
    for (int count : rope == RopeMode::kPre ? counts : rope == RopeMode::kHybrid ? pre : none)
      ints.push_back(count);
    for (int count : rope == RopeMode::kPre ? none : counts) ints.push_back(count);
    ints.push_back(v_bits);
  }
  return ints;
}

constexpr const char* kModes[] = {"pre", "post", "hybrid"};

AttendParams attend_params(const Layout& layout, RopeMode rope, int dim, int64_t q_len,
                           int64_t tokens) {
  AttendParams p{};
  p.keys.layout = layout.view();
  p.keys.codec.rope.rotary_pairs = rope == RopeMode::kPost ? 0 : dim / 2;
  p.keys.batch = 1;
  p.queries.num_heads = kHeads * kGroup;
  p.queries.length = q_len;
  p.queries.dtype = p.window.dtype = p.v_dtype = DataType::kBFloat16;
  p.keys.table_stride = p.keys.num_pages = tokens / kPageTokens;
  p.window.rows = 128;
  p.window.head_stride = int64_t{p.window.rows} * dim;
  p.window.batch_stride = kHeads * p.window.head_stride;
  return p;
}

// `gathered`: over pages of kTokens / 32 tokens.
void attend(const gpu::DeviceLimits& limits, RopeMode rope, int dim, int v_bits, int64_t q_len,
            bool gathered) {
  const Layout layout(layout_ints(rope, dim, v_bits));
  AttendParams p = attend_params(layout, rope, dim, q_len, gathered ? kTokens / 32 : kTokens);
  static const int32_t slots[1] = {};
  p.token_slots = gathered ? slots : nullptr;
  Printer printer(limits,
                  join("attend, ", kModes[static_cast<int>(rope)], "-RoPE, head_dim ", dim, ", ",
                       v_bits, "-bit values, q_len ", q_len, gathered ? ", gathered" : ""));
  gpu::attend(p, printer);
}

void decode_step(const gpu::DeviceLimits& limits, RopeMode rope, int dim, int v_bits) {
  const Layout layout(layout_ints(rope, dim, v_bits));
  DecodeStepParams p{{}, attend_params(layout, rope, dim, 1, kTokens)};
  p.step.new_keys.num_tokens = p.step.new_values.num_tokens = 1;
  Printer printer(limits, join("decode step, ", kModes[static_cast<int>(rope)], "-RoPE, head_dim ",
                               dim, ", ", v_bits, "-bit values"));
  gpu::decode_step(p, printer);
}

void select(const gpu::DeviceLimits& limits, RopeMode rope, int dim, int v_bits, int group,
            int channels) {
  const Layout layout(layout_ints(rope, dim, v_bits));
  SelectParams p{};
  p.keys.layout = layout.view();
  p.keys.codec.rope.rotary_pairs = rope == RopeMode::kPost ? 0 : dim / 2;
  p.keys.batch = 1;
  p.queries.num_heads = kHeads * group;
  p.queries.length = 1;
  p.keys.table_stride = kTokens / kPageTokens;
  p.keys.num_pages = p.keys.table_stride;
  p.channels = channels;
  p.budget = kTokens / 32;
  Printer printer(limits,
                  join("select, ", kModes[static_cast<int>(rope)], "-RoPE, head_dim ", dim, ", ",
                       v_bits, "-bit values, group ", group, ", ", channels, " channels"));
  gpu::select(p, printer);
  GatherParams g{};
  g.layout = layout.view();
  g.batch = 1;
  g.table_stride = g.num_pages = p.keys.table_stride;
  g.num_slots = p.budget;
  gpu::gather(g, printer);
}

void prefill(const gpu::DeviceLimits& limits, int dim, int v_bits) {
  const Layout layout(layout_ints(RopeMode::kPre, dim, v_bits));
  const std::vector<int32_t> table(kTokens / kPageTokens);
  Printer printer(limits, join("prefill, head_dim ", dim, ", ", v_bits, "-bit values"));
  alignas(16) static const uint8_t anything[16] = {};
  const TokenSource tokens{anything, DataType::kBFloat16, int64_t{kTokens} * dim, dim, kTokens};

  CovarianceParams covariance{};
  covariance.keys = tokens;
  covariance.num_heads = kHeads;
  covariance.head_dim = dim;
  covariance.rope.rotary_pairs = dim / 2;
  gpu::covariance(covariance, printer);
  gpu::components({nullptr, kHeads, dim, nullptr, nullptr}, printer);
  for (bool clip : {false, true}) {
    QuantizerParams quantizer{};
    quantizer.keys = tokens;
    quantizer.layout = layout.view();
    quantizer.rope.rotary_pairs = dim / 2;
    quantizer.clip = clip;
    gpu::fit_quantizer(quantizer, printer);
  }
  PackKeysParams keys{};
  keys.keys = tokens;
  keys.layout = layout.view();
  keys.codec.rope.rotary_pairs = dim / 2;
  keys.page_table = table.data();
  gpu::pack_keys(keys, printer);
  PackValuesParams values{};
  values.values = tokens;
  values.layout = layout.view();
  values.page_table = table.data();
  gpu::pack_values(values, printer);
}

}  // namespace
}  // namespace svdq

int main() {
  using namespace svdq;
  // Shared memory of a block: sm_86, 89 and 120; sm_80; sm_90 and 100. Multiprocessors do not matter.
  for (int limit : {101376, 166912, 232448}) {
    const gpu::DeviceLimits limits{128, limit};
    for (int dim : {64, 128, 256, 512}) {
      for (int v_bits : {2, 3, 4, 16}) {
        for (RopeMode rope : {RopeMode::kPost, RopeMode::kPre, RopeMode::kHybrid}) {
          for (int64_t q_len : {1, 16}) attend(limits, rope, dim, v_bits, q_len, false);
          attend(limits, rope, dim, v_bits, 1, true);
          decode_step(limits, rope, dim, v_bits);
          for (int group : {1, 2, 4, 8}) {
            for (int channels : {8, 32}) select(limits, rope, dim, v_bits, group, channels);
          }
        }
        prefill(limits, dim, v_bits);
      }
    }
  }
}
