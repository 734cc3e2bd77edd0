// Runs one decode step of a layer on a CUDA device and prints, as one JSON object, what it had to read: for
// tools/step_time.py, which takes the times of its kernels from a timing model or a profiler.
// Usage: svdq_step_time MODE BATCH TOKENS SMS SHARED_BYTES [Q_HEADS KV_HEADS]; work is cut for a device with so many
// multiprocessors and so much shared memory a block.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/core/layout.h"
#include "csrc/cuda/backend.h"

namespace svdq {
namespace {

constexpr int kDim = 128, kValueBits = 4, kSinks = 8, kWindow = 64;
constexpr int kWaiting = 32;  // tokens behind the window that fill half a page
constexpr int kRows = kSinks + kWindow + kPageTokens;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Memory of the device, given back at the end of the program.
void* device_memory(int64_t bytes) {
  void* data = nullptr;
  check(cudaMalloc(&data, bytes > 0 ? bytes : 1));
  return data;
}

template <typename T>
T* upload(const std::vector<T>& from) {
  void* to = device_memory(static_cast<int64_t>(from.size() * sizeof(T)));
  check(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(to);
}

std::mt19937 generator(7);

template <typename T>
std::vector<T> random_bits(int64_t count) {
  std::vector<T> all(count);
  for (T& x : all) x = static_cast<T>(generator());
  return all;
}

std::vector<uint16_t> random_bfloats(int64_t count, float size) {
  std::vector<uint16_t> all(count);
  std::normal_distribution<float> normal(0.0f, size);
  for (uint16_t& x : all) {
    const float value = normal(generator);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    x = static_cast<uint16_t>(bits >> 16);
  }
  return all;
}

// A quarter of the channels at 4 bits and an eighth at 2: 1.25 bits a number. Hybrid heads have 8 channels before RoPE
// in addition.
std::vector<int64_t> layout_ints(RopeMode rope, int heads) {
  std::vector<int64_t> ints = {kFormatVersion,
                               heads,
                               kDim,
                               static_cast<int64_t>(rope),
                               static_cast<int64_t>(KeyCoding::kPlain),
                               static_cast<int64_t>(ValueCoding::kPlain)};
  const int counts[kNumWidths] = {0, kDim / 4, kDim / 8, 0}, core[kNumWidths] = {4, 4, 0, 0};
  const int none[kNumWidths] = {};
  for (int h = 0; h < heads; ++h) {
    const bool pre = rope == RopeMode::kPre;
    for (int count : pre ? counts : rope == RopeMode::kHybrid ? core : none) ints.push_back(count);
    for (int count : pre ? none : counts) ints.push_back(count);
    ints.push_back(kValueBits);
  }
  return ints;
}

RopeMode mode_of(const std::string& name) {
  if (name == "post") return RopeMode::kPost;
  if (name == "pre") return RopeMode::kPre;
  if (name == "hybrid") return RopeMode::kHybrid;
  throw std::runtime_error("the mode is post, pre or hybrid, not " + name);
}

void run(RopeMode rope, int batch, int tokens, GpuContext context, int q_heads, int heads) {
  const Layout layout(layout_ints(rope, heads));
  const LayoutView view = layout.view();
  const int packed = (tokens - kSinks - kWindow - kWaiting) / kPageTokens * kPageTokens;
  const int64_t pages = packed / kPageTokens + 2, pool = batch * pages, rank = layout.rank();
  const int64_t rows = int64_t{batch} * heads * kRows * kDim;

  std::vector<int32_t> table(pool);
  for (int64_t i = 0; i < pool; ++i) table[i] = static_cast<int32_t>(i);
  std::vector<float> inv_freq(kDim / 2);
  for (int i = 0; i < kDim / 2; ++i) inv_freq[i] = std::pow(10000.0f, -2.0f * i / kDim);
  const std::vector<float> zeros(int64_t{batch} * heads * kDim, 0.0f);
  const int pairs = rope == RopeMode::kPost ? 0 : kDim / 2;

  DecodeStepParams p{};
  StepParams& step = p.step;
  AttendParams& a = p.attend;
  const int64_t fresh = int64_t{batch} * heads * kDim;
  step.new_keys = {upload(random_bfloats(fresh, 1.0f)), DataType::kBFloat16, kDim, kDim, 1};
  step.new_values = {upload(random_bfloats(fresh, 1.0f)), DataType::kBFloat16, kDim, kDim, 1};
  step.keys_batch_stride = step.values_batch_stride = int64_t{heads} * kDim;
  step.window_keys = upload(random_bfloats(rows, 1.0f));
  step.window_values = upload(random_bfloats(rows, 1.0f));
  step.window_lens = upload(std::vector<int32_t>(batch, kSinks + kWindow + kWaiting));
  step.cache_seqlens = upload(std::vector<int32_t>(batch, packed));
  step.k_pages = upload(random_bits<uint8_t>(pool * layout.k_page_bytes()));
  // Scales are bytes of which the largest stand for numbers that are not finite.
  std::vector<uint8_t> values = random_bits<uint8_t>(pool * layout.v_page_bytes());
  for (uint8_t& x : values) x &= 0x77;
  step.v_pages = upload(values);
  step.residual_length = kWindow;
  step.value_limit = 65504.0f;
  step.faults = upload(std::vector<int32_t>(batch, 0));
  const auto column = [&] { return static_cast<int32_t*>(device_memory(batch * 4)); };
  step.plan = {column(), column(), column(), column()};

  a.keys.layout = view;
  a.keys.codec = {{pairs ? upload(inv_freq) : nullptr, pairs},
                  upload(random_bfloats(batch * rank * kDim, 0.1f)),
                  upload(std::vector<float>(batch * rank, 0.1f)),
                  upload(zeros),
                  upload(zeros)};
  a.keys.batch = batch;
  a.keys.pages = step.k_pages;
  a.keys.num_pages = pool;
  a.keys.page_table = upload(table);
  a.keys.table_stride = pages;
  a.keys.cache_seqlens = step.plan.slots;
  a.keys.sink_tokens = kSinks;
  a.queries = {upload(random_bfloats(int64_t{batch} * q_heads * kDim, 1.0f)), DataType::kBFloat16,
               q_heads, 1, 0.088388f};
  a.window = {step.window_keys,      step.window_values,
              DataType::kBFloat16,   int64_t{heads} * kRows * kDim,
              int64_t{kRows} * kDim, kRows,
              step.plan.lens,        kSinks};
  a.v_pages = step.v_pages;
  a.v_dtype = DataType::kBFloat16;
  a.causal = true;
  a.out = device_memory(int64_t{batch} * q_heads * kDim * 2);
  a.lse = static_cast<float*>(device_memory(int64_t{batch} * q_heads * 4));
  a.step = {step.faults,        step.plan.kept, step.window_lens,
            step.cache_seqlens, nullptr,        DataType::kFloat32};

  cuda::backend().decode_step(p, context);
  check(cudaDeviceSynchronize());
  const int64_t exact = int64_t{batch} * heads * (kSinks + kWindow + kWaiting) * kDim * 4;
  const int64_t bytes =
      batch * (packed / kPageTokens) * int64_t{layout.k_page_bytes() + layout.v_page_bytes()} +
      exact + batch * rank * (kDim * 2 + 4);
  std::printf("{\"bytes\": %lld, \"full_bytes\": %lld}\n", static_cast<long long>(bytes),
              4LL * batch * heads * kDim * tokens);
}

}  // namespace
}  // namespace svdq

int main(int argc, char** argv) {
  try {
    if (argc < 6) throw std::runtime_error("MODE BATCH TOKENS SMS SHARED_BYTES [Q_HEADS KV_HEADS]");
    const auto number = [&](int i, int otherwise) {
      return i < argc ? std::atoi(argv[i]) : otherwise;
    };
    const svdq::GpuContext context{nullptr, number(4, 0), number(5, 0),
                                   [](void*, int64_t bytes) { return svdq::device_memory(bytes); },
                                   nullptr};
    svdq::run(svdq::mode_of(argv[1]), number(2, 0), number(3, 0), context, number(6, 32),
              number(7, 8));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "svdq_step_time: %s\n", error.what());
    return 2;
  }
}
