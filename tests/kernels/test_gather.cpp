// The gather kernel against the format, code by code.
#include "tests/core/gather_problem.h"
#include "tests/kernels/attend_device.h"

#include "csrc/gpu/gather.h"

namespace svdq {
namespace {

using testing::DeviceArray;
using testing::GatherCase;

class GatherKernel : public testing::KernelTest {
 protected:
  void check(const GatherCase& c, uint64_t stream_id) {
    testing::GatherProblem problem(c, stream_id);
    GatherParams p = problem.params();
    const int64_t pages = c.batch * ((c.num_slots + kPageTokens - 1) / kPageTokens);
    const auto keys = testing::upload(p.k_pages, p.num_pages, p.layout.k_page_bytes);
    const auto values = testing::upload(p.v_pages, p.num_pages, p.layout.v_page_bytes);
    const auto table = testing::upload(p.page_table, c.batch * p.table_stride);
    const auto slots = testing::upload(p.slots, c.batch * p.layout.num_heads * p.num_slots);
    const DeviceArray<uint8_t> k_out(static_cast<size_t>(pages * p.layout.k_page_bytes)),
        v_out(static_cast<size_t>(pages * p.layout.v_page_bytes));
    p.k_pages = keys.data();
    p.v_pages = values.data();
    p.page_table = reinterpret_cast<const int32_t*>(table.data());
    p.slots = reinterpret_cast<const int32_t*>(slots.data());
    p.k_out = k_out.data();
    p.v_out = v_out.data();
    gpu::gather(p, stream());
    EXPECT_TRUE(testing::same_bytes(k_out.read(), problem.expected_keys())) << stream_id;
    EXPECT_TRUE(testing::same_bytes(v_out.read(), problem.expected_values())) << stream_id;
  }
};

TEST_P(GatherKernel, EveryWidth) {
  for (int w = 0; w < kNumWidths; ++w) {
    for (int count : {8, 24}) {
      GatherCase c;
      Bands bands{};
      bands.count[w] = count;
      c.bands = {bands, {{4, 4, 4, 8}}};
      check(c, 10 * w + count);
    }
  }
}

TEST_P(GatherKernel, EveryModeAndHeadDim) {
  for (int head_dim : {16, 80, 256, 512}) {
    GatherCase c;
    c.head_dim = head_dim;
    c.v_bits = {3, 2, 4};
    c.bands = {{{4, 4, 0, 8}}, {{0, 0, 0, 0}}, {{0, 4, 4, 0}}};
    for (RopeMode mode : {RopeMode::kPre, RopeMode::kPost, RopeMode::kHybrid}) {
      c.rope = mode;
      if (mode == RopeMode::kHybrid) c.pre_bands = {{{0, 4, 4, 0}}, {{4, 0, 0, 8}}, {{0, 0, 0, 0}}};
      check(c, 100 + head_dim + static_cast<int>(mode));
    }
  }
}

TEST_P(GatherKernel, EveryValueFormat) {
  for (int bits : {2, 3, 4, 16, 32}) {
    GatherCase c;
    c.v_bits = bits;
    check(c, 1000 + 10 * bits);
  }
}

TEST_P(GatherKernel, EveryNumberOfSlots) {
  for (int slots : {1, 63, 64, 65, 200, 300}) {
    GatherCase c;
    c.num_slots = slots;
    check(c, 2000 + slots);
  }
}

SVDQ_KERNEL_TESTS(GatherKernel);

}  // namespace
}  // namespace svdq
