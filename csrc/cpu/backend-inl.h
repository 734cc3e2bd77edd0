// The row of a CPU target in the table of backends. A target is a file that defines SVDQ_TARGET (bits of a
// vector) and SVDQ_TARGET_NAME (its namespace), includes this header and names the row's check.
#pragma once

#include "csrc/core/backend.h"
#include "csrc/core/unpack.h"
#include "csrc/cpu/attend/attend-inl.h"
#include "csrc/cpu/attend/merge-inl.h"
#include "csrc/cpu/fit/covariance-inl.h"
#include "csrc/cpu/fit/finite-inl.h"
#include "csrc/cpu/fit/quantizer-inl.h"
#include "csrc/cpu/pack/pack_keys-inl.h"
#include "csrc/cpu/pack/pack_values-inl.h"
#include "csrc/cpu/select/gather-inl.h"
#include "csrc/cpu/select/select-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

constexpr Backend make_backend(const char* name, bool (*available)()) {
  return {
      .name = name,
      .device = DeviceKind::kCpu,
      .available = available,
      .all_finite = on_executor<all_finite>,
      .covariance = on_executor<covariance>,
      .components = nullptr,
      .fit_quantizer = on_executor<fit_quantizer>,
      .pack_keys = on_executor<pack_keys>,
      .pack_values = on_executor<pack_values>,
      .unpack_codes = on_executor<svdq::unpack_codes>,
      .unpack_keys = on_executor<svdq::unpack_keys>,
      .unpack_values = on_executor<svdq::unpack_values>,
      .select = on_executor<select>,
      .gather = on_executor<gather>,
      .attend = on_executor<attend>,
      .merge = on_executor<merge>,
      .decode_step = nullptr,
  };
}

}  // namespace svdq::SVDQ_TARGET_NAME
