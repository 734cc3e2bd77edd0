// The attend kernels for many query rows against plain loops in double, over query lengths, groups,
// widths, head dims, lengths and cuts.
#include "tests/emu/attend_test.h"

namespace svdq {
namespace {

using gpu::AttendCut;
using testing::AttendCase;

class AttendTiles : public testing::AttendTest {
 protected:
  // As planned, and the kernels that shall have run did.
  void check_planned(const char* what, const AttendCase& c, uint64_t stream) {
    check(what, c, stream, nullptr);
  }

  // A small problem whose queries, outputs and exact rows are halves.
  static AttendCase halves(int q_len, int group) {
    AttendCase c;
    c.q_len = q_len;
    c.group = group;
    c.dtype = c.exact_dtype = DataType::kFloat16;
    c.bands = {{{0, 8, 4, 8}}};
    c.cache_seqlens = {70};
    c.exact_lens = {q_len + 3};
    return c;
  }
};

TEST_P(AttendTiles, EveryShortQuery) {
  for (int q_len = 1; q_len <= 16; ++q_len) check_planned("q_len", halves(q_len, 4), 100 + q_len);
}

SVDQ_KERNEL_TESTS(AttendTiles);

}  // namespace
}  // namespace svdq
