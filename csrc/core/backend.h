// A backend is a table of functions, one per stage. All backends read and write the same bytes.
#pragma once

#include <string>
#include <vector>

#include "csrc/core/parallel.h"
#include "kernels/params.h"

namespace svdq {

struct Backend {
  const char* name;
  bool (*available)();  // does this machine run it?
  // Is every number finite and at most `limit` in magnitude?
  bool (*all_within)(const TokenSource&, int num_heads, int head_dim, float limit, const Executor&);
  void (*covariance)(const CovarianceParams&, const Executor&);
  void (*fit_quantizer)(const QuantizerParams&, const Executor&);
  void (*pack_keys)(const PackKeysParams&, const Executor&);
  void (*pack_values)(const PackValuesParams&, const Executor&);
  void (*select)(const SelectParams&, const Executor&);
  void (*gather)(const GatherParams&, const Executor&);
  void (*attend)(const AttendParams&, const Executor&);
  void (*merge)(const MergeParams&, const Executor&);
};

// CPU backends that run here, best first; "emulated", the CUDA kernels run by csrc/emu, comes last
// where it was built.
std::vector<const Backend*> available_backends();

// The backend in use: the best one, or the one that the environment variable SVDQ_BACKEND names.
// Throws Error if that one does not exist or does not run here.
const Backend& current_backend();

// Uses another backend from now on; throws Error like current_backend.
void set_backend(const std::string& name);

}  // namespace svdq
