"""A cache keeps everything where its keys are. No GPU is needed: tensors are fakes, with shapes and
devices but no numbers, and operators refuse tensors of different devices."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cache_support import make_model
from svdq import SVDqCache
from svdq.config.settings import Settings

HEADS, GROUP, DIM = 2, 2, 64


@pytest.fixture(params=["pre", "post"])
def step(request, monkeypatch):
    """Feeds tokens on a fake CUDA device to one layer of a cache; returns what comes out."""
    config = copy.deepcopy(make_model("llama", "sdpa").config)
    config.num_hidden_layers = 1
    assert config.head_dim == DIM and config.num_key_value_heads == HEADS
    cache = SVDqCache(config, preset="paper-1.25", rope=request.param)
    bands = cache.settings.scheduled_bands(DIM)  # reads numbers: before the fakes
    monkeypatch.setattr(Settings, "scheduled_bands", lambda *_: bands)
    layer = cache.layers[0]
    if layer.frequencies is not None:
        frequencies = layer.frequencies(4096)  # looks at numbers, too
        layer.frequencies = lambda _: frequencies

    def run(length, batch=2):
        new = torch.randn(2, batch, HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)
        query = torch.randn(batch, HEADS * GROUP, length, DIM, device="cuda", dtype=new.dtype)
        handle, _ = cache.update(new[0], new[1], 0)
        return layer.attend(query, handle)

    run.layer, run.cache = layer, cache
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield run


def tensors_of(layer):
    packed = layer.tokens.packed
    for part in (layer.tokens.window, packed, packed.pool, packed.codec, packed.drift):
        yield from ((k, v) for k, v in vars(part).items() if isinstance(v, torch.Tensor))


def test_all_of_a_layer_is_on_the_device(step):
    for length in (400, 1, 1, 40, 300, 1):
        out = step(length)
        assert out.device.type == "cuda" and out.shape == (2, length, HEADS * GROUP, DIM)
    layer = step.layer
    assert all(slots > 600 for slots in layer.tokens.packed.slots)
    assert {name: x.device.type for name, x in tensors_of(layer) if x.device.type != "cuda"} == {}


def test_changes_of_the_batch_stay_on_the_device(step):
    step(400)
    step.layer.batch_repeat_interleave(2)
    step(1, batch=4)
    step.layer.crop(-30)
    step.layer._select([3, 0])
    step(1)
    step.layer.tokens.compact()
    assert {x.device.type for _, x in tensors_of(step.layer)} == {"cuda"}


def test_tokens_from_elsewhere_are_refused(step):
    step(400)
    new = torch.randn(2, 2, HEADS, 1, DIM, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="on cuda:0, got .* on cpu"):
        step.cache.update(new[0], new[1], 0)
