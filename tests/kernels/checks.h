// Shared by the tests of the emulator's checks.
#pragma once

#include "tests/kernels/device_test.h"

#include "kernels/machine/device.cuh"

namespace svdq::device {

using testing::DeviceArray;

class Checks : public testing::KernelTest {
 protected:
  // The launch must fail with a message that says `what` and where.
  template <typename... Params>
  void expect_error(const char* what, const LaunchShape& shape, void (*kernel)(Params...),
                    const std::type_identity_t<Params>&... params) {
    try {
      launch("planted", shape, kernel, params...);
      FAIL() << "not caught: " << what;
    } catch (const emulator::Error& error) {
      const std::string message = error.what();
      const auto says = [&](const char* text) {
        EXPECT_NE(message.find(text), std::string::npos) << message;
      };
      says(what);
      says("kernel planted");
      if (std::string(what) == "past a buffer of") return;  // red zones are seen after the kernel
      says("block (1, 0, 0), thread ");
      says("tests/kernels/test_emulator_");
    }
  }
};

struct Plan {
  alignas(16) uint32_t words[256];
};

// Blocks 0 and 1 run; mistakes are made by block 1, so that messages must tell blocks apart.
constexpr LaunchShape shape_of(int threads) { return {2, 1, 1, threads, sizeof(Plan)}; }
inline bool second() { return block_x() == 1; }
inline uint32_t own() { return static_cast<uint32_t>(thread_index()); }

}  // namespace svdq::device
