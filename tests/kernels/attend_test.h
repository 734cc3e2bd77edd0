// Shared by the tests of the attend kernels: a problem made of random pages and rows, run on the
// device and compared with plain loops in double.
#pragma once

#include <set>

#include "tests/kernels/attend_device.h"

#include "tests/core/attend_problem.h"
#include "tests/kernels/attend_reference.h"

namespace svdq::testing {

// The parameters that AttendProblem hands to a backend; memory belongs to the problem.
inline AttendParams captured_params(AttendProblem& problem) {
  static AttendParams captured;
  Backend backend{};
  backend.name = "capture";
  backend.attend = [](const AttendParams& p, const Context&) { captured = p; };
  problem.run(backend, SerialExecutor());
  return captured;
}

class AttendTest : public KernelTest {
 protected:
#if defined(SVDQ_EMULATED)
  // Pages are read without bank conflicts, and packed data in whole sectors.
  void observe(const char* name, const emulator::Counters& counters) override {
    KernelTest::observe(name, counters);
    launched_.insert(name);
    if (std::string(name) == "attend_window") return;
    if (std::string(name).find("attend_") != 0) return;
    for (const auto& site : counters.sites) {
      if (site.transfers != site.ideal && (site.shared || site.width == 16))
        ADD_FAILURE() << name << ": " << site.transfers << " instead of " << site.ideal << ", "
                      << site.where();
    }
  }
#endif

  std::set<std::string> launched_;  // names of kernels, under emulation

  AttendAnswer run(const AttendParams& p, const gpu::AttendTiling* tiling) {
    return attend_on_device(p, tiling, stream());
  }

  // Every RoPE mode; `cut` null: as planned.
  void check(const char* what, const AttendCase& given, uint64_t stream,
             const gpu::AttendTiling* tiling) {
    for (const AttendCase& c : in_every_mode(given)) {
      check_mode(what, c, stream, tiling);
      if (HasFatalFailure()) return;
    }
  }

  void check_mode(const char* what, const AttendCase& c, uint64_t stream,
                  const gpu::AttendTiling* tiling) {
    SCOPED_TRACE(::testing::Message() << what << ", stream " << stream << ", " << mode_of(c));
    AttendProblem problem(c, stream);
    const AttendParams p = captured_params(problem);
    const AttendAnswer got = run(p, tiling);
    const AttendReference reference(p);
    const int64_t rows = device::query_rows(p);
    int64_t row = 0;
    for (int b = 0; b < p.keys.batch; ++b) {
      for (int h = 0; h < p.keys.layout.num_heads; ++h) {
        for (int64_t r = 0; r < rows; ++r, ++row) {
          const auto where = [&] {
            return ::testing::Message() << "sequence " << b << " KV head " << h << " row " << r;
          };
          const Expected expected = reference.row(b, h, r);
          if (std::isinf(expected.lse)) {
            ASSERT_EQ(got.lse[row], expected.lse) << where();
          } else {
            ASSERT_NEAR(got.lse[row], expected.lse, expected.lse_tolerance) << where();
          }
          for (int d = 0; d < c.head_dim; ++d) {
            const double out =
                read_number(&got.out[(row * c.head_dim + d) * size_of(c.dtype)], c.dtype);
            ASSERT_NEAR(out, expected.out[d], expected.tolerance[d]) << where() << " channel " << d;
          }
        }
      }
    }
  }
};

}  // namespace svdq::testing
