// Runs one stage once on fixed input, for tools/count_instructions.py, which counts the instructions
// inside svdq_counted. On the AVX2 backend: valgrind knows no AVX-512.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>

#include "csrc/core/backend.h"
#include "tests/core/attend_problem.h"
#include "tests/core/gather_problem.h"
#include "tests/core/select_problem.h"

namespace {

using namespace svdq;
using namespace svdq::testing;

constexpr int kTokens = 2048, kHeads = 2, kGroup = 4, kDim = 128;
// paper-1.25 at head_dim 128.
constexpr Bands kAll = {{0, 32, 16, 0}}, kPreBands = {{0, 8, 0, 0}}, kPostBands = {{0, 24, 16, 0}};

HeadBands both(const Bands& bands) { return HeadBands(kHeads, bands); }

}  // namespace

// The name that the counter looks for.
extern "C" [[gnu::noinline, gnu::noclone]] void svdq_counted(const std::function<void()>& stage) {
  stage();
}

namespace {

void attend(const Backend& backend, RopeMode rope) {
  AttendCase c;
  c.rope = rope;
  c.head_dim = kDim;
  c.rotary_pairs = kDim / 2;
  c.bands = both(rope == RopeMode::kHybrid ? kPostBands : kAll);
  if (rope == RopeMode::kHybrid) c.pre_bands = both(kPreBands);
  c.group = kGroup;
  c.cache_seqlens = {kTokens};
  c.window_lens = {64};
  AttendProblem problem(c, 1);
  svdq_counted([&] { problem.run(backend, SerialExecutor()); });
}

void select(const Backend& backend) {
  SelectCase c;
  c.head_dim = kDim;
  c.rotary_pairs = kDim / 2;
  c.bands = both(kAll);
  c.group = kGroup;
  c.cache_seqlens = {kTokens};
  c.channels = 16;
  c.budget = kTokens / 32;
  SelectProblem problem(c, 1);
  svdq_counted([&] { problem.run(backend, SerialExecutor()); });
}

void gather(const Backend& backend) {
  GatherCase c;
  c.head_dim = kDim;
  c.bands = both(kAll);
  c.batch = 1;
  c.num_pages = kTokens / kPageTokens;
  c.num_slots = kTokens / 4;
  GatherProblem problem(c, 1);
  svdq_counted([&] { problem.run(backend, SerialExecutor()); });
}

void pack(const Backend& backend, bool keys) {
  Random random(1);
  const Layout layout(layout_ints(RopeMode::kPre, kDim, both(kAll)));
  std::vector<float> rows(int64_t{kHeads} * kTokens * kDim), scale(layout.rank(), 0.1f);
  std::vector<float> mean(kHeads * kDim, 0.0f);
  for (float& x : rows) x = static_cast<float>(random.normal());
  std::vector<uint16_t> basis(int64_t{layout.rank()} * kDim);
  for (uint16_t& x : basis) x = float_to_bfloat16(static_cast<float>(random.normal() / 8));
  std::vector<int32_t> table(kTokens / kPageTokens);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  const int64_t page_bytes = keys ? layout.k_page_bytes() : layout.v_page_bytes();
  std::vector<uint8_t> pages(table.size() * page_bytes);
  const std::vector<float> frequencies = inverse_frequencies(kDim / 2);
  const TokenSource source{rows.data(), DataType::kFloat32, int64_t{kTokens} * kDim, kDim, kTokens};
  svdq_counted([&] {
    if (keys) {
      backend.pack_keys(
          {.keys = source,
           .layout = layout.view(),
           .codec =
               {{frequencies.data(), kDim / 2}, basis.data(), scale.data(), mean.data(), nullptr},
           .position = 0,
           .pages = pages.data(),
           .page_table = table.data(),
           .slot = 0},
          SerialExecutor());
    } else {
      backend.pack_values({source, layout.view(), pages.data(), table.data(), 0}, SerialExecutor());
    }
  });
}

const std::map<std::string, std::function<void(const Backend&)>> kStages = {
    {"attend-post", [](const Backend& b) { attend(b, RopeMode::kPost); }},
    {"attend-pre", [](const Backend& b) { attend(b, RopeMode::kPre); }},
    {"attend-hybrid", [](const Backend& b) { attend(b, RopeMode::kHybrid); }},
    {"select", select},
    {"gather", gather},
    {"pack-keys", [](const Backend& b) { pack(b, true); }},
    {"pack-values", [](const Backend& b) { pack(b, false); }},
};

}  // namespace

// Without an argument: the names of the stages, and how many tokens and KV heads each counts for.
int main(int argc, char** argv) {
  if (argc < 2) {
    for (const auto& [name, run] : kStages) std::printf("%s %d\n", name.c_str(), kTokens * kHeads);
    return 0;
  }
  const auto stage = kStages.find(argv[1]);
  if (stage == kStages.end()) {
    std::fprintf(stderr, "count_stages: no stage %s; run without arguments for their names\n",
                 argv[1]);
    return 1;
  }
  svdq::set_backend("avx2");
  stage->second(svdq::current_backend());
  return 0;
}
