"""Error of coded keys: the error in the original space, layer by layer.

Errors are those of the rotated keys, over the tokens that a method codes, all heads of a layer
together; rotations are orthogonal, so un-rotated keys have the same. They are told relative to the
keys' deviation from their mean, ``||K - K^||^2 / ||K - mean(K)||^2``, and as ratios to the error of
the first method, which is per-channel quantization. The score error counts every channel with the
energy of the queries there: it is about the change of attention scores.

:class:`GaussianBound` is what no code of normal variables of the same covariance can beat (reverse
water-filling): where even its ratio is small, the keys of a layer have no more to give.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdq import ops
from svdq.hf.rope import inverse_frequencies
from svdq.layout import WIDTHS
from svdq_bench.quality.matching import Matched, choose
from svdq_bench.quality.methods import CacheSettings, key_argument, parse_schedule
from svdq_bench.quality.peers import Peer, PerChannel
from svdq_bench.quality.perplexity import Task
from svdq_bench.quality.prefix import Method, Prefix, read_prefix

BASELINE_BITS = 2


@dataclass(frozen=True)
class GaussianBound:
    """Least error of normal variables with a layer's covariance, at a rate averaged over its heads.

    Parameters
    ----------
    bits : rate per key number.
    rope : ``"pre"`` for the covariance of un-rotated keys, ``"post"`` for that of rotated ones.
    sink_tokens : leading tokens left out.
    """

    bits: float
    rope: str = "pre"
    sink_tokens: int = 8

    @property
    def label(self) -> str:
        """The settings in a few words."""
        return f"bound at {self.bits:g} bits, {self.rope}-RoPE"


@dataclass(frozen=True)
class LayerError:
    """Errors of one layer's keys, summed over heads, coded tokens and channels.

    Parameters
    ----------
    layer : index in the model.
    error, norm : of the keys, and of their deviation from the mean.
    score_error, score_norm : the same weighted with query energies; None for a bound.
    head_bits : code bits per key number of each head.
    all_in_bits : everything stored for keys per key number (svdq: of the whole model).
    variances : [H, D] of the latent channels, in descending order; of bounds alone.
    """

    layer: int
    error: float
    norm: float
    score_error: float | None
    score_norm: float
    head_bits: tuple[float, ...]
    all_in_bits: float | None
    variances: Tensor | None = None


@dataclass
class _Windows:
    """Errors of one method and layer over all windows."""

    found: list[LayerError] = field(default_factory=list)

    def share(self, error: str, norm: str) -> float | None:
        """Pooled error relative to the pooled norm."""
        errors = [getattr(one, error) for one in self.found]
        if None in errors:
            return None
        total = sum(getattr(one, norm) for one in self.found)
        return sum(errors) / total if total else 0.0

    @property
    def head_bits(self) -> list[float]:
        """Code bits of each head, mean over windows."""
        return [
            statistics.fmean(bits) for bits in zip(*(x.head_bits for x in self.found), strict=True)
        ]

    @property
    def all_in_bits(self) -> float | None:
        """Mean over windows."""
        bits = [one.all_in_bits for one in self.found]
        return None if None in bits else statistics.fmean(bits)


def key_methods(
    keys: Sequence[str],
    peers: Sequence[Method | Matched],
    ropes: Sequence[str] = ("pre", "post"),
    scopes: Sequence[str] = ("model", "head"),
    weightings: Sequence[bool] = (True, False),
    clip: bool = True,
    sink_tokens: int = 8,
) -> list[Method | Matched | GaussianBound]:
    """Per-channel quantization, peers, svdq in all ways that are asked for, and bounds.

    Parameters
    ----------
    keys : presets, schedules, and averages to allocate, see :func:`key_argument`; at least one.
    ropes, scopes, weightings : each average is allocated in all combinations, each schedule is
        tested with every rope.

    Raises
    ------
    ValueError
        For keys that are not coded, or a price, which says no bits to compare at.
    """
    baseline = PerChannel(BASELINE_BITS, sink_tokens)
    rates: list[float] = []
    caches: list[CacheSettings] = []
    for word in keys:
        average = key_argument(word).get("k_bits")
        ways = [("model", None)]
        if average is not None and average <= 8:
            rates.append(average)
            ways = [(scope, weighted) for scope in scopes for weighted in weightings]
        else:
            schedule = parse_schedule(word)
            if schedule is None:
                raise ValueError(f"eval keys measures coded keys; {word!r} codes nothing")
            rates.append(sum(schedule) / len(schedule))
        caches += [
            CacheSettings(word, "exact", rope, clip, sink_tokens, 0, scope, weighted)
            for rope in ropes
            for scope, weighted in ways
        ]
    rates = list(dict.fromkeys(rates))
    whole = [PerChannel(int(b), sink_tokens) for b in rates if b == int(b) and b != BASELINE_BITS]
    # Those of one space: a hybrid has two.
    spaces = [rope for rope in ropes if rope in ("pre", "post")]
    bounds = [GaussianBound(bits, rope, sink_tokens) for rope in spaces for bits in rates]
    return [baseline, *whole, *peers, *caches, *bounds]


def evaluate_keys(
    model: PreTrainedModel,
    token_ids: Tensor,
    methods: Sequence[Method | Matched | GaussianBound],
    task: Task,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Errors of the keys of every window's prefill by method and layer.

    Parameters
    ----------
    model : a causal language model with its default attention.
    token_ids : [T] int64, the whole text.
    methods : the first one is what the others are compared with.
    task : windows; what follows their prefill is not read.
    begin : called with the name of each of the ``len(windows) * len(methods)`` steps as it begins.

    Returns
    -------
    Rows of ``"key_error"`` for every method and layer, of ``"bits"`` for every head where a
    method's heads differ, and of ``"spectrum"`` for every head if there is a bound.
    """
    found: list[dict[int, _Windows]] = [{} for _ in methods]
    labels = [method.label for method in methods]
    for window in task.windows(token_ids):
        for index, method in enumerate(methods):
            begin(method.label)
            if index == 0:
                prefix = read_prefix(model, window[:, : task.prefill_tokens])
            chosen = choose(method, prefix)
            labels[index] = chosen.label
            for error in layer_errors(chosen, prefix):
                found[index].setdefault(error.layer, _Windows()).found.append(error)
    rows = []
    for label, layers in zip(labels, found, strict=True):
        for layer, windows in layers.items():
            rows.append(_error_row(label, layer, windows, found[0][layer]))
    for label, layers in zip(labels, found, strict=True):
        rows += _bits_rows(label, layers)
    for index in [i for i, x in enumerate(methods) if isinstance(x, GaussianBound)][:1]:
        rows += _spectrum_rows(found[index])
    return rows


def _error_row(label: str, layer: int, windows: _Windows, baseline: _Windows) -> dict:
    relative, score = ("error", "norm"), ("score_error", "score_norm")
    return {
        "benchmark": "key_error",
        "layer": layer,
        "method": label,
        "bits": statistics.fmean(windows.head_bits),
        "all_in_bits": windows.all_in_bits,
        "relative_error": windows.share(*relative),
        "ratio": _ratio(baseline.share(*relative), windows.share(*relative)),
        "score_error": windows.share(*score),
        "score_ratio": _ratio(baseline.share(*score), windows.share(*score)),
    }


def _ratio(baseline: float, error: float | None) -> float | None:
    """Ratio of two errors; None where there is none."""
    return baseline / error if error else None


def _bits_rows(label: str, layers: dict[int, _Windows]) -> list[dict]:
    """Bits of every head, or none where all heads have the same."""
    bits = {layer: windows.head_bits for layer, windows in layers.items()}
    if len({number for heads in bits.values() for number in heads}) == 1:
        return []
    return [
        {"benchmark": "bits", "layer": layer, "head": head, "method": label, "bits": number}
        for layer, heads in bits.items()
        for head, number in enumerate(heads)
    ]


def _spectrum_rows(layers: dict[int, _Windows]) -> list[dict]:
    rows = []
    for layer, windows in layers.items():
        mean = torch.stack([one.variances for one in windows.found]).mean(dim=0)
        for head, variances in enumerate(mean.tolist()):
            row = {"benchmark": "spectrum", "layer": layer, "head": head}
            rows.append(row | {"variances": [float(f"{x:.4g}") for x in variances]})
    return rows


@torch.inference_mode()
def layer_errors(method: Method | GaussianBound, prefix: Prefix) -> Iterator[LayerError]:
    """Errors of every full-attention layer of a context."""
    if isinstance(method, GaussianBound):
        yield from (_bound_error(method, prefix, layer) for layer in prefix.full_layers)
    elif isinstance(method, CacheSettings):
        yield from _cache_errors(method, prefix)
    elif isinstance(method, Peer):
        yield from (_peer_error(method, prefix, layer) for layer in prefix.full_layers)
    else:
        raise ValueError(f"{method.label} does not tell its keys, so they have no error to measure")


def _peer_error(method: Peer, prefix: Prefix, layer: int) -> LayerError:
    keys, energy = prefix.cache.layers[layer].keys, prefix.query_energy[layer]
    heads, tokens, dim = keys.shape[1:]
    memory = method.layer_memory((heads, tokens, dim), keys.itemsize)
    start, count = method.sink_tokens, memory.coded_numbers // (heads * dim)
    decoded = method.code_layer(prefix, layer)[0, :, start : start + count]
    errors = _errors(keys[0, :, start : start + count], decoded, energy)
    return LayerError(layer, *errors, (memory.k_bits,) * heads, memory.all_in_bits)


def _cache_errors(method: CacheSettings, prefix: Prefix) -> Iterator[LayerError]:
    cache = method.compress(prefix)
    all_in_bits = method.bits(cache)["all_in_bits"]
    for layer in prefix.full_layers:
        tokens, sinks = cache.layers[layer].tokens, method.sink_tokens
        packed = tokens.packed
        count = packed.slots[0] - sinks
        decoded = packed.decoded_keys(0, sinks, count)
        if tokens.fit.gain is not None:
            decoded = decoded / tokens.fit.gain[0].float()[:, None]
        keys = prefix.cache.layers[layer].keys[0, :, sinks : sinks + count]
        errors = _errors(keys, decoded, prefix.query_energy[layer])
        dim = packed.layout.head_dim
        pre_bands = packed.layout.pre_bands or [()] * len(packed.layout.bands)
        heads = zip(packed.layout.bands, pre_bands, strict=True)
        bits = ((_code_bits(post) + _code_bits(pre)) / dim for post, pre in heads)
        yield LayerError(layer, *errors, tuple(bits), all_in_bits)


def _code_bits(head: Sequence[int]) -> int:
    """Bits of a token of a head with these channels at each width."""
    return sum(n * width for n, width in zip(head, WIDTHS, strict=False))  # none: no channels


def _bound_error(method: GaussianBound, prefix: Prefix, layer: int) -> LayerError:
    keys = prefix.cache.layers[layer].keys[0, :, method.sink_tokens :]
    heads, count, _ = keys.shape
    inv_freq = None
    if method.rope == "pre":
        config = prefix.config.get_text_config(decoder=True)
        inv_freq = inverse_frequencies(config, layer, prefix.num_tokens - 1)
    if inv_freq is not None:
        inv_freq = inv_freq.to(keys.device)
    variances = ops.fit_basis(keys, inv_freq, method.sink_tokens)[2]
    _, norm, _, score_norm = _errors(keys, keys, prefix.query_energy[layer])
    error = count * water_filling_error(variances.flatten(), method.bits)
    bits = (method.bits,) * heads
    return LayerError(layer, error, norm, None, score_norm, bits, None, variances.cpu())


def _errors(keys: Tensor, decoded: Tensor, energy: Tensor) -> tuple[float, float, float, float]:
    """Error, norm, score error and score norm of keys [H, n, D] and what is decoded of them.

    Parameters
    ----------
    energy : [H, D] mean squared queries.
    """
    keys, decoded, energy = keys.double(), decoded.double(), energy.double()
    error = (keys - decoded).square().sum(dim=1)
    norm = (keys - keys.mean(dim=1, keepdim=True)).square().sum(dim=1)
    return tuple(float(x.sum()) for x in (error, norm, error * energy, norm * energy))


def water_filling_error(variances: Tensor, bits: float) -> float:
    """Least mean squared error of independent normal variables at a mean rate, summed over them.

    ``sum min(v, level)`` at the level for which ``sum max(log2(v / level), 0) / 2`` is the rate.

    Parameters
    ----------
    variances : [N], any order.
    bits : rate per variable.
    """
    falling = variances.double().clamp_min(0).sort(descending=True).values
    falling = falling[falling > 0]
    rate = bits * len(variances)
    for coded in range(len(falling), 0, -1):
        # With the first so many above the level: (sum of log2 v - coded * log2 level) / 2 = rate.
        level = 2 ** ((float(falling[:coded].log2().sum()) - 2 * rate) / coded)
        if level <= float(falling[coded - 1]):
            return coded * level + float(falling[coded:].sum())
    return float(falling.sum())
