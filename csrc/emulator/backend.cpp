#include "csrc/emulator/backend.h"

#include "csrc/emulator/stream.h"
#include "csrc/gpu/attend.h"
#include "csrc/gpu/backend.h"
#include "csrc/gpu/covariance.h"
#include "csrc/gpu/finite.h"
#include "csrc/gpu/gather.h"
#include "csrc/gpu/pack.h"
#include "csrc/gpu/quantizer.h"
#include "csrc/gpu/select.h"
#include "csrc/gpu/step.h"
#include "csrc/gpu/unpack.h"

namespace svdq::emulator {
namespace {

// The emulator does not know the caller's tensors, so only accesses to shared memory and the order of
// threads are checked.
class CallStream : public Stream {
 public:
  CallStream(const Context& context, const char*) : Stream(options(context.executor())) {}

 private:
  static Options options(const Executor& executor) {
    Options options;
    options.check_global = false;
    options.count = false;
    options.executor = &executor;
    return options;
  }
};

}  // namespace

const Backend& backend() {
  static constexpr Backend kRow = [] {
    Backend row = gpu::make_backend<CallStream>("emulated", DeviceKind::kCpu, [] { return true; });
    row.components = nullptr;  // the solver of the host program is much faster
    return row;
  }();
  return kRow;
}

}  // namespace svdq::emulator
