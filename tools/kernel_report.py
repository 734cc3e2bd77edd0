"""ptxas's report of each compiled kernel, and how the stages launch them."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/cpp"
LAUNCHES = BUILD / "svdq_launches"

# CUDA C++ Programming Guide, "Compute Capabilities": bytes of shared memory that a block may have
# and that a multiprocessor has, registers, warps and blocks of a multiprocessor.
KIB = 1024
BLOCK_SHARED = dict.fromkeys(("86", "89", "120"), 99 * KIB)
BLOCK_SHARED |= {"80": 163 * KIB, "90": 227 * KIB, "100": 227 * KIB}
SM_SHARED = {arch: block + KIB for arch, block in BLOCK_SHARED.items()}
SM_REGISTERS = 65536
SM_WARPS = {"80": 64, "86": 48, "89": 48, "90": 64, "100": 64, "120": 48}
SM_BLOCKS = {"80": 32, "86": 16, "89": 24, "90": 32, "100": 32, "120": 24}


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    symbol: str
    object: Path
    arch: str
    registers: int
    stack: int
    spills: int  # bytes stored
    static_shared: int

    def blocks_per_sm(self, threads: int, dynamic_shared: int) -> int:
        """Blocks that fit by registers (a warp takes multiples of 256), shared memory (the system
        takes 1 KiB a block), warps and blocks."""
        warps = -(-threads // 32)
        warp_registers = -(-self.registers * 32 // 256) * 256
        shared = KIB + -(-(self.static_shared + dynamic_shared) // 128) * 128
        return min(
            SM_REGISTERS // warp_registers // warps,
            SM_SHARED[self.arch] // shared,
            SM_WARPS[self.arch] // warps,
            SM_BLOCKS[self.arch],
        )


def demangle(names: list[str]) -> list[str]:
    said = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return said.stdout.splitlines()


def short(name: str) -> str:
    """The kernel's name without namespaces, parameters and repetitions in template lists."""
    name = re.sub(r"\(svdq::DataType\)(\d)", lambda m: ("fp32", "bf16", "fp16")[int(m[1])], name)
    name = re.sub(r"\(.*\)$", "", name).removeprefix("void ")
    name = re.sub(r"svdq::(device::)?|_kernel", "", name).replace(" >", ">")
    name = re.sub(r"((Reconstructed|Hybrid)\w+<[^<>]*), false>", r"\1>", name)
    return re.sub(r"((Reconstructed|Hybrid)\w+<[^<>]*), true>", r"\1, gathered>", name)


def read_build() -> dict:
    """The compiler, architectures and objects, as build_tools/cuda.cmake wrote them."""
    path = BUILD / "cuda.json"
    if not path.exists():
        raise SystemExit(f"csrc/cuda is not compiled: no {path}; see `make cuda-check`")
    return json.loads(path.read_text())


def read_logs() -> list[Kernel]:
    """The kernels of csrc/cuda as the latest build compiled them."""
    found = []
    for name in read_build()["objects"]:
        if not name.endswith(".cu.o"):
            continue
        log = Path(f"{name}.log")
        if not log.exists():
            raise SystemExit(f"{Path(name).stem} is not compiled: no {log}")
        pattern = (
            r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame,"
            r" (\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)"
        )
        for m in re.finditer(pattern, log.read_text(), re.S):
            shared = re.search(r"(\d+) bytes smem", m[6])
            static = int(shared[1]) if shared else 0
            numbers = (int(m[5]), int(m[3]), int(m[4]), static)
            found.append((m[1], Path(name), m[2], *numbers))
    names = demangle([kernel[0] for kernel in found])
    return [Kernel(name, *kernel) for name, kernel in zip(names, found, strict=True)]


def read_launches() -> list[dict]:
    """The launches of the stages, by shape and by device."""
    said = subprocess.run([str(LAUNCHES)], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in said.stdout.splitlines()]
