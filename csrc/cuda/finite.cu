#include "csrc/gpu/finite.h"

#include "csrc/cuda/stream.cuh"
#include "csrc/cuda/stages.h"

namespace svdq::cuda {

bool all_within(const TokenSource& source, int num_heads, int head_dim, float limit,
                const GpuContext& context) {
  const Range range("svdq.all_within");
  Stream stream(context);
  return gpu::all_within(source, num_heads, head_dim, limit, stream);
}

}  // namespace svdq::cuda
