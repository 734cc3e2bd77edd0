"""Estimate what a decode step of a layer takes on GPUs, by the timing model of a PTX emulator: the
table of docs/cuda.md, for 32 query heads and 8 KV heads of 128 channels, 1.25-bit keys, 4-bit
values, a window of 64 tokens and 8 sinks.

``python tools/step_time.py [emulator]`` after ``make ci-ptx`` and ``cmake --build build/cpp
--target svdq_step_time`` (emulator: the command that starts it, build/ptx-emulator/ptxsim by
default). ``--print`` prints the table instead of writing it, ``--shapes 16x32768`` and
``--modes post`` choose rows, ``--program`` and ``--registers`` name another build and a file with
ptxas's report.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from kernel_report import BUILD, ROOT, read_build

DOCS = ROOT / "docs/cuda.md"
SHAPES = ("1x4096", "1x32768", "16x32768")
MODES = ("post", "hybrid", "pre")
# The name of a device in the emulator, its multiprocessors and the shared memory a block may have:
# no more than the 163 KiB of the device that the emulator runs kernels on.
DEVICES = {"A100": (108, 166912), "H100": (132, 166912), "4090": (128, 101376)}


def registers_file(folder: Path) -> Path:
    """ptxas's reports of the latest build, as one file."""
    logs = [Path(f"{name}.log") for name in read_build()["objects"] if name.endswith(".cu.o")]
    path = folder / "registers.txt"
    path.write_text("\n".join(log.read_text() for log in logs))
    return path


def short(kernel: str) -> str:
    return re.sub(r".*?(\w+?)(_kernel)?[<(].*", r"\1", kernel.removeprefix("void "))


def run(options: argparse.Namespace, folder: Path, mode: str, shape: str, device: str) -> dict:
    """Bytes of the step, and the kernels with their estimates."""
    batch, tokens = shape.split("x")
    report = folder / f"{mode}-{shape}-{device}.json"
    env = os.environ | {
        "PTXSIM_PRELOAD_ALL": "1",
        "PTXSIM_CHECKS": "0",
        "PTXSIM_TIMING": "1",
        "PTXSIM_DEVICES": device,
        "PTXSIM_REGS": str(options.registers),
        "PTXSIM_REPORT": str(report),
        "PTXSIM_THREADS": str(os.cpu_count()),
    }
    sms, shared = DEVICES[device]
    command = [options.emulator, options.program, mode, batch, tokens, str(sms), str(shared)]
    said = subprocess.run(command, env=env, capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(f"{' '.join(command)}: {said.stderr}{said.stdout}")
    step = json.loads(said.stdout.strip().splitlines()[-1])
    step["kernels"] = [json.loads(line) for line in report.read_text().splitlines()]
    return step


def row(step: dict, mode: str, shape: str, device: str) -> list[str]:
    times, chains = [], []
    for kernel in step["kernels"]:
        timing = kernel["timing"][device]
        times.append((short(kernel["kernel"]), timing))
        chains.append(timing["dep_us"])
    # The bandwidth that the model gives the device, which attend reads most by.
    per_us = step["kernels"][-1]["dram_cold_bytes"] / times[-1][1]["dram_us"]
    total = sum(timing["us"] for _, timing in times)
    memory, full = step["bytes"] / per_us, step["full_bytes"] / per_us
    parts = " + ".join(f"{t['us'] - t['launch_us']:.1f} ({t['bound']})" for _, t in times)
    batch, tokens = shape.split("x")
    return [
        f"{mode}, {batch} x {int(tokens):,}, {device}",
        str(len(times)),
        parts,
        f"{total:.1f}",
        f"{memory:.1f}",
        f"{total / memory:.2f}",
        f"{full / total:.1f}",
        f"{max(chains):.1f}",
    ]


HEAD = [
    "keys, batch x tokens, device",
    "launches",
    "kernels, us (bound)",
    "step, us",
    "its bytes, us",
    "ratio",
    "times faster than bf16's bytes",
    "longest chain, us",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("emulator", nargs="?", default=str(ROOT / "build/ptx-emulator/ptxsim"))
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), choices=DEVICES)
    parser.add_argument("--program", default=str(BUILD / "svdq_step_time"))
    parser.add_argument("--registers", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.registers = options.registers or registers_file(folder)
        for shape in options.shapes:
            for mode in options.modes:
                for device in options.devices:
                    step = run(options, folder, mode, shape, device)
                    rows.append(row(step, mode, shape, device))
                    if options.print:
                        print(" | ".join(rows[-1]), flush=True)
    if options.print:
        return
    lines = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = DOCS.read_text()
    pattern = re.compile(r"(<!-- table: step-time -->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"{DOCS} has no table step-time")
    DOCS.write_text(pattern.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text))


if __name__ == "__main__":
    main()
