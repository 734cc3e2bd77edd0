// The torch-free core: errors, layouts, the paper's schedules, number formats, memory, choice of a backend.
#include <functional>
#include <limits>
#include <thread>

#include "csrc/core/bit_plan.h"
#include "csrc/core/parallel.h"
#include "tests/core/testing.h"

namespace svdq {
namespace {

using testing::layout_ints;

// Runs `fn`, which must throw Error, and returns the message.
std::string error_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no Error was thrown";
  return "";
}

TEST(Check, MessageJoinsItsParts) {
  EXPECT_EQ(error_of([] { SVDQ_CHECK(1 == 2, "expected ", 3, ", got ", 4.5); }),
            "expected 3, got 4.5");
  EXPECT_NO_THROW(SVDQ_CHECK(true, "never"));
}

TEST(Layout, OffsetsFollowTheBands) {
  const Layout layout(layout_ints(RopeMode::kPost, 96,
                                  {{{4, 8, 0, 16}}, {{0, 0, 0, 0}}, {{0, 4, 12, 0}}}, {2, 3, 4}));
  EXPECT_EQ(layout.num_heads(), 3);
  EXPECT_EQ(layout.head_dim(), 96);
  EXPECT_EQ(layout.rope(), RopeMode::kPost);
  EXPECT_EQ(layout.rank(), 28 + 0 + 16);
  EXPECT_EQ(layout.k_page_bytes(), 8 * (4 * 8 + 8 * 4 + 16) + 8 * (4 * 4 + 12 * 2));
  EXPECT_EQ(layout.v_page_bytes(), 64 * (3 + 96 * (2 + 3 + 4) / 8));
  EXPECT_TRUE(layout.packs_values());
  EXPECT_EQ(layout.value_bits(1), 3);
  const LayoutView view = layout.view();
  EXPECT_EQ(view.heads[0].first_channel, 0);
  EXPECT_EQ(view.heads[1].first_channel, 28);
  EXPECT_EQ(view.heads[2].first_channel, 28);
  EXPECT_EQ(view.heads[0].k_offset, 0);
  EXPECT_EQ(view.heads[2].k_offset, 8 * 80);
  EXPECT_EQ(view.heads[0].v_offset, 0);
  EXPECT_EQ(view.heads[1].v_offset, 64 * (1 + 96 * 2 / 8));
  EXPECT_EQ(view.heads[2].v_offset, 64 * (2 + 96 * 5 / 8));
  EXPECT_EQ(view.heads[2].value.bits, 4);
  EXPECT_EQ(view.heads[2].post.count[2], 12);
  EXPECT_EQ(view.heads[2].pre.rank(), 0);
}

TEST(Layout, PartsOfHybridPages) {
  const Layout layout(layout_ints(RopeMode::kHybrid, 96,
                                  {{{4, 8, 0, 16}}, {{0, 0, 0, 0}}, {{0, 4, 12, 0}}}, {2, 4, 3},
                                  {{{0, 4, 0, 8}}, {{0, 0, 0, 0}}, {{0, 0, 8, 0}}}));
  EXPECT_EQ(layout.rank(), 12 + 28 + 8 + 16);
  EXPECT_EQ(layout.pre_rank(), 12 + 8);
  EXPECT_EQ(layout.post_rank(), 28 + 16);
  EXPECT_EQ(layout.k_page_bytes(), 8 * (24 + 80 + 16 + 40));
  const LayoutView views[] = {layout.view(), layout.pre_view(), layout.post_view()};
  for (const LayoutView& view : views) {
    EXPECT_EQ(view.rank, layout.rank());
    EXPECT_EQ(view.k_page_bytes, layout.k_page_bytes());
    EXPECT_EQ(view.num_heads, 3);
    EXPECT_EQ(view.heads[1].value.bits, 4);
    EXPECT_EQ(view.heads[2].v_offset, 64 * (2 + 96 * 6 / 8));
  }
  EXPECT_EQ(views[1].rope, RopeMode::kPre);
  EXPECT_EQ(views[2].rope, RopeMode::kPost);
  EXPECT_EQ(views[0].heads[2].rank(), 24);
  EXPECT_EQ(views[1].heads[2].rank(), 8);
  EXPECT_EQ(views[2].heads[2].rank(), 16);
  EXPECT_EQ(views[1].heads[2].first_channel, 40);
  EXPECT_EQ(views[1].heads[2].k_offset, 8 * 104);
  EXPECT_EQ(views[2].heads[2].first_channel, 48);
  EXPECT_EQ(views[2].heads[2].k_offset, 8 * 120);
  EXPECT_EQ(views[2].heads[0].first_channel, 12);
  EXPECT_EQ(views[2].heads[0].k_offset, 8 * 24);
}

TEST(Layout, RejectsInvalidLayouts) {
  const testing::HeadBands none{{{0, 0, 0, 0}}}, some{{{8, 0, 0, 0}}};
  const std::vector<int64_t> good = layout_ints(RopeMode::kPre, 64, some);
  ASSERT_NO_THROW(Layout{good});
  struct Wrong {
    size_t index;
    int64_t number;
    const char* said;
  };
  const int64_t huge = std::numeric_limits<int64_t>::max();
  const Wrong wrongs[] = {
      {0, kFormatVersion + 1, "version"},
      {0, -1, "version"},
      {1, 0, "num_kv_heads"},
      {1, -3, "num_kv_heads"},
      {1, huge, "num_kv_heads"},
      {1, 2, "integers"},
      {2, 0, "head_dim"},
      {2, 72, "head_dim"},
      {2, 528, "head_dim"},
      {2, -64, "head_dim"},
      {2, huge, "head_dim"},
      {3, 3, "rope"},
      {3, -1, "rope"},
      {3, 1, "rope mode"},
      {4, 1, "coding"},
      {4, -1, "coding"},
      {5, 2, "coding"},
      {5, -1, "coding"},
      {5, 0, "16 or 32 bits"},
      {6, 6, "multiple of 4"},
      {6, -4, "multiple of 4"},
      {6, 68, "68"},
      {6, huge, "8 bits"},
      {9, 4, "multiple of 8"},
      {10, 4, "rope mode"},
      {14, 0, "values of 2, 3 or 4 bits"},
      {14, 5, "values of 2, 3 or 4 bits"},
      {14, 16, "values of 2, 3 or 4 bits"},
      {14, huge, "values of 2, 3 or 4 bits"},
  };
  for (const Wrong& wrong : wrongs) {
    std::vector<int64_t> ints = good;
    ints[wrong.index] = wrong.number;
    const std::string said = error_of([&] { Layout layout(ints); });
    EXPECT_NE(said.find(wrong.said), std::string::npos)
        << "integer " << wrong.index << " = " << wrong.number << ": " << said;
  }
  for (size_t length = 0; length < good.size(); ++length) {
    error_of([&] { Layout layout(std::vector<int64_t>(good.begin(), good.begin() + length)); });
  }
  std::vector<int64_t> longer = good;
  longer.push_back(0);
  error_of([&] { Layout layout(longer); });
  error_of([&] { Layout layout(layout_ints(RopeMode::kPre, 64, none)); });
  error_of([&] { Layout layout(layout_ints(RopeMode::kHybrid, 64, none)); });
  error_of([&] { Layout layout(layout_ints(RopeMode::kPre, 64, {some[0], some[0]}, {16, 32})); });
  // Each part of a hybrid head may code all channels at most.
  const testing::HeadBands all{{{64, 0, 0, 0}}}, more{{{64, 4, 0, 0}}};
  ASSERT_NO_THROW(Layout(layout_ints(RopeMode::kHybrid, 64, all, 4, all)));
  error_of([&] { Layout layout(layout_ints(RopeMode::kHybrid, 64, all, 4, more)); });
  error_of([&] { Layout layout(layout_ints(RopeMode::kHybrid, 64, more, 4, all)); });
}

TEST(BitPlan, PaperSchedules) {
  struct Plan {
    int head_dim;
    std::vector<int64_t> schedule;
    Bands bands;
  };
  const Plan plans[] = {
      {128, {8, 4, 4, 2, 0, 0, 0, 0}, {{16, 32, 16, 0}}},  // 2.25 bits a number
      {128, {4, 4, 2, 0, 0, 0, 0, 0}, {{0, 32, 16, 0}}},   // 1.25
      {64, {4, 4, 2, 0, 0, 0, 0, 0}, {{0, 16, 8, 0}}},
      {256, {8, 2, 1, 1}, {{64, 0, 64, 128}}},
      {80,
       {4, 4, 2, 0, 0, 0, 0, 0},
       {{0, 20, 12, 0}}},  // 10 channels of 2 bits end inside a line: 12
      {96, {1, 0, 0, 0, 0, 0, 0, 0}, {{0, 0, 0, 16}}},  // 12 of 1 bit likewise: 16
      {64, {8}, {{64, 0, 0, 0}}},
      {16, {8, 4, 2, 1}, {{4, 4, 4, 0}}},  // no room for 8 channels of 1 bit
  };
  for (const Plan& plan : plans) {
    const Bands bands = plan_schedule(plan.head_dim, plan.schedule);
    for (int w = 0; w < kNumWidths; ++w) {
      EXPECT_EQ(bands.count[w], plan.bands.count[w])
          << "head_dim " << plan.head_dim << ", " << kWidths[w] << " bits";
    }
  }
}

// A plan gives at least the wanted bits while there is room, and is always a valid layout.
TEST(BitPlan, EveryScheduleFits) {
  testing::Random random(2);
  for (int trial = 0; trial < 2000; ++trial) {
    const int head_dim = 16 * random.integer(1, 32);
    std::vector<int64_t> schedule(random.integer(1, 8));
    int first = random.integer(0, 3);
    for (int64_t& bits : schedule) {
      bits = first < kNumWidths ? kWidths[first] : 0;
      first = std::min(first + random.integer(0, 2), kNumWidths);
    }
    const Bands bands = plan_schedule(head_dim, schedule);
    ASSERT_NO_THROW(Layout(layout_ints(RopeMode::kPost, head_dim, {bands})));
    double wanted_bits = 0;
    for (int64_t bits : schedule)
      wanted_bits += static_cast<double>(bits * head_dim) / static_cast<double>(schedule.size());
    // At the end of the head up to 7 channels of 1 bit have no line to fill.
    EXPECT_GE(bands.bits(), wanted_bits - 7)
        << "head_dim " << head_dim << ", " << schedule.size() << " groups";
  }
}

TEST(BitPlan, RejectsInvalidSchedules) {
  const std::vector<int64_t> schedules[] = {{},   {3},    {8, 16},   {0, 0},
                                            {-1}, {4, 8}, {4, 0, 2}, std::vector<int64_t>(65, 1)};
  for (const std::vector<int64_t>& schedule : schedules)
    error_of([&] { plan_schedule(64, schedule); });
  error_of([] { plan_schedule(60, {4}); });
}

TEST(Scalar, HalfPrecisionRoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const auto half = static_cast<uint16_t>(bits), next = static_cast<uint16_t>(bits + 1);
    // The definition: a sign, 5 bits of exponent, 10 of mantissa; exponent 0 is subnormal.
    const int exponent = static_cast<int>(bits >> 10), mantissa = static_cast<int>(bits & 0x3ff);
    const double value =
        exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    ASSERT_EQ(half_to_float(half), static_cast<float>(value));
    ASSERT_EQ(half_to_float(half | 0x8000), -static_cast<float>(value));
    ASSERT_EQ(float_to_half(static_cast<float>(value)), half);
    ASSERT_EQ(float_to_half(-static_cast<float>(value)), half | 0x8000);
    if (next == 0x7c00) continue;
    const float middle = (half_to_float(half) + half_to_float(next)) / 2;
    ASSERT_EQ(float_to_half(middle), half % 2 ? next : half) << middle;
    ASSERT_EQ(float_to_half(std::nextafter(middle, 0.0f)), half);
    ASSERT_EQ(float_to_half(std::nextafter(middle, 1e9f)), next);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(float_to_half(65519.996f), 0x7bff);
  EXPECT_EQ(float_to_half(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_half(-infinity), 0xfc00);
  EXPECT_EQ(half_to_float(0x7c00), infinity);
  EXPECT_TRUE(std::isnan(half_to_float(0x7e00)));
}

TEST(Scalar, BFloat16RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7f7f; ++bits) {
    const auto low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1);
    const float below = bfloat16_to_float(low), above = bfloat16_to_float(high);
    ASSERT_EQ(float_to_bits(below), bits << 16);
    ASSERT_EQ(float_to_bfloat16(below), low);
    const auto middle =
        static_cast<float>((static_cast<double>(below) + static_cast<double>(above)) / 2);
    ASSERT_EQ(float_to_bfloat16(middle), low % 2 ? high : low);
    ASSERT_EQ(float_to_bfloat16(-std::nextafter(middle, 0.0f)), low | 0x8000);
    ASSERT_EQ(float_to_bfloat16(-std::nextafter(middle, above)), high | 0x8000);
  }
  EXPECT_EQ(float_to_bfloat16(std::numeric_limits<float>::max()), 0x7f80);
}

TEST(Parallel, SerialExecutorRunsEachTaskOnce) {
  std::vector<int> runs(100, 0);
  SerialExecutor().run(
      100,
      [](void* context, int64_t task, int worker) {
        EXPECT_EQ(worker, 0);
        ++(*static_cast<std::vector<int>*>(context))[task];
      },
      &runs);
  EXPECT_EQ(runs, std::vector<int>(100, 1));
}

TEST(Parallel, BuffersAreAligned) {
  for (size_t bytes : {0, 1, 63, 64, 1000001}) {
    AlignedBuffer buffer(bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.as<float>()) % kLineBytes, 0u);
    std::memset(buffer.as(), 1, bytes);
    EXPECT_EQ(buffer.as<uint8_t>(8), buffer.as<uint8_t>() + 8);
  }
}

TEST(Backend, EndsWithThePortableOne) {
  const auto backends = available_backends();
  ASSERT_FALSE(backends.empty());
  EXPECT_STREQ(backends.back()->name, "portable");
}

TEST(Backend, OneCanBeChosen) {
  const std::string before = current_backend().name;
  for (const Backend* backend : available_backends()) {
    set_backend(backend->name);
    EXPECT_EQ(&current_backend(), backend);
  }
  const std::string said = error_of([] { set_backend("abacus"); });
  EXPECT_NE(said.find("abacus"), std::string::npos) << said;
  EXPECT_NE(said.find("portable"), std::string::npos) << said;
  EXPECT_STREQ(current_backend().name, "portable") << "a failed choice must change nothing";
  set_backend(before);
}

}  // namespace
}  // namespace svdq
