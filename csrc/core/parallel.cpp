#include "csrc/core/parallel.h"

#include <new>

#include "kernels/format.h"

namespace svdq {

AlignedBuffer::AlignedBuffer(size_t bytes)
    : data_(::operator new(bytes ? bytes : 1, std::align_val_t{kLineBytes})) {}

AlignedBuffer::~AlignedBuffer() { ::operator delete(data_, std::align_val_t{kLineBytes}); }

}  // namespace svdq
