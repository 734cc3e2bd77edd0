// The registry of memory that kernels may touch.
#pragma once

#include <cstddef>
#include <string>

namespace svdq::emulator {

enum class Access { kRead, kWrite };

// The error of an access to global memory, or an empty string. A write is noted.
std::string check_global(const void* data, size_t bytes, Access access);

// Throws Error if a red zone of any Memory was overwritten; `name` is the kernel's.
void check_red_zones(const char* name);

}  // namespace svdq::emulator
