// The GPU's stages as a CPU backend: the source of the CUDA kernels, emulated. Slow; for tests and
// for finding out what a model would do on a GPU, without one.
#include "csrc/core/backend.h"

#include "csrc/emulated/queue.h"
#include "csrc/gpu/attend.h"
#include "csrc/gpu/basis.h"
#include "csrc/gpu/check.h"
#include "csrc/gpu/gather.h"
#include "csrc/gpu/pack.h"
#include "csrc/gpu/quantizer.h"
#include "csrc/gpu/select.h"

namespace svdq::emulated {
namespace {

// Tensors of the caller are not known to the emulator, so that only accesses to shared memory and
// what threads do together are checked.
Queue make_queue(const Executor& executor) {
  emu::Options options;
  options.check_global = false;
  options.count = false;
  options.executor = &executor;
  return Queue(options);
}

bool all_within(const TokenSource& source, int num_heads, int head_dim, float limit,
                const Executor& executor) {
  Queue queue = make_queue(executor);
  return gpu::all_within(source, num_heads, head_dim, limit, queue);
}

void covariance(const CovarianceParams& params, const Executor& executor) {
  Queue queue = make_queue(executor);
  gpu::covariance(params, queue);
}

void fit_quantizer(const QuantizerParams& params, const Executor& executor) {
  Queue queue = make_queue(executor);
  gpu::fit_quantizer(params, queue);
}

void pack_keys(const PackKeysParams& params, const Executor& executor) {
  Queue queue = make_queue(executor);
  gpu::pack_keys(params, queue);
}

void pack_values(const PackValuesParams& params, const Executor& executor) {
  Queue queue = make_queue(executor);
  gpu::pack_values(params, queue);
}

void select(const SelectParams& params, const Executor& executor) {
  Queue queue = make_queue(executor);
  gpu::select(params, queue);
}

void gather(const GatherParams& params, const Executor& executor) {
  Queue queue = make_queue(executor);
  gpu::gather(params, queue);
}

void attend(const AttendParams& params, const Executor& executor) {
  Queue queue = make_queue(executor);
  gpu::attend(params, queue);
}

void merge(const MergeParams& params, const Executor& executor) {
  Queue queue = make_queue(executor);
  gpu::merge(params, queue);
}

}  // namespace

extern const Backend kBackend;
const Backend kBackend = {"emulated", [] { return true; }, all_within, covariance, fit_quantizer,
                          pack_keys,  pack_values,         select,     gather,     attend,
                          merge};

}  // namespace svdq::emulated
