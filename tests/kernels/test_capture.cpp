// The stages of decoding can be captured in a CUDA graph: they compile, and work, with a queue that
// has no way to wait for the device.
#include "tests/kernels/attend_test.h"

#include "csrc/gpu/gather.h"
#include "csrc/gpu/pack.h"
#include "csrc/gpu/select.h"

namespace svdq {
namespace {

using testing::Blind;

class Capture : public testing::AttendTest {};

TEST_P(Capture, AttendNeverWaits) {
  for (int q_len : {1, 20}) {
    testing::AttendCase c;
    c.q_len = q_len;
    testing::AttendProblem problem(c, 1);
    const AttendParams p = testing::captured_params(problem);
    Blind blind(stream());
    const testing::AttendAnswer got = testing::attend_on_device(p, nullptr, blind);
    EXPECT_EQ(got.out, run(p, nullptr).out);
  }
}

TEST_P(Capture, MergeAndPackNeverWait) {
  Blind blind(stream());
  gpu::merge(MergeParams{}, blind);
  const Layout layout(testing::layout_ints(RopeMode::kPost, 64, {{{4, 8, 4, 8}}}));
  PackKeysParams keys{};
  keys.layout = layout.view();
  gpu::pack_keys(keys, blind);  // of no tokens: what counts is that it compiles
  PackValuesParams values{};
  values.layout = layout.view();
  gpu::pack_values(values, blind);
}

TEST_P(Capture, SelectAndGatherNeverWait) {
  Blind blind(stream());
  GatherParams gather{};
  gather.layout.num_heads = 0;
  gpu::gather(gather, blind);
  SelectParams select{};  // of an empty cache: nothing is selected
  const Layout layout(testing::layout_ints(RopeMode::kPost, 64, {{{4, 8, 4, 8}}}));
  const testing::DeviceArray<int32_t> length(std::vector<int32_t>{0}), slots(3);
  select.keys.layout = layout.view();
  select.keys.batch = 1;
  select.queries.num_heads = 1;
  select.queries.length = 1;
  select.keys.cache_seqlens = length.data();
  select.channels = 8;
  select.budget = 3;
  select.slots = slots.data();
  gpu::select(select, blind);
  EXPECT_EQ(slots.read(), std::vector<int32_t>(3, kNoSlot));
}

SVDQ_KERNEL_TESTS(Capture);

}  // namespace
}  // namespace svdq
