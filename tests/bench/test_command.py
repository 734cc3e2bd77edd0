"""The ``svdq`` command as a process: its imports before it answers, and without its packages."""

import subprocess
import sys

import pytest

from svdq.config.sparsity import DEFAULT_CHANNELS
from svdq_bench.cli import demo, options
from svdq_bench.speed import machine

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "safetensors", "svdq")
RUN = """
import sys
from svdq_bench.command import main
sys.argv = ["svdq", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    code = stop.code
else:
    code = 0
found = sorted(set({heavy!r}) & set(sys.modules))
print("IMPORTED", found, "CODE", code or 0)
"""


def run(arguments, before=""):
    script = before + RUN.format(arguments=arguments, heavy=HEAVY)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "Usage"),
        (["--version"], 0, f"svdq {machine.package_version('svdq') or 'not installed'}"),
        (["eval", "perplexity", "--help"], 0, "--k-bits"),
        (["bench", "attend", "--help"], 0, "--kv-len"),
        (["info"], 0, "packed format"),
        (["bench", "attend", "--kv-len", "many"], 2, "--kv-len"),
        (["nonsense"], 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_answers_import_nothing_heavy(arguments, code, text):
    said = run(arguments)
    assert f"IMPORTED [] CODE {code}" in said.stdout
    assert text in said.stdout + said.stderr


def test_without_its_packages_the_command_names_the_extra():
    hide = (
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'rich' else find(name, *a)\n"
    )
    said = run(["--help"], hide)
    assert "CODE 2" in said.stdout
    assert said.stderr.strip() == ("svdq: error: the command needs rich: pip install 'svdq[bench]'")


def test_options_repeat_the_library_s_default():
    assert options.DEFAULT_CHANNELS == DEFAULT_CHANNELS


@pytest.mark.parametrize(
    ("flags", "computes"),
    [
        ("fma avx2 avx512f avx512_bf16", True),
        ("avx512f amx_tile amx_bf16", True),
        ("asimd bf16 i8mm", True),
        ("fma avx2 avx512f", False),
        ("", False),
    ],
)
def test_the_demo_computes_in_the_processor_s_numbers(flags, computes, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text(f"model name\t: no bfloat16\nflags\t\t: {flags}\n")
    monkeypatch.setattr(machine, "CPU_INFO", info)
    dtype, reason = demo.choose_dtype()
    assert dtype.value == ("bfloat16" if computes else "float32")
    assert ("emulates" in reason) != computes
