// Runs the blocks of a launch, one after another or on the threads of an executor.
#include "csrc/core/error.h"
#include "csrc/emulator/block.h"

namespace svdq::emulator {

Counters run_grid(const Options& options, const char* name, Dim3 grid, int threads, int smem_bytes,
                  const std::function<void()>& body) {
  const auto refuse = [&](const auto&... parts) {
    throw Error(join("kernel ", name, ": ", parts...));
  };
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
    refuse("the grid is (", grid.x, ", ", grid.y, ", ", grid.z, ")");
  if (threads < 1 || threads > 1024) refuse(threads, " threads in a block");
  if (smem_bytes < 0 || smem_bytes > options.shared_limit)
    refuse(smem_bytes, " bytes of shared memory, the limit is ", options.shared_limit);
  if (options.count && options.executor) refuse("counting takes blocks one after another");
  const Launch launch{options, name, grid, threads, smem_bytes, body};
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const auto run = [&](int64_t block, std::mt19937_64& random, Recorder& recorder) {
    thread_local std::vector<std::unique_ptr<Stack>> stacks;
    const auto of = [&](int64_t by, int count) { return static_cast<int>(block / by % count); };
    const Dim3 index{of(1, grid.x), of(grid.x, grid.y), of(int64_t{grid.x} * grid.y, grid.z)};
    Block(launch, index, stacks, random, recorder).run();
  };
  Counters counters;
  if (options.executor) {
    const auto task = [&](int64_t block) {
      std::mt19937_64 random(options.seed + static_cast<uint64_t>(block));
      Counters unused;
      Recorder recorder(unused);
      run(block, random, recorder);
    };
    options.executor->run(
        blocks,
        [](void* context, int64_t block, int) { (*static_cast<decltype(task)*>(context))(block); },
        const_cast<void*>(static_cast<const void*>(&task)));
  } else {
    std::mt19937_64 random(options.seed);
    Recorder recorder(counters);
    for (int64_t block = 0; block < blocks; ++block) run(block, random, recorder);
  }
  check_red_zones(name);
  return counters;
}

}  // namespace svdq::emulator
