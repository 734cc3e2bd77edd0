"""Fixtures that every test may use."""

import os

# Threads that spin while they wait starve each other where tests share the machine with other work.
# This is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

from svdq import _C  # noqa: E402


@pytest.fixture(params=_C.backends())
def backend(request):
    """Runs a test once on every backend of this machine, then restores the one in use."""
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
