#include "tests/kernels/attend_emulated.h"

namespace svdq::gpu {

template void attend_class<64>(const AttendParams&, const AttendTiling*, emulator::Stream&,
                               const StepParams*);
template void attend_class<128>(const AttendParams&, const AttendTiling*, emulator::Stream&,
                                const StepParams*);
template void attend_class<256>(const AttendParams&, const AttendTiling*, emulator::Stream&,
                                const StepParams*);
template void attend_class<512>(const AttendParams&, const AttendTiling*, emulator::Stream&,
                                const StepParams*);

}  // namespace svdq::gpu
