"""Renew the tables of docs/cuda.md about the compiled kernels: registers, shared memory and
occupancy by architecture, the cost of a token in the page loop of attend, and an estimate of its
time.

``python tools/resource_table.py [emulator]``: reads ptxas's reports and the SASS of the latest
build (`make cuda-check`). The cost of a token is counted by running build/cpp/svdq_cuda_tests under
a PTX emulator (the command that starts it; build/ptx-emulator/ptxsim by default); without one those
tables stay.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kernel_report import (
    BLOCK_SHARED,
    BUILD,
    ROOT,
    Kernel,
    read_build,
    read_launches,
    read_logs,
    short,
)

DOCS = ROOT / "docs/cuda.md"
TESTS = BUILD / "svdq_cuda_tests"
SHAPE = "head_dim 128, 4-bit values"
KV_HEADS = 8
CASE = (
    f"head_dim=128 kv_heads={KV_HEADS} group=4 bands=0:32:16:0 v_bits=4 dtype=bf16 exact=24"
    " split_pages=64"
)
LENGTHS = (1024, 2048)  # one block a head takes either; their difference is the page loop alone


@dataclass(frozen=True)
class Device:
    """Peak rates, from NVIDIA's architecture white papers.

    A multiprocessor of all three issues 4 warp instructions a cycle, of which its integer units
    (64 lanes) take 2 (CUDA C++ Programming Guide, "Arithmetic Instructions"), and moves one
    wavefront of shared memory.
    """

    name: str
    arch: str
    num_sms: int
    clock_hz: float  # boost
    bytes_per_s: float
    mma_flops: float  # halves, float sums, dense


DEVICES = (
    Device("A100 SXM 80 GB", "80", 108, 1.41e9, 2.039e12, 312e12),
    Device("RTX 4090", "89", 128, 2.52e9, 1.008e12, 165.2e12),
    # mma.sync reaches 62 % of the peak, which needs wgmma (arXiv 2402.13499, table 8).
    Device("H100 SXM", "90", 132, 1.83e9, 3.352e12, 0.62 * 989e12),
)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def resources(kernels: list[Kernel], launches: list[dict]) -> str:
    """The table of registers, shared memory (KiB) and warps a multiprocessor, by architecture."""
    architectures = read_build()["architectures"]
    by_name = {(kernel.name, kernel.arch): kernel for kernel in kernels}
    rows = {}
    for launch in launches:
        if SHAPE not in launch["shape"]:
            continue
        for arch in architectures:
            kernel = by_name.get((launch["kernel"], arch))
            if kernel is None:
                raise SystemExit(f"{short(launch['kernel'])} is not compiled for sm_{arch}")
            if BLOCK_SHARED[arch] != launch["limit"]:
                continue
            threads, dynamic = launch["threads"], launch["dynamic"]
            blocks = kernel.blocks_per_sm(threads, dynamic)
            shared = (kernel.static_shared + dynamic) / 1024
            row = rows.setdefault(f"`{short(launch['kernel'])}`", {"threads": str(threads)})
            row[arch] = f"{kernel.registers} · {shared:.1f} · {blocks * threads // 32}"
    head = ["kernel", "threads", *(f"sm_{arch}" for arch in architectures)]
    columns = ("threads", *architectures)
    return table(head, [[name, *(row[c] for c in columns)] for name, row in sorted(rows.items())])


def count(emulator: str, rope: str, length: int, q_len: int) -> list[dict]:
    """Counters of the launches of one attend call."""
    tiles = 1 if q_len <= 2 else q_len // 2  # of 8 rows, 4 a query token
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        environment = os.environ | {
            "SVDQ_TEST_CASE": f"{CASE} kv_len={length} rope={rope} q_len={q_len} tiles={tiles}",
            "PTXSIM_REPORT": str(report),
            "PTXSIM_PRELOAD_ALL": "1",
        }
        command = [emulator, str(TESTS), "--gtest_filter=AttendKernels.Chosen*"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return [json.loads(line) for line in report.read_text().splitlines()]


def flat(launch: dict) -> dict[str, int]:
    found = dict(launch["instructions"])
    found["all"] = launch["warp_instructions"]
    found["macs"] = launch["mma_macs"]
    found["bytes"] = launch["dram"]["load_bytes"]
    for kind in ("shared_load", "shared_store", "ldmatrix"):
        found["wavefronts"] = found.get("wavefronts", 0) + launch[kind]["wavefronts"]
    return found


def per_token(emulator: str, rope: str, q_len: int = 1) -> tuple[str, dict[str, float]]:
    """The kernel of the page loop, and the cost of a token and KV head in it."""
    short_call, long_call = (
        {launch["kernel"]: flat(launch) for launch in count(emulator, rope, length, q_len)}
        for length in LENGTHS
    )
    growth = {name: long_call[name]["all"] - short_call[name]["all"] for name in long_call}
    name = max(growth, key=growth.get)
    tokens = (LENGTHS[1] - LENGTHS[0]) * KV_HEADS
    before = short_call[name]
    return name, {k: (n - before.get(k, 0)) / tokens for k, n in long_call[name].items()}


def sass_ratio(kernel: Kernel) -> float:
    """Instructions in the text of the kernel's SASS, over those in the text of its PTX."""
    beside = Path(read_build()["compiler"]).with_name("cuobjdump")
    tool = str(beside) if beside.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError(f"no cuobjdump at {beside} or on the PATH")

    def dump(*options: str) -> str:
        command = [tool, *options, str(kernel.object)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    sass = dump("-sass", "-arch", f"sm_{kernel.arch}", "-fun", kernel.symbol)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?([A-Z][A-Z0-9]*)", sass, re.M)
    body = re.search(rf"\.entry {kernel.symbol}\(.*?\n{{\n(.*?)\n}}", dump("-ptx"), re.S)[1]
    ptx = re.findall(r"^\s*(?:\{\s*)?(?:@!?%\w+ +)?[a-z][a-z0-9]*[. ][^\n]*;", body, re.M)
    return len([i for i in instructions if i != "NOP"]) / len(ptx)


def estimate(kernels: list[Kernel], emulator: str) -> str:
    rows, limits = [], []
    names = ["mma", "int", "fp32", "cvt", "sfu", "shfl", "ld_shared", "st_shared", "cp_async"]
    for rope in ("post", "pre"):
        name, cost = per_token(emulator, rope)
        by_arch = {k.arch: k for k in kernels if k.name == name}
        counts = [f"{cost.get(k, 0):.1f}" for k in names]
        rows.append([f"{rope}-RoPE", f"{cost['bytes']:.0f}", f"{cost['all']:.1f}", *counts])
        for device in DEVICES:
            ratio = sass_ratio(by_arch[device.arch])
            cycles = device.num_sms * device.clock_hz
            times = {
                "memory": cost["bytes"] / device.bytes_per_s,
                "issue": cost["all"] * ratio / (4 * cycles),
                "integer units": cost["int"] * ratio / (2 * cycles),
                "tensor cores": 2 * cost["macs"] / device.mma_flops,
                "shared memory": cost["wavefronts"] / cycles,
            }
            times = {k: v * KV_HEADS * 1e9 for k, v in times.items()}
            limit = max(times, key=times.get)
            figures = [f"{t:.2f}" for t in times.values()]
            limits.append([f"{device.name}, {rope}-RoPE", f"{ratio:.2f}", *figures, f"{limit}"])
    head = ["a token and KV head", "bytes read", "instructions", *names]
    times_head = ["ns a token, 8 KV heads", "SASS / PTX", "memory", "issue", "integer units"]
    times_head += ["tensor cores", "shared memory", "limit"]
    return table(head, rows) + "\n\n" + table(times_head, limits)


def query_rows(emulator: str) -> str:
    """The cost of a query row and page, where 8 rows share a page and where the most do."""
    rows = []
    for rope in ("post", "pre"):
        for q_len in (2, 16):
            name, cost = per_token(emulator, rope, q_len)
            shared = 64 / (4 * q_len)  # tokens of a page over query rows of a KV head
            figures = [f"{cost[k] * shared:.1f}" for k in ("bytes", "mma", "all")]
            kernel = short(name).split("<")[0]
            rows.append([f"{rope}-RoPE, {4 * q_len} rows, `{kernel}`", *figures])
    return table(["a query row and page", "bytes read", "mma", "instructions"], rows)


def replace(text: str, name: str, content: str) -> str:
    pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    if not re.search(pattern, text, re.S):
        raise SystemExit(f"{DOCS} has no '<!-- table: {name} -->' ... '<!-- end -->'")
    return re.sub(pattern, lambda m: m[1] + content + "\n" + m[2], text, flags=re.S)


def main() -> None:
    kernels = read_logs()
    text = replace(DOCS.read_text(), "resources", resources(kernels, read_launches()))
    emulator = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "build/ptx-emulator/ptxsim")
    if Path(emulator).exists() and TESTS.exists():
        text = replace(text, "page-loop", estimate(kernels, emulator))
        text = replace(text, "query-rows", query_rows(emulator))
    else:
        print(f"The tables of counts stay: no {emulator} or no {TESTS}")
    DOCS.write_text(text)


if __name__ == "__main__":
    main()
