// The select kernels against weights in double: what is selected must be what they allow, over
// widths, shapes, lengths and channels.
#include "tests/core/select_problem.h"
#include "tests/kernels/attend_device.h"

#include <limits>

#include "csrc/gpu/select.h"

namespace svdq {
namespace {

using testing::DeviceArray;
using testing::SelectCase;
using testing::SelectProblem;

struct Selected {
  std::vector<int32_t> slots, places;
};

template <typename Stream>
Selected select_on_device(const SelectParams& host, Stream& stream) {
  using testing::upload;
  const int64_t heads = int64_t{host.keys.batch} * host.keys.layout.num_heads,
                dim = host.keys.layout.head_dim;
  const auto as = [](auto* type, const DeviceArray<uint8_t>& array) {
    return type ? reinterpret_cast<decltype(type)>(array.data()) : nullptr;
  };
  const auto query =
      upload(static_cast<const uint8_t*>(host.queries.data), heads * device::query_rows(host) * dim,
             testing::size_of(host.queries.dtype));
  const auto pages = upload(host.keys.pages, host.keys.num_pages, host.keys.layout.k_page_bytes);
  const auto table = upload(host.keys.page_table, host.keys.batch * host.keys.table_stride);
  const auto seqlens = upload(host.keys.cache_seqlens, host.keys.batch);
  const auto basis = upload(host.keys.codec.basis, host.keys.batch * host.keys.layout.rank * dim);
  const auto scale = upload(host.keys.codec.scale, host.keys.batch * host.keys.layout.rank);
  const auto mean = upload(host.keys.codec.mean, heads * dim);
  const auto post_mean =
      upload(host.keys.codec.post_mean, host.keys.codec.post_mean ? heads * dim : 0);
  const auto first =
      upload(host.keys.first_position, host.keys.first_position ? host.keys.batch : 0);
  const auto inv_freq = upload(host.keys.codec.rope.inv_freq, host.keys.codec.rope.rotary_pairs);
  const auto outliers = upload(host.keys.outlier_slots, heads * host.keys.num_outliers);
  const DeviceArray<int32_t> slots(
      static_cast<size_t>(heads * (host.budget + host.keys.num_outliers))),
      places(static_cast<size_t>(heads * host.keys.num_outliers));
  SelectParams p = host;
  p.queries.data = query.data();
  p.keys.pages = pages.data();
  p.keys.page_table = as(host.keys.page_table, table);
  p.keys.cache_seqlens = as(host.keys.cache_seqlens, seqlens);
  p.keys.codec.basis = as(host.keys.codec.basis, basis);
  p.keys.codec.scale = as(host.keys.codec.scale, scale);
  p.keys.codec.mean = as(host.keys.codec.mean, mean);
  p.keys.codec.post_mean = as(host.keys.codec.post_mean, post_mean);
  p.keys.first_position = as(host.keys.first_position, first);
  p.keys.codec.rope.inv_freq = as(host.keys.codec.rope.inv_freq, inv_freq);
  p.keys.outlier_slots = as(host.keys.outlier_slots, outliers);
  p.slots = slots.data();
  p.outlier_indices = host.keys.num_outliers ? places.data() : nullptr;
  gpu::select(p, stream);
  return {slots.read(), places.read()};
}

class SelectKernels : public testing::KernelTest {
 protected:
#if defined(SVDQ_EMULATED)
  // Codes and weights move in whole sectors.
  void observe(const char* name, const emulator::Counters& counters) override {
    KernelTest::observe(name, counters);
    for (const auto& site : counters.sites) {
      if (!site.shared && site.width == 16 && site.transfers != site.ideal)
        ADD_FAILURE() << name << ": " << site.transfers << " instead of " << site.ideal << ", "
                      << site.where();
    }
  }
#endif

  void check(const char* what, const SelectCase& given, uint64_t seed) {
    for (const SelectCase& c : testing::in_every_mode(given)) check_mode(what, c, seed);
  }

  void check_mode(const char* what, const SelectCase& c, uint64_t seed) {
    SelectProblem problem(c, seed);
    const Selected got = select_on_device(problem.params(), stream());
    problem.set_answer(got.slots, got.places);
    EXPECT_TRUE(problem.check()) << what << ", seed " << seed << ", " << testing::mode_of(c);
  }
};

TEST_P(SelectKernels, EveryWidthAlone) {
  for (int w = 0; w < kNumWidths; ++w) {
    for (int channels : {4, 8, 32}) {
      SelectCase c;
      Bands bands{};
      bands.count[w] = 16;
      c.bands = {bands};
      c.channels = channels;
      c.cache_seqlens = {130, 70};
      check("one width", c, 100 * w + channels);
    }
  }
}

TEST_P(SelectKernels, EveryHeadDim) {
  for (int head_dim : {16, 80, 128, 512}) {
    SelectCase c;
    c.head_dim = head_dim;
    c.rotary_pairs = head_dim / 2;
    c.bands = {{{4, 4, 0, 8}}, {{0, 0, 4, 0}}};
    c.cache_seqlens = {150};
    check("head_dim", c, 1000 + head_dim);
  }
}

TEST_P(SelectKernels, EveryNumberOfChannels) {
  for (int channels : {4, 12, 20, 32}) {
    SelectCase c;
    c.bands = {{{4, 4, 4, 8}}, {{0, 4, 0, 8}}, {{0, 0, 0, 0}}};
    c.channels = channels;
    c.cache_seqlens = {200};
    check("channels", c, 2000 + channels);
  }
}

TEST_P(SelectKernels, EveryLength) {
  for (int tokens : {0, 1, 63, 64, 65, 1025, 4200}) {
    SelectCase c;
    c.bands = {{{0, 8, 0, 0}}};
    c.cache_seqlens = {tokens, 5, 0};
    c.budget = tokens > 1000 ? 100 : 10;
    c.sink_tokens = 3;
    check("length", c, 3000 + tokens);
  }
}

TEST_P(SelectKernels, EveryGroupAndQueryLength) {
  uint64_t seed = 4000;
  for (int group : {1, 3, 5}) {
    for (int q_len : {1, 4}) {
      SelectCase c;
      c.group = group;
      c.q_len = q_len;
      c.bands = {{{0, 8, 0, 0}}};
      c.cache_seqlens = {150};
      c.dtype = q_len == 1 ? DataType::kBFloat16 : DataType::kFloat16;
      check("group", c, seed += 10);
    }
  }
}

TEST_P(SelectKernels, FewerCandidatesThanTheBudget) {
  for (int budget : {60, 66, 67, 200}) {
    SelectCase c;
    c.cache_seqlens = {70, 2};
    c.sink_tokens = 4;
    c.budget = budget;
    check("few", c, 5000 + budget);
  }
}

TEST_P(SelectKernels, EarlierOfEquals) {
  for (int budget : {1, 64, 100, 329}) {
    SelectCase c;
    c.same_codes = true;
    c.budget = budget;
    check("ties", c, 6000 + budget);
    c.rope = RopeMode::kPost;  // all tokens alike
    SelectProblem problem(c, 6500);
    const Selected got = select_on_device(problem.params(), stream());
    for (int i = 0; i < budget; ++i) ASSERT_EQ(got.slots[i], i);
  }
}

TEST_P(SelectKernels, OutliersAreSelectedBesides) {
  for (int outliers : {1, 9, 90}) {
    SelectCase c;
    c.outliers = outliers;
    c.sink_tokens = 2;
    c.cache_seqlens = {200, 40, 0};
    check("outliers", c, 7000 + outliers);
  }
}

TEST_P(SelectKernels, EveryRotation) {
  for (int half : {0, 1, 13, 32}) {
    SelectCase c;
    c.rotary_pairs = half;
    c.first_positions = {7, 200000};
    check("rotation", c, 8000 + half);
  }
}

// More than two pages a sampled one, and blocks of pages that end within.
TEST_P(SelectKernels, SampledPages) {
  SelectCase c;
  c.bands = {{{0, 4, 0, 0}}};
  c.channels = 4;
  c.cache_seqlens = {9001};
  c.sink_tokens = 70;
  check("sample", c, 8500);
}

TEST_P(SelectKernels, EveryOrderGivesTheSameSlots) {
  SelectCase c;
  c.outliers = 5;
  SelectProblem problem(c, 9000);
  const SelectParams p = problem.params();
  const Selected once = select_on_device(p, stream()), again = select_on_device(p, stream());
  EXPECT_EQ(once.slots, again.slots);
#if defined(SVDQ_EMULATED)
  emulator::Stream forward{emulator::Options{}};
  const Selected other = select_on_device(p, forward);
  EXPECT_EQ(once.slots, other.slots);
  EXPECT_EQ(once.places, other.places);
#endif
}

// Input that cannot be read gives an impossible slot, and leaves other sequences alone.
TEST_P(SelectKernels, BadLengthsAndPagesAreSaid) {
  SelectCase c;
  c.cache_seqlens = {130, 70};
  SelectProblem problem(c, 9100);
  const SelectParams good = problem.params();
  const Selected whole = select_on_device(good, stream());
  const int64_t list = good.budget + good.keys.num_outliers;
  for (int kind = 0; kind < 4; ++kind) {
    std::vector<int32_t> lengths = {130, 70},
                         table(good.keys.page_table,
                               good.keys.page_table + 2 * good.keys.table_stride);
    if (kind == 0) lengths[0] = -1;
    if (kind == 1) lengths[0] = static_cast<int>(good.keys.table_stride) * kPageTokens + 1;
    if (kind == 2) table[1] = static_cast<int>(good.keys.num_pages);
    if (kind == 3) table[2] = -5;
    SelectParams p = good;
    p.keys.cache_seqlens = lengths.data();
    p.keys.page_table = table.data();
    const Selected got = select_on_device(p, stream());
    for (int64_t i = 0; i < 2 * list; ++i) {
      const int32_t expected =
          i % list == 0 ? device::kBadSlot : std::numeric_limits<int32_t>::max();
      ASSERT_EQ(got.slots[i], expected) << kind << " " << i;
    }
    for (int64_t i = 2 * list; i < 4 * list; ++i) ASSERT_EQ(got.slots[i], whole.slots[i]) << kind;
  }
}

SVDQ_KERNEL_TESTS(SelectKernels);

}  // namespace
}  // namespace svdq
