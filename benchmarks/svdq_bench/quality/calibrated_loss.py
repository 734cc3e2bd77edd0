"""What a calibration costs: its KL against that of bases fitted to each prompt, at equal bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdq import Calibration
from svdq_bench.quality.calibration import Windows
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.metrics import Scores, compare_logits
from svdq_bench.quality.models import check_length
from svdq_bench.quality.perplexity import mean_columns, predict
from svdq_bench.quality.prefix import Prefix, fork, read_prefix

# All-in bits are equal within this share, of the nearest widths that were found.
EQUAL_BITS = 0.002
MATCHING_STEPS = 7
# A prompt is out of the domain if its drift is that much larger than of any text that was held out.
DRIFT_MARGIN = 1.05


@dataclass(frozen=True)
class Contexts:
    """Contexts of one text and one length, each with the tokens that follow it.

    Parameters
    ----------
    text : its name.
    tokens : of a context.
    windows : [1, T] int64 each, a context and what follows.
    """

    text: str
    tokens: int
    windows: list[Tensor]


def cut_contexts(
    text: str, token_ids: Tensor, starts: Sequence[int], tokens: int, predicted: int
) -> Contexts:
    """Contexts of a text, [T], that begin at these tokens.

    Raises
    ------
    ValueError
        For one that does not fit into the text.
    """
    last = max(starts) + tokens + predicted
    if min(starts) < 0 or last > len(token_ids):
        raise ValueError(
            f"text {text!r} has {len(token_ids)} tokens: a context of {tokens} at {max(starts)} "
            f"with {predicted} to predict does not fit"
        )
    windows = [token_ids[None, i : i + tokens + predicted] for i in starts]
    return Contexts(text, tokens, windows)


def calibrated_settings(calibration: Calibration, **options) -> CacheSettings:
    """Caches with a calibration; ``options`` as for CacheSettings."""
    keys = calibration.settings["k_bits"] or calibration.settings["kv_bits"]
    if keys is None:
        raise ValueError(
            f"{calibration.source} was calibrated for neither k_bits nor kv_bits, so there are no "
            "bits of other caches to compare with"
        )
    joint = "kv=" if calibration.settings["k_bits"] is None else ""
    v_bits = calibration.settings["v_bits"]
    return CacheSettings(
        f"{joint}{keys:.12g}",
        v_bits=4 if v_bits is None else v_bits,
        rope=calibration.settings["rope"],
        clip=calibration.settings["clip"],
        calibration=calibration,
        **options,
    )


def held_out_loss(
    model: PreTrainedModel,
    calibration: Calibration,
    texts: Sequence[Windows],
    predicted: int,
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """What a calibration is expected to lose: KL and perplexity on text that was held out.

    Parameters
    ----------
    predicted : last tokens of a held-out window, which are predicted.
    begin : called with the name of each held-out window as it begins.

    Returns
    -------
    A row for each text: mean KL, perplexity of both caches, drift.
    """
    method = CacheSettings(
        "paper-1.25", v_bits="exact", residual_length=0, calibration=calibration
    )  # what it asks for is the calibration's
    rows = []
    for text in texts:
        scores, full_scores, columns = Scores(), Scores(), []
        for window in text.held_out:
            begin(f"{text.text}, held out")
            window = window.to(model.device)
            context, tokens = window.split([window.shape[1] - predicted, predicted], dim=1)
            prefix = read_prefix(model, context)
            full = predict(model, tokens, fork(prefix.cache), prefix.first)
            cache = method.compress(prefix)
            report, drift = cache.memory_report(), cache.domain_drift()[0]
            columns.append({"k_bits": report.code_bits, "drift": drift})
            columns[-1]["tokens"] = context.shape[1]
            scores += _score(model, method, cache, prefix, tokens, full)
            full_scores += compare_logits(full, full, tokens[0])
        rows.append(
            {
                "benchmark": "held_out",
                "text": text.text,
                **mean_columns(columns),
                "full_perplexity": full_scores.perplexity,
                "perplexity": scores.perplexity,
                "kl": scores.mean_kl,
            }
        )
    return rows


def drift_bound(rows: Sequence[dict]) -> float:
    """The drift above which a prompt is out of the domain, from rows of :func:`held_out_loss`."""
    return DRIFT_MARGIN * max(row["drift"] for row in rows)


def evaluate_calibration(
    model: PreTrainedModel,
    calibration: Calibration,
    contexts: Sequence[Contexts],
    begin: Callable[[str], None] = lambda step: None,
) -> list[dict]:
    """Compare a calibration with bases of each prompt, at as many bits all in.

    Bits *all in* are everything that a prompt stores for its keys and, where their bits are
    calibrated together, its values. What all prompts share is not a prompt's.

    Parameters
    ----------
    model : with its default attention.
    begin : called with the name of each of the contexts' steps as it begins, four a window.

    Returns
    -------
    A row for each of the contexts: means over their windows.
    """
    shared = calibrated_settings(calibration, residual_length=0)
    return [_evaluate(model, shared, own, begin) for own in contexts]


def _evaluate(
    model: PreTrainedModel,
    shared: CacheSettings,
    contexts: Contexts,
    begin: Callable[[str], None],
) -> dict:
    check_length(model, contexts.windows[0].shape[1])
    methods = {"kl": shared, "kl_own_ranges": replace(shared, prompt_ranges=True)}
    scores = {name: Scores() for name in (*methods, "kl_own_basis")}
    columns = []
    for window in contexts.windows:
        name = f"{contexts.text}, {contexts.tokens:,} tokens"
        begin(f"{name}: full cache")
        window = window.to(model.device)
        context, tokens = window[:, : contexts.tokens], window[:, contexts.tokens :]
        prefix = read_prefix(model, context)
        full = predict(model, tokens, fork(prefix.cache), prefix.first)
        found = {}
        for key, method in methods.items():
            begin(f"{name}: calibrated")
            cache = method.compress(prefix)
            report = cache.memory_report()
            found[key] = _all_in_bits(method, report)
            if key == "kl":
                found |= {"drift": cache.domain_drift()[0]}
                found |= {"out_of_domain": float(cache.out_of_domain()[0])}
                found |= {"k_bits": report.code_bits, "calibration_bytes": report.calibration}
            scores[key] += _score(model, method, cache, prefix, tokens, full)
        begin(f"{name}: bases of the prompt")
        method, cache = matched(shared, found["kl"], prefix)
        report = cache.memory_report()
        scores["kl_own_basis"] += _score(model, method, cache, prefix, tokens, full)
        found |= {"all_in_bits": found.pop("kl")}
        found |= {"own_ranges_all_in_bits": found.pop("kl_own_ranges")}
        found |= {"own_k_bits": report.code_bits, "own_all_in_bits": _all_in_bits(method, report)}
        columns.append(found)
    losses = {name: score.mean_kl for name, score in scores.items()}
    return {
        "benchmark": "calibration",
        "text": contexts.text,
        "tokens": contexts.tokens,
        "predict_tokens": contexts.windows[0].shape[1] - contexts.tokens,
        "windows": len(contexts.windows),
        **mean_columns(columns),
        **losses,
        "ratio": losses["kl"] / losses["kl_own_basis"],
    }


def _all_in_bits(method: CacheSettings, report) -> float:
    return (report.key_bits + report.value_bits) / 2 if method.allocates_both else report.key_bits


@torch.inference_mode()
def _score(model, method: CacheSettings, cache, prefix: Prefix, tokens: Tensor, full: Tensor):
    with attention(model, method.implementation):
        logits = predict(model, tokens, cache, prefix.first)
    return compare_logits(full, logits, tokens[0])


def matched(shared: CacheSettings, all_in_bits: float, prefix: Prefix):
    """A cache with bases of its own whose bits all in are nearest to a number, by secant steps.

    Returns
    -------
    method, cache : settings, and the cache of the prefix.

    Raises
    ------
    ValueError
        If the bases alone take so many bits.
    """
    joint = "kv=" if shared.allocates_both else ""
    least = 1.01 if joint else 0.01
    own = replace(shared, calibration=None)
    bits, best = all_in_bits, None
    lower, upper = least, 2 * all_in_bits
    for _ in range(MATCHING_STEPS):
        method = replace(own, keys=f"{joint}{bits:.6f}")
        cache = method.compress(prefix)
        found = _all_in_bits(method, cache.memory_report())
        distance = abs(found - all_in_bits)
        if best is None or distance < best[0]:
            best = distance, method, cache
        if distance <= EQUAL_BITS * all_in_bits:
            break
        lower, upper = (bits, upper) if found < all_in_bits else (lower, bits)
        step = bits + (all_in_bits - found) * 0.8  # a coded channel costs more than its codes
        bits = step if lower < step < upper else (lower + upper) / 2
    if best[0] > 0.05 * all_in_bits or math.isnan(best[0]):
        raise ValueError(
            f"bases of a prompt of {prefix.num_tokens} tokens leave nothing of {all_in_bits:.2f} "
            "bits for codes"
        )
    return best[1], best[2]
