"""Count the instructions of every stage with callgrind and compare them with the committed counts.

Counts do not depend on the machine's load, so growth by more than TOLERANCE comes from the code.
They depend on the compiler: with another one than the counts name, nothing is compared.

Usage: count_instructions.py PROGRAM [--renew]; PROGRAM is build/cpp/svdq_count.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

COUNTS = Path(__file__).parent.parent / "docs/results/instructions.json"
TOLERANCE = 0.05


def compare(counts: Mapping[str, float], before: Mapping[str, float]) -> tuple[list[str], bool]:
    """A line for each stage with both counts, and True if none grew too much."""
    lines, fine = [], True
    for stage, count in counts.items():
        if stage not in before:
            lines.append(f"{stage:15}{count:10.1f}   not counted before: renew the counts")
            fine = False
            continue
        change = count / before[stage] - 1
        grown = change > TOLERANCE
        fine = fine and not grown
        mark = f"   grew by more than {TOLERANCE:.0%}" if grown else ""
        lines.append(f"{stage:15}{count:10.1f}{before[stage]:10.1f}{change:+9.1%}{mark}")
    lines += [
        f"{stage:15}was counted before, and is gone" for stage in before if stage not in counts
    ]
    return lines, fine and set(before) <= set(counts)


def count(program: Path, stage: str) -> int:
    """Instructions of one stage."""
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--toggle-collect=svdq_counted",
                f"--callgrind-out-file={folder}/out",
                str(program),
                stage,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    collected = re.search(r"Collected : (\d+)", found.stderr)
    if found.returncode or not collected or int(collected[1]) == 0:
        raise SystemExit(f"count_instructions: {stage} could not be counted:\n{found.stderr}")
    return int(collected[1])


def compiler() -> str:
    """The version line of the compiler that cmake takes by default."""
    return subprocess.run(
        ["c++", "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]


def main() -> int:
    """Count, then compare or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path)
    parser.add_argument("--renew", action="store_true", help=f"write {COUNTS.name} anew")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("count_instructions: please install valgrind", file=sys.stderr)
        return 1
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx2" not in cpuinfo.read_text():
        print("count_instructions: needs a processor with AVX2", file=sys.stderr)
        return 1
    before = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    if not options.renew and before.get("compiler") != compiler():
        print(f"Not compared: counted with {before.get('compiler')}, this is {compiler()}.")
        return 0
    listed = subprocess.run([options.program], capture_output=True, text=True, check=True)
    counts = {}
    for stage, units in (line.split() for line in listed.stdout.splitlines()):
        counts[stage] = round(count(options.program, stage) / int(units), 1)
    if options.renew:
        COUNTS.write_text(json.dumps({"compiler": compiler(), "counts": counts}, indent=1) + "\n")
        print(f"{COUNTS.name}: {counts}")
        return 0
    print("stage           per token and KV head      before   change")
    lines, fine = compare(counts, before["counts"])
    print("\n".join(lines))
    if not fine:
        print("count_instructions: if that is meant, `make count-renew` writes the counts anew")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
