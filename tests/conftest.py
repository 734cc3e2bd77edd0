"""Fixtures that every test may use."""

import os

# Threads that spin while they wait starve each other where tests share the machine with other work.
# This is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

import svdq.ops.registered  # noqa: E402
from cuda_support import OnCuda  # noqa: E402
from svdq import _C  # noqa: E402

HAS_GPU = _C.BUILT_WITH_CUDA and torch.cuda.is_available()


def pytest_report_header():
    where = "do not run: this build has no emulation and there is no GPU"
    if "emulated" in _C.backends():
        where = "run emulated"
    if HAS_GPU:
        where = f"run on {torch.cuda.get_device_name()}"
    return f"svdq: the CUDA kernels {where}"


@pytest.fixture(params=[*_C.backends(), *(["cuda"] if HAS_GPU else [])])
def backend(request, monkeypatch):
    """Runs a test once on every backend of this machine, a GPU included, then goes back."""
    if request.param == "cuda":
        monkeypatch.setattr(svdq.ops.registered, "OPERATORS", OnCuda())
        yield request.param
        return
    before = _C.backend()
    _C.set_backend(request.param)
    yield request.param
    _C.set_backend(before)


@pytest.fixture(autouse=True)
def seed():
    """Random numbers that are the same in every run and whatever tests run before."""
    torch.manual_seed(0)


@pytest.fixture
def num_threads():
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
