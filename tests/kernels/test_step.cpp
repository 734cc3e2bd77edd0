// A decode step queued on a stream that cannot wait, as a graph captures it: lengths grow on the device, and sequences
// that cannot go on stay as they are. tests/cache/test_cache_static.py compares the bytes that it writes with those of
// the pack stages, and what it attends to with attend alone.
#include "tests/kernels/attend_device.h"

#include <cmath>

#include "csrc/core/layout.h"
#include "tests/core/reference.h"

namespace svdq {
namespace {

using testing::Blind;
using testing::DeviceArray;

class StepKernels : public testing::KernelTest {
 protected:
  static constexpr int kHeads = 1, kDim = 64, kRows = 128, kBatch = 3, kSinks = 4;
  static constexpr int kNumbers = kBatch * kHeads * kRows * kDim;

  explicit StepKernels()
      : layout_(testing::layout_ints(RopeMode::kPost, kDim, {{{4, 8, 4, 8}}})),
        keys_(std::vector<float>(kNumbers, 1.0f)),
        values_(std::vector<float>(kNumbers, 2.0f)),
        basis_(std::vector<uint16_t>(kBatch * layout_.rank() * kDim, 0)),
        scale_(std::vector<float>(kBatch * layout_.rank(), 1.0f)),
        mean_(std::vector<float>(kBatch * kDim, 0.0f)),
        k_pages_(std::vector<uint8_t>(6 * layout_.k_page_bytes(), 0)),
        v_pages_(std::vector<uint8_t>(6 * layout_.v_page_bytes(), 0)) {}

  // One step of one token a sequence.
  void step(const std::vector<float>& new_keys) {
    const DeviceArray<float> fresh(new_keys), query(std::vector<float>(kBatch * kDim, 0.5f));
    const TokenSource source{fresh.data(), DataType::kFloat32, kDim, kDim, 1};
    int32_t* plan = plan_.data();
    StepParams p{};
    p.new_keys = p.new_values = source;
    p.keys_batch_stride = p.values_batch_stride = kDim;
    p.window_keys = keys_.data();
    p.window_values = values_.data();
    p.window_lens = lens_.data();
    p.cache_seqlens = slots_.data();
    p.k_pages = k_pages_.data();
    p.v_pages = v_pages_.data();
    p.residual_length = 8;
    p.value_limit = 65504.0f;
    p.faults = faults_.data();
    p.plan = {plan, plan + kBatch, plan + 2 * kBatch, plan + 3 * kBatch};
    AttendParams a{};
    a.keys.layout = layout_.view();
    a.keys.codec = {Rope{}, basis_.data(), scale_.data(), mean_.data(), nullptr};
    a.keys.batch = kBatch;
    a.keys.pages = k_pages_.data();
    a.keys.num_pages = 6;
    a.keys.page_table = table_.data();
    a.keys.table_stride = 2;
    a.keys.cache_seqlens = p.plan.slots;
    a.keys.sink_tokens = kSinks;
    a.queries = {query.data(), DataType::kFloat32, kHeads, 1, 0.125f};
    a.window = {keys_.data(), values_.data(), DataType::kFloat32, kHeads * kRows * kDim,
                kRows * kDim, kRows,          p.plan.lens,        kSinks};
    a.v_pages = v_pages_.data();
    a.v_dtype = DataType::kFloat32;
    a.causal = true;
    a.out = out_.data();
    a.lse = lse_.data();
    a.step = {faults_.data(), p.plan.kept, lens_.data(),
              slots_.data(),  nullptr,     DataType::kFloat32};
    Blind blind(stream());
    gpu::decode_step({p, a}, blind);
  }

  Layout layout_;
  DeviceArray<float> keys_, values_;
  DeviceArray<uint16_t> basis_;
  DeviceArray<float> scale_, mean_;
  DeviceArray<uint8_t> k_pages_, v_pages_;
  DeviceArray<int32_t> lens_{std::vector<int32_t>{kSinks + 70, kSinks + 20, kSinks + 70}};
  DeviceArray<int32_t> slots_{std::vector<int32_t>{64, 64, 128}};
  DeviceArray<int32_t> table_{std::vector<int32_t>{0, 1, 2, 3, 4, 5}};
  DeviceArray<int32_t> faults_{std::vector<int32_t>(kBatch, 0)};
  DeviceArray<int32_t> plan_{std::vector<int32_t>(kStepPlanColumns * kBatch, 0)};
  DeviceArray<float> out_{kBatch * kDim}, lse_{kBatch};
};

TEST_P(StepKernels, LengthsGrowOnTheDevice) {
  const std::vector<float> fresh(kBatch * kDim, 3.0f);
  // Sequence 0 has 64 tokens before the last 8 after two steps, so the third packs them; sequence 2 has no third page for
  // them then.
  const std::vector<std::vector<int32_t>> lens = {{75, 25, 75}, {76, 26, 76}, {13, 27, 76}};
  const std::vector<std::vector<int32_t>> slots = {{64, 64, 128}, {64, 64, 128}, {128, 64, 128}};
  const std::vector<std::vector<int32_t>> faults = {{0, 0, 0}, {0, 0, 0}, {0, 0, 1}};
  for (size_t i = 0; i < lens.size(); ++i) {
    step(fresh);
    EXPECT_EQ(lens_.read(), lens[i]);
    EXPECT_EQ(slots_.read(), slots[i]);
    EXPECT_EQ(faults_.read(), faults[i]);
  }
  // The new rows have moved behind the sinks and the six tokens before them; other rows are as they were.
  const std::vector<float> rows = keys_.read();
  for (int row = 0; row < 13; ++row) EXPECT_EQ(rows[row * kDim], row < 10 ? 1.0f : 3.0f) << row;
  const std::vector<uint8_t> pages = k_pages_.read();
  const auto page = [&](int i) {
    const auto first = pages.begin() + i * layout_.k_page_bytes();
    return std::vector<uint8_t>(first, first + layout_.k_page_bytes());
  };
  const std::vector<uint8_t> untouched(layout_.k_page_bytes(), 0);
  EXPECT_NE(page(1), untouched);
  for (int i : {0, 2, 3, 4, 5}) EXPECT_EQ(page(i), untouched) << i;
}

TEST_P(StepKernels, NumbersThatAreNotFiniteStopTheirSequence) {
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY, 1e5f}) {
    std::vector<float> fresh(kBatch * kDim, 3.0f);
    fresh[kDim + 5] = bad;
    const std::vector<float> before = keys_.read();
    const std::vector<int32_t> lens = lens_.read();
    step(fresh);
    EXPECT_EQ(faults_.read()[1], 1);
    EXPECT_EQ(lens_.read()[1], lens[1]);
    const std::vector<float> lse = lse_.read();
    EXPECT_TRUE(std::isnan(lse[1]));
    EXPECT_TRUE(std::isfinite(lse[0]));
    const std::vector<float> after = keys_.read();
    const int first = kHeads * kRows * kDim;
    EXPECT_TRUE(
        std::equal(before.begin() + first, before.begin() + 2 * first, after.begin() + first));
  }
}

SVDQ_KERNEL_TESTS(StepKernels);

}  // namespace
}  // namespace svdq
