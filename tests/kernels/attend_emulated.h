// The emulated attend stage is compiled once for all tests, in attend_emulated.cpp; nvcc's build takes that of
// csrc/cuda in the same way.
#pragma once

#include "csrc/emulator/stream.h"
#include "csrc/gpu/step.h"

namespace svdq::gpu {

extern template void attend_class<64>(const AttendParams&, const AttendTiling*, emulator::Stream&,
                                      const StepParams*);
extern template void attend_class<128>(const AttendParams&, const AttendTiling*, emulator::Stream&,
                                       const StepParams*);
extern template void attend_class<256>(const AttendParams&, const AttendTiling*, emulator::Stream&,
                                       const StepParams*);
extern template void attend_class<512>(const AttendParams&, const AttendTiling*, emulator::Stream&,
                                       const StepParams*);

}  // namespace svdq::gpu
