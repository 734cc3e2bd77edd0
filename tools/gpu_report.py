"""The steps of tools/gpu.sh, each within its share of the time, and the report on them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_tools"))
from gpu_machine import Tools, has_header  # noqa: E402

import cuda_toolkit  # noqa: E402

BUILD = ROOT / "build/cpp"
TAIL_LINES = 30  # of the log of a step that failed, in the report
NO_DEVICE_ARCH = "90"
USUAL_MINUTES = 10
OLDEST_SETUPTOOLS = 77  # that reads pyproject.toml
JOBS = str(os.cpu_count())
KERNELS = ("attend_decode", "attend_window", "pack_keys")  # that ncu looks at
SANITIZED = "Attend*Decode*:Pack*:Merge*:Capture*"  # GoogleTests under compute-sanitizer


@dataclass
class Step:
    """What a step came to.

    Parameters
    ----------
    status : ``passed``, ``failed``, ``timeout`` or ``skipped``.
    detail : totals, or in one line why it was skipped or failed.
    results : numbers for the report's JSON.
    tail : end of the log of a step that did not pass.
    """

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    results: object = None
    tail: list[str] = field(default_factory=list)


class Run:
    """Runs steps one after another, none beyond the end of the time, and keeps their logs."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.logs = folder, folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.start, self.limit = time.monotonic(), 60 * minutes
        self.scale = minutes / USUAL_MINUTES
        self.steps: list[Step] = []

    @property
    def left(self) -> float:
        """Seconds until the end, less what writing the report takes."""
        return self.limit - (time.monotonic() - self.start) - 5

    def skip(self, name: str, why: str) -> None:
        """Note a step that cannot run here."""
        self._add(Step(name, "skipped", detail=why))

    def run(
        self,
        name: str,
        command: Sequence[str | Path],
        seconds: float,
        env: dict[str, str] | None = None,
        totals: Callable[[str], str] = lambda log: "",
    ) -> bool:
        """Run a command; True if it passed. It may take so many seconds of the usual minutes."""
        seconds = min(seconds * self.scale, self.left)
        if seconds < 5:
            self.skip(name, "no time left")
            return False
        log = self.logs / f"{name}.log"
        begin = time.monotonic()
        with log.open("wb") as out:
            out.write(f"$ {' '.join(map(str, command))}\n".encode())
            out.flush()
            try:
                process = subprocess.Popen(
                    list(map(str, command)),
                    cwd=ROOT,
                    env=os.environ | (env or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                status = "passed" if process.wait(seconds) == 0 else "failed"
            except OSError as error:
                out.write(f"{error}\n".encode())
                status = "failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                status = "timeout"
        text = without_folders(log.read_text(errors="replace"))
        step = Step(name, status, time.monotonic() - begin, totals(text))
        if status != "passed":
            step.tail = text.splitlines()[-TAIL_LINES:]
        self._add(step)
        return status == "passed"

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        print(f"{step.name:<24} {step.status:<8} {step.seconds:6.1f} s  {step.detail}", flush=True)

    def write(self, tools: Tools) -> None:
        """Write the report, and the logs as one file."""
        report = {
            "benchmark": "gpu",
            "facts": tools.facts,
            "seconds": time.monotonic() - self.start,
            "steps": [asdict(step) for step in self.steps],
        }
        (self.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (self.folder / "report.md").write_text(markdown(report))
        with tarfile.open(self.folder / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.logs, "logs")
        shutil.rmtree(self.logs)


def without_folders(text: str) -> str:
    """A log without the places that this project and this Python lie in."""
    for folder in (str(ROOT), sys.prefix, sys.base_prefix):
        text = text.replace(folder + os.sep, "")
    return text


def markdown(report: dict) -> str:
    """The report for people."""
    lines = ["# svdq on a GPU", ""]
    lines += [f"- {name}: {value or 'none'}" for name, value in report["facts"].items()]
    lines += ["", "| step | | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [
        f"| {s['name']} | {s['status']} | {s['seconds']:.1f} | {s['detail']} |"
        for s in report["steps"]
    ]
    for step in report["steps"]:
        if isinstance(step["results"], str):
            lines += ["", f"## {step['name']}", "", step["results"].rstrip()]
        if step["tail"]:
            lines += ["", f"## {step['name']}: {step['status']}", "", "```", *step["tail"], "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all steps and write the report."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: gpu_report.py FOLDER")
    run = Run(Path(sys.argv[1]).resolve(), float(os.environ.get("SVDQ_MINUTES", USUAL_MINUTES)))
    tools = Tools.find()
    for name, value in tools.facts.items():
        print(f"{name}: {value or 'none'}", flush=True)
    try:
        build_tests(run, tools)
        extension = build_extension(run, tools)
        run_tests(run, tools)
        run_python(run, tools, extension)
    finally:
        run.write(tools)
    print(f"wrote {run.folder / 'report.json'}, report.md and logs.tar.gz")
    if any(step.status in ("failed", "timeout") for step in run.steps):
        raise SystemExit(1)


def build_tests(run: Run, tools: Tools) -> None:
    """Compile the kernels and their GoogleTests."""
    missing = _missing_for_kernels(tools)
    if not missing and tools.gtest is None and not has_header("gtest/gtest.h"):
        missing = "no GoogleTest: set SVDQ_GTEST_DIR to its source"
    if missing:
        run.skip("build tests", missing)
        return
    options = [f"-DSVDQ_GTEST_DIR={tools.gtest}"] if tools.gtest else []
    configure = ["cmake", "-S", ROOT, "-B", BUILD, *_cuda_options(tools), *options]
    if run.run("configure", configure, 60):
        run.run(
            "build tests",
            ["cmake", "--build", BUILD, "-j", JOBS, "--target", "svdq_cuda_tests"],
            240,
        )


def build_extension(run: Run, tools: Tools) -> bool:
    """Compile the Python extension; whether it can be used."""
    missing = _missing_for_kernels(tools)
    if tools.torch_cuda is None:
        missing = "no torch with CUDA"
    elif not tools.headers:
        missing = f"Python.h is missing: install the headers of python {sys.version.split()[0]}"
    elif int((tools.facts["setuptools"] or "0").split(".")[0]) < OLDEST_SETUPTOOLS:
        missing = f"setuptools {OLDEST_SETUPTOOLS} or newer is missing"
    if missing:
        run.skip("build extension", missing)
        return False
    env = {
        "SVDQ_CUDA": "1",
        "SVDQ_CUDA_ARCHS": _archs(tools),
        "SVDQ_EMULATION": "0",
        "CUDACXX": str(tools.nvcc),
        "MAX_JOBS": JOBS,
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run.run("build extension", command, 240, env)


def run_tests(run: Run, tools: Tools) -> None:
    """GoogleTest, plain and under compute-sanitizer."""
    binary = BUILD / "svdq_cuda_tests"
    if tools.gpu is None or not binary.exists():
        why = "no device" if tools.gpu is None else "the tests are not built"
        for name in ("GoogleTest", "memcheck", "racecheck"):
            run.skip(name, why)
        return
    run.run("GoogleTest", [binary, "--gtest_brief=1"], 120, totals=_gtest_totals)
    for tool in ("memcheck", "racecheck"):
        if tools.sanitizer is None:
            run.skip(tool, "no compute-sanitizer")
            continue
        command = [tools.sanitizer, "--tool", tool, "--error-exitcode", "1", binary]
        command += [f"--gtest_filter={SANITIZED}", "--gtest_brief=1"]
        run.run(tool, command, 60, totals=_gtest_totals)


def run_python(run: Run, tools: Tools, extension: bool) -> None:
    """Pytest on CUDA tensors, the benchmarks, and ncu on single kernels."""
    benches = {
        "bench attend": ["bench", "attend", "--device", "cuda", "--rope", "post", "--rope", "pre",
                         "--rope", "hybrid", "--kv-len", "4096", "--kv-len", "32768",
                         "--dtype", "bfloat16"],
        "bench attend batch": ["bench", "attend", "--device", "cuda", "--batch", "16", "--rope",
                               "post", "--rope", "pre", "--rope", "hybrid", "--kv-len", "32768",
                               "--dtype", "bfloat16"],
    }  # fmt: skip
    names = ["pytest", *benches, *(f"ncu {kernel}" for kernel in KERNELS)]
    if tools.gpu is None or not extension:
        for name in names:
            run.skip(name, "no device" if tools.gpu is None else "the extension is not built")
        return
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "benchmarks")])}
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-k", "cuda", "-x", *workers, "tests"]
    command += ["--continue-on-collection-errors"]
    run.run("pytest", command, 150, env, _pytest_totals)
    svdq = [sys.executable, "-m", "svdq_bench.command"]
    for name, words in benches.items():
        file = run.logs / f"{name}.json"
        if run.run(name, [*svdq, *words, "--markdown", "--json", file], 60, env):
            step = run.steps[-1]
            table = [x for x in (run.logs / f"{name}.log").read_text().splitlines() if "|" in x]
            step.results = "\n".join(table)
    for kernel in KERNELS:
        if tools.ncu is None:
            run.skip(f"ncu {kernel}", "no ncu")
            continue
        command = [tools.ncu, "--set", "basic", "-k", f"regex:{kernel}", "-c", "1", *svdq]
        command += [*benches["bench attend"], "--repeats", "1"]
        if run.run(f"ncu {kernel}", command, 45, env):
            text = (run.logs / f"ncu {kernel}.log").read_text(errors="replace")
            lines = [x for x in text.splitlines() if "Duration" in x or "Throughput" in x]
            run.steps[-1].detail = "; ".join(" ".join(x.split()) for x in lines[:4])


def _missing_for_kernels(tools: Tools) -> str:
    if tools.nvcc is None:
        return "no nvcc: set CUDA_HOME, or put it on the PATH"
    if tools.cmake is None:
        return "no cmake"
    return "" if shutil.which("g++") else "no g++"


def _cuda_options(tools: Tools) -> list[str]:
    packages = cuda_toolkit.package_folder() if tools.torch_cuda else None
    return [
        "-DSVDQ_CUDA=ON",
        "-DSVDQ_TESTS=ON",
        f"-DCMAKE_CUDA_COMPILER={tools.nvcc}",
        f"-DSVDQ_CUDA_ARCHS={_archs(tools)}",
        *([f"-DSVDQ_CUDA_PACKAGES={packages}"] if packages else []),
    ]


def _archs(tools: Tools) -> str:
    default = "native" if tools.gpu else NO_DEVICE_ARCH
    return os.environ.get("SVDQ_CUDA_ARCHS", default)


def _gtest_totals(log: str) -> str:
    return "; ".join(re.findall(r"\[  (?:PASSED|FAILED)  \] \d+ tests?.*", log))


def _pytest_totals(log: str) -> str:
    found = re.findall(r"\d+ (?:passed|failed).* in [\d.]+.*", log)
    return found[-1] if found else ""


if __name__ == "__main__":
    main()
