// A decode step captured in a CUDA graph and replayed with growing lengths, across page boundaries, gives what single
// calls give: the same bytes, two kernels a step, and no wait for the device.
#include "tests/kernels/attend_device.h"

#if defined(__CUDACC__)

#include <dlfcn.h>

#include <cmath>
#include <random>

#include "csrc/core/layout.h"
#include "csrc/cuda/backend.h"
#include "tests/core/testing.h"

namespace svdq {
namespace {

using testing::check_cuda;
using testing::DeviceArray;

constexpr int kHeads = 2, kGroup = 2, kDim = 64, kBatch = 2, kRows = 160, kPages = 5, kSinks = 4;
constexpr int kSteps = 100, kFresh = kBatch * kHeads * kDim, kQuery = kFresh * kGroup;

std::vector<float> random_numbers(size_t count, unsigned seed, float size = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<float> all(count);
  for (float& x : all) x = normal(generator);
  return all;
}

std::vector<uint16_t> random_basis(size_t count) {
  std::vector<uint16_t> all;
  for (float x : random_numbers(count, 5, 0.1f)) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    all.push_back(static_cast<uint16_t>(bits >> 16));
  }
  return all;
}

std::vector<float> frequencies() {
  std::vector<float> all(kDim / 2);
  for (int i = 0; i < kDim / 2; ++i) all[i] = std::pow(10000.0f, -2.0f * i / kDim);
  return all;
}

std::vector<int64_t> ints_of(RopeMode rope) {
  const Bands some{{0, 8, 8, 8}}, few{{0, 8, 0, 0}};
  const testing::HeadBands pre{few, few};
  return testing::layout_ints(rope, kDim, {some, some}, 4,
                              rope == RopeMode::kHybrid ? pre : testing::HeadBands{});
}

// A layer at its full capacity on the device, and scratch memory that a step takes anew each time.
class Layer {
 public:
  explicit Layer(RopeMode rope) : layout_(ints_of(rope)), rope_(rope) {
    cudaDeviceProp device;
    check_cuda(cudaGetDeviceProperties(&device, 0), "device properties");
    context_ = {nullptr, device.multiProcessorCount,
                static_cast<int>(device.sharedMemPerBlockOptin), &Layer::allocate, this};
  }

  void step(cudaStream_t stream) {
    used_ = 0;
    context_.stream = stream;
    cuda::backend().decode_step(params(), context_);
  }

  // New tokens and queries of step `i`, to where a graph reads them.
  void feed(unsigned i) {
    const auto write = [](const DeviceArray<float>& to, const std::vector<float>& from) {
      check_cuda(cudaMemcpy(to.data(), from.data(), from.size() * 4, cudaMemcpyHostToDevice),
                 "feed");
    };
    write(new_keys_, random_numbers(kFresh, 3 * i));
    write(new_values_, random_numbers(kFresh, 3 * i + 1));
    write(query_, random_numbers(kQuery, 3 * i + 2));
  }

  std::vector<float> out() const { return out_.read(); }
  std::vector<int32_t> slots() const { return slots_.read(); }

  void expect_same(const Layer& other) const {
    EXPECT_EQ(lens_.read(), other.lens_.read());
    EXPECT_EQ(slots_.read(), other.slots_.read());
    EXPECT_EQ(k_pages_.read(), other.k_pages_.read());
    EXPECT_EQ(v_pages_.read(), other.v_pages_.read());
    EXPECT_EQ(faults_.read(), std::vector<int32_t>(kBatch, 0));
  }

 private:
  static void* allocate(void* owner, int64_t bytes) {
    Layer& self = *static_cast<Layer*>(owner);
    const int64_t at = self.used_;
    self.used_ += (bytes + 255) / 256 * 256;
    if (self.used_ > kScratch) throw std::runtime_error("the test's scratch memory is too small");
    return self.scratch_.data() + at;
  }

  DecodeStepParams params() {
    DecodeStepParams p{};
    StepParams& step = p.step;
    AttendParams& a = p.attend;
    int32_t* plan = plan_.data();
    step.new_keys = {new_keys_.data(), DataType::kFloat32, kDim, kDim, 1};
    step.new_values = {new_values_.data(), DataType::kFloat32, kDim, kDim, 1};
    step.keys_batch_stride = step.values_batch_stride = kHeads * kDim;
    step.window_keys = keys_.data();
    step.window_values = values_.data();
    step.window_lens = lens_.data();
    step.cache_seqlens = slots_.data();
    step.k_pages = k_pages_.data();
    step.v_pages = v_pages_.data();
    step.residual_length = 8;
    step.value_limit = 65504.0f;
    step.faults = faults_.data();
    step.plan = {plan, plan + kBatch, plan + 2 * kBatch, plan + 3 * kBatch};
    a.keys.layout = layout_.view();
    const int pairs = rope_ == RopeMode::kPost ? 0 : kDim / 2;
    a.keys.codec.rope = {pairs ? inv_freq_.data() : nullptr, pairs};
    a.keys.codec.basis = basis_.data();
    a.keys.codec.scale = scale_.data();
    a.keys.codec.mean = mean_.data();
    a.keys.codec.post_mean = mean_.data();
    a.keys.batch = kBatch;
    a.keys.pages = step.k_pages;
    a.keys.num_pages = kBatch * kPages;
    a.keys.page_table = table_.data();
    a.keys.table_stride = kPages;
    a.keys.cache_seqlens = step.plan.slots;
    a.keys.sink_tokens = kSinks;
    a.queries = {query_.data(), DataType::kFloat32, kHeads * kGroup, 1, 0.125f};
    a.window = {step.window_keys,   step.window_values,
                DataType::kFloat32, kHeads * kRows * kDim,
                kRows * kDim,       kRows,
                step.plan.lens,     kSinks};
    a.v_pages = step.v_pages;
    a.v_dtype = DataType::kFloat32;
    a.causal = true;
    a.out = out_.data();
    a.lse = lse_.data();
    a.step = {faults_.data(), step.plan.kept, lens_.data(),
              slots_.data(),  gain_.data(),   DataType::kFloat32};
    return p;
  }

  static constexpr int64_t kScratch = 16 << 20;
  static constexpr int kNumbers = kBatch * kHeads * kRows * kDim;

  Layout layout_;
  RopeMode rope_;
  GpuContext context_{};
  int64_t used_ = 0;
  DeviceArray<uint8_t> scratch_{static_cast<size_t>(kScratch)};
  DeviceArray<float> keys_{random_numbers(kNumbers, 1)}, values_{random_numbers(kNumbers, 2)};
  DeviceArray<float> new_keys_{std::vector<float>(kFresh)}, new_values_{std::vector<float>(kFresh)};
  DeviceArray<float> query_{std::vector<float>(kQuery)};
  DeviceArray<float> inv_freq_{frequencies()};
  DeviceArray<uint16_t> basis_{random_basis(size_t{kBatch} * layout_.rank() * kDim)};
  DeviceArray<float> scale_{std::vector<float>(kBatch * layout_.rank(), 0.2f)};
  DeviceArray<float> mean_{random_numbers(kBatch * kHeads * kDim, 4, 0.3f)};
  DeviceArray<float> gain_{std::vector<float>(kBatch * kHeads * kDim, 1.25f)};
  DeviceArray<uint8_t> k_pages_{
      std::vector<uint8_t>(kBatch * kPages * layout_.k_page_bytes(), 0x5a)};
  DeviceArray<uint8_t> v_pages_{
      std::vector<uint8_t>(kBatch * kPages * layout_.v_page_bytes(), 0x5a)};
  DeviceArray<int32_t> lens_{std::vector<int32_t>{kSinks + 30, kSinks + 61}};
  DeviceArray<int32_t> slots_{std::vector<int32_t>{64, 90}};
  DeviceArray<int32_t> table_{std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}};
  DeviceArray<int32_t> faults_{std::vector<int32_t>(kBatch, 0)};
  DeviceArray<int32_t> plan_{std::vector<int32_t>(kStepPlanColumns * kBatch, 0)};
  DeviceArray<float> out_{kQuery}, lse_{kBatch * kHeads * kGroup};
};

// What the log of a PTX emulator counts, on a machine where one runs this; else 0.
long long host_calls(const char* what) {
  const auto count =
      reinterpret_cast<long long (*)(const char*)>(dlsym(RTLD_DEFAULT, "ptxsim_hostlog_count"));
  return count ? count(what) : 0;
}

class CaptureStep : public ::testing::TestWithParam<RopeMode> {};

TEST_P(CaptureStep, ReplaysEqualSingleCalls) {
  Layer single(GetParam()), replayed(GetParam());
  cudaStream_t stream;
  check_cuda(cudaStreamCreate(&stream), "stream");
  cudaGraph_t graph;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin of capture");
  replayed.step(stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "end of capture");
  size_t nodes = 0;
  check_cuda(cudaGraphGetNodes(graph, nullptr, &nodes), "nodes");
  EXPECT_EQ(nodes, 2u);
  cudaGraphExec_t executable;
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  const std::vector<int32_t> slots = single.slots();
  for (int i = 0; i < kSteps; ++i) {
    single.feed(i);
    replayed.feed(i);
    const long long waits = host_calls("syncs") + host_calls("implicit_syncs");
    const long long allocations = host_calls("allocs"), launches = host_calls("launches");
    single.step(stream);
    EXPECT_EQ(host_calls("syncs") + host_calls("implicit_syncs"), waits);
    EXPECT_EQ(host_calls("allocs"), allocations);
    EXPECT_LE(host_calls("launches"), launches + 2);
    check_cuda(cudaGraphLaunch(executable, stream), "replay");
    check_cuda(cudaStreamSynchronize(stream), "replay");
    const std::vector<float> out = single.out();
    ASSERT_EQ(out, replayed.out()) << "step " << i;
    for (float x : out) ASSERT_TRUE(std::isfinite(x)) << "step " << i;
  }
  single.expect_same(replayed);
  for (int b = 0; b < kBatch; ++b) EXPECT_GT(single.slots()[b], slots[b]);
  check_cuda(cudaGraphExecDestroy(executable), "graph");
  check_cuda(cudaGraphDestroy(graph), "graph");
  check_cuda(cudaStreamDestroy(stream), "stream");
}

INSTANTIATE_TEST_SUITE_P(, CaptureStep,
                         ::testing::Values(RopeMode::kPost, RopeMode::kPre, RopeMode::kHybrid));

}  // namespace
}  // namespace svdq

#endif
