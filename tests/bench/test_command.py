"""The ``svdq`` command as a process: its imports before it answers, and without its packages."""

import inspect
import subprocess
import sys

import pytest

from svdq import layout
from svdq.config import presets
from svdq.config.sparsity import DEFAULT_CHANNELS
from svdq_bench.cli import demo, options
from svdq_bench.speed import layer_step, machine

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


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_the_demo_takes_the_numbers_that_the_full_cache_is_faster_in(faster, monkeypatch):
    monkeypatch.setattr(layer_step, "layer_step_ms", lambda dtype: 1.0 if dtype == faster else 2.0)
    dtype, reason = demo.choose_dtype()
    assert dtype.value == faster
    assert f"1.00 ms in {faster}" in reason and "2.00 ms" in reason


def test_a_layer_step_takes_time():
    assert layer_step.layer_step_ms("float32", tokens=64, repeats=1) > 0


def test_options_repeat_the_library():
    """What the command line knows without importing torch."""
    assert options.VALUE_BITS == layout.VALUE_BITS
    defaults = {name: p.default for name, p in inspect.signature(demo.demo).parameters.items()}
    assert defaults["k_bits"] == f"kv={presets.KV_BITS}"
