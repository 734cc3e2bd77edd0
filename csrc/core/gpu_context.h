// Resources that a caller gives to a stage on a GPU.
#pragma once

#include <cstdint>

namespace svdq {

struct GpuContext {
  void* stream;          // cudaStream_t that all work is queued on
  int num_sms;           // multiprocessors
  int max_shared_bytes;  // that a block may have
  // Uninitialised device memory, aligned to 256 bytes, for work queued on the stream from now on;
  // `owner` gives it back once the stage has queued its work.
  void* (*allocate)(void* owner, int64_t bytes);
  void* owner;
};

}  // namespace svdq
