// What no device could launch is refused with its name and the limit, before it is launched.
#include "tests/kernels/device_test.h"

#include "csrc/gpu/stream.h"

namespace svdq {
namespace {

constexpr gpu::DeviceLimits kLimits{2, 101376};

TEST(Launches, TakeTheLargestLaunch) {
  EXPECT_NO_THROW(gpu::check_launch("kernel", {1 << 30, 65535, 65535, 128, 101376}, kLimits));
}

TEST(Launches, RefuseGridsBeyondCuda) {
  for (const device::LaunchShape& shape : {device::LaunchShape{1, 65536, 1, 32, 0},
                                           {1, 1, 65536, 32, 0},
                                           {0, 1, 1, 32, 0},
                                           {1, 1, -1, 32, 0}}) {
    try {
      gpu::check_launch("kernel", shape, kLimits);
      FAIL() << shape.grid_x << " " << shape.grid_y << " " << shape.grid_z;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("kernel would take a grid of"), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("65535"), std::string::npos);
    }
  }
}

TEST(Launches, RefuseSharedMemoryBeyondTheDevice) {
  EXPECT_THROW(gpu::check_launch("kernel", {1, 1, 1, 32, 101377}, kLimits), Error);
}

TEST(Launches, RefuseUnalignedPages) {
  alignas(16) const char data[32] = {};
  EXPECT_NO_THROW(gpu::check_aligned(data + 16, "k_pages"));
  EXPECT_THROW(gpu::check_aligned(data + 8, "k_pages"), Error);
}

}  // namespace
}  // namespace svdq
