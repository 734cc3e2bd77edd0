"""Check the compiled kernels of csrc/cuda: no kernel may spill registers or use local memory
without a reason stated here, and every launch must fit the shared memory of every architecture and
CUDA's limit on arguments. Reads ptxas's reports of the latest build and runs svdq_launches.
"""

import sys
from collections import defaultdict

from kernel_report import BLOCK_SHARED, read_build, read_launches, read_logs, short

# Bytes of stack that a kernel may use, and the reason.
SINCOS = (32, "sincosf reduces angles above 105615 by a table on the stack")
STACK = {"rotations": SINCOS, "prepare": SINCOS, "begin_step": SINCOS}
MAX_ARGUMENT_BYTES = 4096


def main() -> None:
    kernels = read_logs()
    launches = read_launches()
    architectures = read_build()["architectures"]
    failures = []

    of_kernel = defaultdict(list)
    for kernel in kernels:
        of_kernel[kernel.name].append(kernel)
        allowed, _ = STACK.get(short(kernel.name).split("<")[0], (0, ""))
        where = f"{short(kernel.name)} on sm_{kernel.arch}"
        if kernel.spills:
            failures.append(f"{where} spills {kernel.spills} bytes of registers")
        if kernel.stack > allowed:
            failures.append(f"{where} uses {kernel.stack} bytes of local memory, {allowed} allowed")
    for name, compiled in of_kernel.items():
        missing = set(architectures) - {kernel.arch for kernel in compiled}
        if missing:
            failures.append(f"{short(name)} is not compiled for sm_{', sm_'.join(sorted(missing))}")

    most_shared = defaultdict(int)
    for launch in launches:
        if launch["argument_bytes"] > MAX_ARGUMENT_BYTES:
            failures.append(f"{launch['launch']} passes {launch['argument_bytes']} bytes")
        if launch["kernel"] not in of_kernel:
            failures.append(f"{short(launch['kernel'])} is launched but not compiled")
        for kernel in of_kernel[launch["kernel"]]:
            limit = BLOCK_SHARED.get(kernel.arch)
            if limit != launch["limit"]:
                continue
            shared = kernel.static_shared + launch["dynamic"]
            most_shared[kernel.arch] = max(most_shared[kernel.arch], shared)
            if shared > limit:
                failures.append(
                    f"{short(kernel.name)} takes {shared} bytes of shared memory on"
                    f" sm_{kernel.arch}, which gives {limit} ({launch['shape']})"
                )

    for arch in architectures:
        compiled = {k.name: k for k in kernels if k.arch == arch}.values()
        if not compiled:
            continue
        widest = max(compiled, key=lambda k: k.registers)
        print(
            f"sm_{arch}: {len(compiled)} kernels, {sum(k.spills > 0 for k in compiled)} spill; at"
            f" most {widest.registers} registers ({short(widest.name)}) and {most_shared[arch]} of"
            f" {BLOCK_SHARED[arch]} bytes of shared memory"
        )
    for name, (size, reason) in STACK.items():
        print(f"{name}: {size} bytes of local memory: {reason}")
    if failures:
        sys.exit("\n".join(dict.fromkeys(failures)))
    print(f"{len(of_kernel)} kernels and {len(launches)} launches passed")


if __name__ == "__main__":
    main()
