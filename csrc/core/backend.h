// A backend is a row: one function per stage. All backends read and write the same bytes.
#pragma once

#include <string>
#include <vector>

#include "csrc/core/parallel.h"
#include "csrc/core/gpu_context.h"
#include "kernels/step_params.h"

namespace svdq {

// Resources of one call that the host program brings: threads for rows of the CPU, a stream and scratch
// memory for those of a device.
class Context {
 public:
  Context(const Executor& executor) : executor_(&executor) {}
  Context(const GpuContext& gpu) : gpu_(&gpu) {}

  const Executor& executor() const { return *executor_; }
  const GpuContext& gpu() const { return *gpu_; }

 private:
  const Executor* executor_ = nullptr;
  const GpuContext* gpu_ = nullptr;
};

// Device of a row's tensors.
enum class DeviceKind { kCpu, kCuda };

// Stages queue their work on a CUDA stream and return; all_finite and components wait for an answer.
// Pointers are to memory of the row's device, except for `layout.heads` and the page tables of the pack
// and unpack stages, which lie on the host.
struct Backend {
  const char* name;
  DeviceKind device;
  bool (*available)();  // true if this machine runs it
  bool (*all_finite)(const FiniteParams&, const Context&);
  void (*covariance)(const CovarianceParams&, const Context&);
  void (*components)(const ComponentsParams&, const Context&);  // null: the host program solves
  void (*fit_quantizer)(const QuantizerParams&, const Context&);
  void (*pack_keys)(const PackKeysParams&, const Context&);
  void (*pack_values)(const PackValuesParams&, const Context&);
  void (*unpack_codes)(const UnpackCodesParams&, const Context&);
  void (*unpack_keys)(const UnpackKeysParams&, const Context&);
  void (*unpack_values)(const UnpackValuesParams&, const Context&);
  void (*select)(const SelectParams&, const Context&);
  void (*gather)(const GatherParams&, const Context&);
  void (*attend)(const AttendParams&, const Context&);
  void (*merge)(const MergeParams&, const Context&);
  void (*decode_step)(const DecodeStepParams&,
                      const Context&);  // null: the host program makes it of other stages
};

// A stage that takes an executor, as a row has it.
template <auto kStage>
struct OnExecutor;
template <typename Result, typename Params, Result (*kStage)(const Params&, const Executor&)>
struct OnExecutor<kStage> {
  static Result run(const Params& params, const Context& context) {
    return kStage(params, context.executor());
  }
};
template <auto kStage>
inline constexpr auto on_executor = &OnExecutor<kStage>::run;

// Adds a row to the table, behind those of the CPU targets, which are there from the start. Rows of the
// emulator and of CUDA are added by the program that links them.
void add_backend(const Backend& backend);

// Rows of the CPU that run here, best first.
std::vector<const Backend*> available_backends();

// The row of the CPU in use: the best one, or the one that the environment variable SVDQ_BACKEND
// names. Throws Error if that one does not exist or does not run here.
const Backend& current_backend();

// Uses another row of the CPU from now on; throws Error like current_backend.
void set_backend(const std::string& name);

// The row of CUDA devices; null where none was added.
const Backend* cuda_backend();

}  // namespace svdq
