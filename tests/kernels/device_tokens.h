// Keys and values where kernels can reach them, with the strides of the host's.
#pragma once

#include "tests/kernels/device_test.h"

#include "tests/core/testing.h"

namespace svdq::testing {

class DeviceTokens {
 public:
  // Tokens lie outermost in `tokens`, so the last one ends the memory. `first_channel` leaves
  // channels out at the front of each row, so that rows start where no vector may.
  explicit DeviceTokens(const Tokens& tokens, int first_channel = 0)
      : source_(tokens.source()), memory_(copy(source_)) {
    source_.data = memory_.data() + first_channel * size_of(source_.dtype);
  }

  const TokenSource& source() const { return source_; }

 private:
  static std::vector<uint8_t> copy(const TokenSource& source) {
    const auto* bytes = static_cast<const uint8_t*>(source.data);
    return {bytes, bytes + source.num_tokens * source.token_stride * size_of(source.dtype)};
  }

  TokenSource source_;
  DeviceArray<uint8_t> memory_;
};

}  // namespace svdq::testing
