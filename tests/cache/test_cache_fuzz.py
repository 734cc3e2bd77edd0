"""Random walks of a cache: it is what it was told to be after anything that users and models do.

Two caches take the same walk. One meets failures on the way, is saved, loaded and copied; the other
is not; and both must give the same outputs, bit by bit. ``SVDQ_FUZZ=n`` walks n times instead of a
few, each time elsewhere.
"""

import copy
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import LlamaConfig

from cache_support import GQA, SIZES, decoded
from calibration_support import calibration
from svdq import SVDqCache
from svdq.hf.attention import svdq_attention

WALKS = int(os.environ.get("SVDQ_FUZZ", "0"))
CONFIG = LlamaConfig(**SIZES, **GQA)
LAYERS, HEADS, DIM = CONFIG.num_hidden_layers, 2, 64
MOST_TOKENS, MOST_ROWS = 700, 4
EXACT = {"v_bits": "exact", "min_fit_tokens": 80}
SETTINGS = {
    "default": {"min_fit_tokens": 80},
    "exact values": {"schedule": [8], **EXACT},
    "no window": {"schedule": [4, 2], "residual_length": 0, **EXACT},
    "no sinks": {"k_bits": 2.0, "sink_tokens": 0, "min_fit_tokens": 100},
    "values": {"kv_bits": 2.5, "min_fit_tokens": 100},
    "hybrid": {"rope": "hybrid", "k_bits": 1.25, "min_fit_tokens": 80},
    "post": {"rope": "post", "v_bits": "exact", "k_bits": 1.5, "min_fit_tokens": 80},
    "outliers": {"k_bits": 1.25, "outlier_fraction": 0.1, "min_fit_tokens": 80},
    "landmarks": {
        "schedule": [4, 2], "sparse_budget": 0.5, "sparse_scorer": "landmarks", **EXACT,
    },
    "drift": {"schedule": [4], "v_bits": "exact", "refit_drift": 1.2, "min_fit_tokens": 80,
              "residual_length": 16},
    "static": {"schedule": [4, 2], "v_bits": "exact", "max_cache_len": MOST_TOKENS + 300,
               "min_fit_tokens": 80},
    "exact": {"preset": "exact"},
    "calibrated": {},
    "own ranges": {"prompt_ranges": True, "min_fit_tokens": 80},
    "out of domain": {"refit_drift": 1.2, "min_fit_tokens": 80, "residual_length": 16},
    "calibrated values": {"sink_tokens": 0, "residual_length": 0},
    "calibrated static": {"max_cache_len": MOST_TOKENS + 300},
}  # fmt: skip
CALIBRATIONS = {  # by name, those of a few settings
    "calibrated": "pre",
    "own ranges": "post",
    "out of domain": "hybrid",
    "calibrated values": "both",
    "calibrated static": "pre",
}
FAILURES = ["nan", "infinite", "large", "dtype", "shape", "stop", "query", "mask"]
PADS = st.lists(st.integers(0, 250), min_size=MOST_ROWS, max_size=MOST_ROWS)
LENGTHS = st.sampled_from([1, 1, 2, 7, 63, 64, 65, 100, 130, 200])


def calibration_of(name):
    """What a cache is calibrated by, or None."""
    return calibration(CALIBRATIONS[name]) if name in CALIBRATIONS else None


class Stop(Exception):
    """A model that fails between two layers."""


class Walk(RuleBasedStateMachine):
    """A cache on its walk, and the other that meets no failures."""

    @initialize(name=st.sampled_from(sorted(SETTINGS)), batch=st.integers(1, 3))
    def begin(self, name, batch):
        self.name, self.batch, self.seed = name, batch, 0
        self.calibration, self.is_static = calibration_of(name), "max_cache_len" in SETTINGS[name]
        self.cache, self.other = (
            SVDqCache(CONFIG, calibration=self.calibration, **SETTINGS[name]) for _ in range(2)
        )
        self.values = [torch.zeros(HEADS, 0, DIM) for _ in range(batch)]  # of layer 0, by sequence
        self.padding = [0] * batch

    @property
    def length(self):
        return int(self.cache.get_seq_length())

    def draw(self, length):
        """Query, keys and values of every layer."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        spectrum = 16.0 ** -torch.linspace(0, 1, DIM)

        def states(heads):
            shape = (self.batch, length, heads, DIM)
            return torch.randn(shape, generator=generator).transpose(1, 2)

        return [(states(4), states(2) * spectrum + 0.3, states(2)) for _ in range(LAYERS)]

    def attend(self, cache, drawn, mask=None, stop=None):
        """Outputs of every layer; ``stop`` is the layer before which the model fails."""
        module, outputs = SimpleNamespace(num_key_value_groups=2, is_causal=True), []
        for i, (query, keys, values) in enumerate(drawn):
            if i == stop:
                raise Stop
            new, same = cache.update(keys, values, i)
            outputs.append(svdq_attention(module, query, new, same, mask)[0])
        return outputs

    @precondition(lambda self: self.length < MOST_TOKENS)
    @rule(
        length=LENGTHS, pads=st.lists(st.integers(0, 250), min_size=MOST_ROWS, max_size=MOST_ROWS)
    )
    def feed(self, length, pads):
        mask, start = None, self.length
        if not start:
            self.padding = [min(pad, length - 1) for pad in pads[: self.batch]]
            mask = torch.arange(length) >= torch.tensor(self.padding)[:, None]
        drawn = self.draw(length)
        ours, theirs = (self.attend(x, drawn, mask) for x in (self.cache, self.other))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) and a.isfinite().all()
        for b in range(self.batch):
            new = drawn[0][2][b, :, max(self.padding[b] - start, 0) :]
            self.values[b] = torch.cat([self.values[b], new], 1)

    @precondition(lambda self: self.length < MOST_TOKENS)
    @rule(
        length=LENGTHS,
        layer=st.integers(0, LAYERS - 1),
        how=st.sampled_from(
            ["nan", "infinite", "large", "dtype", "shape", "stop", "query", "mask"]
        ),
    )
    def fail(self, length, layer, how):
        """A call that is refused or stops; afterwards nothing has happened."""
        static = self.is_static and length <= 64
        if static and how in ("stop", "mask"):
            return  # static steps are not watched, and do not read masks
        drawn, mask, stop = self.draw(length), None, None
        query, keys, values = (x.clone() for x in drawn[layer])
        if how in ("nan", "infinite", "large"):
            if how == "large" and ("exact" in self.name or "v_bits" in SETTINGS[self.name]):
                return
            values[-1, -1, -1, -1] = {"nan": torch.nan, "infinite": -torch.inf, "large": 1e9}[how]
        elif how == "dtype":
            values = values.half()
        elif how == "shape":
            keys = keys[:, :1]
        elif how == "query":
            query = query[..., :32]
        elif how == "mask":
            mask = torch.ones(self.batch, self.length + length + 1, dtype=torch.bool)
        else:
            stop = layer
        if static and self.cache.layers[0].is_static and layer:
            return  # the layers before have gone on, as the device alone knows
        drawn[layer] = (query, keys, values)
        try:
            self.attend(self.cache, drawn, mask, stop)
        except (ValueError, RuntimeError, Stop):
            pass
        else:
            raise AssertionError(f"{how} was taken")
        if stop:
            self.cache._step.take_back()  # as the next use of the cache would
        assert self.length == int(self.other.get_seq_length())

    @precondition(lambda self: self.length > 0)
    @rule(removed=st.integers(1, 260))
    def crop(self, removed):
        left = max(self.length - removed, 0)
        for cache in (self.cache, self.other):
            cache.crop(-removed)
        for b in range(self.batch):
            self.values[b] = self.values[b][:, : max(left - self.padding[b], 0)]
        self.padding = [min(pad, left) for pad in self.padding]

    def choose(self, indices):
        self.values = [self.values[i] for i in indices]
        self.padding = [self.padding[i] for i in indices]
        self.batch = len(indices)

    @rule(seed=st.integers(0, 9))
    def reorder(self, seed):
        indices = torch.randint(
            self.batch, (self.batch,), generator=torch.Generator().manual_seed(seed)
        )
        for cache in (self.cache, self.other):
            cache.reorder_cache(indices)
        self.choose(indices.tolist())

    @precondition(lambda self: self.length > 0 and self.batch * 2 <= MOST_ROWS)
    @rule()
    def repeat(self):
        for cache in (self.cache, self.other):
            cache.batch_repeat_interleave(2)
        self.choose([b for b in range(self.batch) for _ in range(2)])

    @precondition(lambda self: self.length > 0 and self.batch > 1)
    @rule(first=st.booleans())
    def select(self, first):
        chosen = [0] if first else list(range(1, self.batch))
        for cache in (self.cache, self.other):
            cache.batch_select_indices(chosen)
        self.choose(chosen)

    @rule()
    def reset(self):
        for cache in (self.cache, self.other):
            cache.reset()
        self.values = [x[:, :0] for x in self.values]
        self.padding = [0] * self.batch

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "cache")
            self.cache = SVDqCache.load(
                Path(folder) / "cache", CONFIG, calibration=self.calibration
            )

    @rule()
    def copy(self):
        self.cache = copy.deepcopy(self.cache)

    @invariant()
    def holds_what_it_was_given(self):
        if not hasattr(self, "cache"):
            return
        report = self.cache.memory_report()
        assert report.total_bytes == self.cache.allocated_bytes()
        layer = self.cache.layers[0]
        self.cache._stop()
        if layer.seq_length:
            assert {x.seq_length for x in self.cache.layers} == {layer.seq_length}
            assert layer.padding == self.padding and layer.batch_size == self.batch
            for b in range(self.batch):
                keys, values = decoded(layer, b)
                assert values.shape == self.values[b].shape and keys.isfinite().all()
                exact = SETTINGS[self.name].get("v_bits") == "exact" or self.name == "exact"
                assert not exact or torch.equal(values, self.values[b])
        self.cache._settle()


Walk.TestCase.settings = settings(
    max_examples=WALKS or 12,
    stateful_step_count=50 if WALKS else 16,
    derandomize=not WALKS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestWalk = Walk.TestCase
