#include "csrc/cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#endif

namespace svdq {

#if defined(__x86_64__)
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

bool has(unsigned word, int bit) { return word >> bit & 1; }

// Register state that the operating system saves (XCR0); 0 where it does not say.
uint64_t saved_state() {
  if (!has(cpuid(1).ecx, 27)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

constexpr uint64_t kYmmState = 0x6;
constexpr uint64_t kZmmState = 0xe6;

}  // namespace

bool cpu_has_avx2() {
  const Registers one = cpuid(1), seven = cpuid(7);
  return (saved_state() & kYmmState) == kYmmState && has(one.ecx, 12) && has(one.ecx, 29) &&
         has(seven.ebx, 5);
}

bool cpu_has_avx512() {
  const Registers seven = cpuid(7);
  return cpu_has_avx2() && (saved_state() & kZmmState) == kZmmState && has(seven.ebx, 16) &&
         has(seven.ebx, 17) && has(seven.ebx, 30) && has(seven.ebx, 31) && has(seven.ecx, 11);
}
#else
bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
#endif

}  // namespace svdq
