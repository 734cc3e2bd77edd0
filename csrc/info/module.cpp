// The extension module svdq_bench._info: facts about this build and machine. It links no torch, whose
// import takes longer than the command `svdq info` may.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "csrc/core/backend.h"
#if defined(SVDQ_WITH_EMULATION)
#include "csrc/emulator/backend.h"
#endif

PYBIND11_MODULE(_info, m) {
  using namespace svdq;
  m.doc() = "Facts about this build and machine, without torch";
  m.attr("FORMAT_VERSION") = kFormatVersion;
  m.attr("PAGE_TOKENS") = kPageTokens;
#if defined(SVDQ_WITH_CUDA)
  m.attr("BUILT_WITH_CUDA") = true;
#else
  m.attr("BUILT_WITH_CUDA") = false;
#endif
#if defined(SVDQ_WITH_EMULATION)
  add_backend(emulator::backend());
#endif
  m.def(
      "backends",
      [] {
        std::vector<std::string> names;
        for (const Backend* backend : available_backends()) names.emplace_back(backend->name);
        return names;
      },
      "CPU backends that run on this machine, best first.");
  m.def(
      "backend", [] { return std::string(current_backend().name); },
      "Name of the CPU backend that svdq would use; raises ValueError for a wrong SVDQ_BACKEND.");
}
