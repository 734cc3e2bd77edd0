"""Which of transformers' model families can use the cache: each tried on a small random model."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PretrainedConfig

from svdq import SVDqCache, cache_argument, reference
from svdq.hf.tiny_model import VOCABULARY, aside, attribute, build, shrink

LAYERS = 8  # enough for the patterns that families repeat
PROMPT, NEW = 200, 12
SECONDS = 120  # that a family may take
FINE = {"schedule": [8], "v_bits": "exact", "min_fit_tokens": 64}
LARGEST_ERROR = 1e-3  # of the squares of 8-bit keys; wrong ones would differ by all
UNROTATED_ERROR = 1e-4  # float32 angles of up to PROMPT radians


def families() -> dict[str, type[PretrainedConfig]]:
    """Configurations of every class of causal language models, by model type."""
    return {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}


def evaluate_families(names: Sequence[str], begin: Callable[[str], None]) -> list[dict]:
    """One row a family.

    Parameters
    ----------
    names : model types, of :func:`families`.
    begin : called with the name of each as it begins.

    Returns
    -------
    Rows with ``works`` ("before RoPE", "as they come", "refused", "not tried" or "fails"), ``why``
    it is so, ``compressed`` and ``layers``, and ``key_error``, the relative squared error of
    decoded 8-bit keys.
    """
    known, rows = families(), []
    for name in names:
        if name not in known:
            raise ValueError(f"transformers has no causal language model {name!r}")
        begin(name)
        found = _evaluate(known[name])
        version = transformers.__version__
        rows.append({"benchmark": "families", "family": name, **found, "transformers": version})
    return rows


def _evaluate(cls: type[PretrainedConfig]) -> dict[str, Any]:
    try:
        with aside(), _limited():
            config = small_config(cls)
            model = build(config, "sdpa" if _takes(config, "sdpa") else "eager")
            tokens = torch.randint(2, VOCABULARY, (1, PROMPT))
            full = DynamicCache(config=config)
            expected = _generate(model, tokens, full)
    except BaseException as error:
        return _row("not tried", f"{type(error).__name__}: {error}")
    try:
        with aside(), _limited():
            return _compare(model, config, tokens, expected)
    except (NotImplementedError, ValueError) as error:
        return _row("refused", str(error))
    except BaseException as error:
        return _row("fails", f"{type(error).__name__}: {error}")


def small_config(cls: type[PretrainedConfig]) -> PretrainedConfig:
    """A family's own configuration, with few layers and small sizes."""
    config = cls().get_text_config(decoder=True)
    layers = attribute(config, "num_hidden_layers")
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers and layers > LAYERS:
            setattr(config, name, value[:LAYERS])
    config.num_hidden_layers = min(layers, LAYERS)
    return shrink(config)


def _takes(config: PretrainedConfig, attention: str) -> bool:
    try:
        build(config, attention)
    except ValueError:
        return False
    return True


def _compare(model: Any, config: PretrainedConfig, tokens: Tensor, expected: Tensor) -> dict:
    caches = [SVDqCache(config, **settings) for settings in ({"preset": "exact"}, FINE)]
    model.set_attn_implementation("svdq")
    exact = _generate(model, tokens, caches[0])
    if not torch.equal(exact, expected):
        return _row("fails", "tokens with exact keys are not those of a DynamicCache")
    _generate(model, tokens, caches[1])
    layers = caches[1].svdq_layers
    if not all(layer.tokens is not None and all(layer.tokens.packed.slots) for layer in layers):
        return _row("fails", "some layer holds no compressed tokens")
    # Keys of a prompt alone, which both caches see alike.
    full, packed = DynamicCache(config=config), SVDqCache(config, **FINE)
    for cache in (full, packed):
        model(tokens, use_cache=True, **cache_argument(cache))
    errors = [_key_error(layer, full.layers[layer.index].keys[0]) for layer in packed.svdq_layers]
    # States of linear attention and learned sinks tell how many tokens were before.
    counts = any(packed_is_linear(packed)) or any("sink" in x for x, _ in model.named_parameters())
    turned = [] if counts else _unrotated_errors(model, config, packed)
    if turned and not max(turned) <= UNROTATED_ERROR:
        return _row("fails", f"un-rotated keys of one token differ by {max(turned):.2g}")
    largest = max(errors)
    if not largest <= LARGEST_ERROR:
        return _row("fails", f"decoded keys have an error of {largest:.2g}")
    found = _row("before RoPE", "")
    reasons = {reason for layer in layers if (reason := _why_post(config, layer.index))}
    if reasons:
        found = _row("as they come", "; ".join(sorted(reasons)))
    return found | {"compressed": len(layers), "layers": len(caches[1]), "key_error": largest}


def _key_error(layer: Any, keys: Tensor) -> float:
    store, first = layer.tokens.packed, layer.settings.sink_tokens
    count = store.slots[0] - first
    decoded = store.decoded_keys(0, first, count)
    if layer.tokens.fit.gain is not None:
        decoded = decoded / layer.tokens.fit.gain[0].float()[:, None]
    true = keys[:, first : first + count].float()
    return float((decoded - true).square().sum() / (true - true.mean(1, True)).square().sum())


def packed_is_linear(cache: SVDqCache) -> list[bool]:
    """Whether each layer keeps a state of all tokens before instead of their keys."""
    return [hasattr(layer, "recurrent_states") for layer in cache.layers]


def _unrotated_errors(model: Any, config: PretrainedConfig, packed: SVDqCache) -> list[float]:
    """Differences between un-rotated keys of a prompt of one token, relative to the keys.

    All its tokens have the same hidden state in every layer, so only rotation tells keys apart.
    """
    full = DynamicCache(config=config)
    model(torch.full((1, PROMPT), 5), use_cache=True, **cache_argument(full))
    errors = []
    for layer in packed.svdq_layers:
        if layer.frequencies is None and _why_post(config, layer.index):
            continue  # nothing is claimed of it
        keys = full.layers[layer.index].keys[0]
        inv_freq = None if layer.frequencies is None else layer.frequencies(PROMPT)
        back = reference.rotate(keys, torch.arange(PROMPT), inv_freq, inverse=True)
        errors.append(float((back - back[:, :1]).abs().max() / back.abs().max()))
    return errors


def _why_post(config: PretrainedConfig, index: int) -> str | None:
    from svdq.hf.rotation import rotation_of

    return rotation_of(config, index).reason


def _generate(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    return model.generate(tokens, attention_mask=mask, **options, **cache_argument(cache))


def _row(works: str, why: str) -> dict[str, Any]:
    return {"works": works, "why": " ".join(why.split())[:240].replace("|", "/")}


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """End what takes too long, where the operating system has alarms."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
