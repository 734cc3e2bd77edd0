// The GPU's stages as a CPU backend: the source of the CUDA kernels, emulated. Slow; for tests and
// for finding out what a model would do on a GPU, without one.
#include "csrc/core/backend.h"

#include "csrc/emulator/stream.h"
#include "csrc/gpu/attend.h"
#include "csrc/gpu/covariance.h"
#include "csrc/gpu/finite.h"
#include "csrc/gpu/gather.h"
#include "csrc/gpu/pack.h"
#include "csrc/gpu/quantizer.h"
#include "csrc/gpu/select.h"

namespace svdq::emulator {
namespace {

// Tensors of the caller are not known to the emulator, so that only accesses to shared memory and
// what threads do together are checked.
Stream make_stream(const Executor& executor) {
  emulator::Options options;
  options.check_global = false;
  options.count = false;
  options.executor = &executor;
  return Stream(options);
}

bool all_within(const TokenSource& source, int num_heads, int head_dim, float limit,
                const Executor& executor) {
  Stream stream = make_stream(executor);
  return gpu::all_within(source, num_heads, head_dim, limit, stream);
}

void covariance(const CovarianceParams& params, const Executor& executor) {
  Stream stream = make_stream(executor);
  gpu::covariance(params, stream);
}

void fit_quantizer(const QuantizerParams& params, const Executor& executor) {
  Stream stream = make_stream(executor);
  gpu::fit_quantizer(params, stream);
}

void pack_keys(const PackKeysParams& params, const Executor& executor) {
  Stream stream = make_stream(executor);
  gpu::pack_keys(params, stream);
}

void pack_values(const PackValuesParams& params, const Executor& executor) {
  Stream stream = make_stream(executor);
  gpu::pack_values(params, stream);
}

void select(const SelectParams& params, const Executor& executor) {
  Stream stream = make_stream(executor);
  gpu::select(params, stream);
}

void gather(const GatherParams& params, const Executor& executor) {
  Stream stream = make_stream(executor);
  gpu::gather(params, stream);
}

void attend(const AttendParams& params, const Executor& executor) {
  Stream stream = make_stream(executor);
  gpu::attend(params, stream);
}

void merge(const MergeParams& params, const Executor& executor) {
  Stream stream = make_stream(executor);
  gpu::merge(params, stream);
}

}  // namespace

extern const Backend kBackend;
const Backend kBackend = {"emulated", [] { return true; }, all_within, covariance, fit_quantizer,
                          pack_keys,  pack_values,         select,     gather,     attend,
                          merge};

}  // namespace svdq::emulator
