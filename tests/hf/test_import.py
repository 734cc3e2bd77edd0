"""Modules that ``import svdq`` loads, and the name under which models take their cache."""

import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AttentionInterface

import svdq
from cache_support import make_model, make_tokens
from svdq import SVDqCache, cache_argument
from svdq.hf import arguments

# A user has these anyway.
BEFORE = "import sys, torch; from transformers import LlamaForCausalLM; before = set(sys.modules); "


def loaded_by(code):
    """Modules that code loads in addition to torch and a model of transformers."""
    code = BEFORE + code + "; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_import_loads_the_library_alone():
    """So that it costs a fraction of a second on top of torch and transformers."""
    modules = loaded_by("import svdq")
    others = {name for name in modules if name.split(".")[0] != "svdq"}
    # Installed in place, the package is found by a module of setuptools.
    others = {name for name in others if not name.startswith("__editable__")}
    assert others == set()
    assert "svdq.reference" not in modules


def test_import_registers_the_attention():
    assert "svdq" in AttentionInterface().valid_keys()


def test_the_public_names():
    assert set(svdq.__all__) == {
        "Calibration", "PageLayout", "Profile", "SVDqCache", "Settings", "__version__",
        "cache_argument", "ops", "presets", "sample_positions",
    }  # fmt: skip
    assert all(hasattr(svdq, name) for name in svdq.__all__)


def test_models_take_the_cache_without_a_warning():
    model, cache = make_model("llama"), None
    cache = SVDqCache(model.config)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error", FutureWarning)
        model(make_tokens(1, 20), **cache_argument(cache))
        model.generate(make_tokens(1, 21), **cache_argument(cache), max_new_tokens=2)
    assert cache.get_seq_length() == 22


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_name_is_that_of_the_installed_transformers(monkeypatch, name):
    class Mixin:
        pass

    scope = {}
    exec(f"def prepare_inputs_for_generation(self, input_ids, {name}=None): ...", scope)
    Mixin.prepare_inputs_for_generation = scope["prepare_inputs_for_generation"]
    monkeypatch.setattr("transformers.GenerationMixin", Mixin)
    arguments._cache_name.cache_clear()
    assert cache_argument(7) == {name: 7}
    monkeypatch.undo()
    arguments._cache_name.cache_clear()
