// Instruction sets that both the processor and the operating system support.
#pragma once

namespace svdq {

bool cpu_has_avx2();    // AVX2, FMA and F16C
bool cpu_has_avx512();  // the above and AVX-512 F, BW, DQ, VL and VNNI

}  // namespace svdq
