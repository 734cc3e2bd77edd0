"""The columns of every benchmark's table, and rows of results as its cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from svdq_bench.cli.formats import bits as _bits
from svdq_bench.cli.formats import budget as _budget
from svdq_bench.cli.formats import fine_percent as _fine_percent
from svdq_bench.cli.formats import megabytes as _megabytes
from svdq_bench.cli.formats import nats_interval as _nats_interval
from svdq_bench.cli.formats import number as _number
from svdq_bench.cli.formats import percent as _percent
from svdq_bench.cli.formats import points_interval as _points_interval
from svdq_bench.cli.formats import times as _times

# Per benchmark: key of a row, heading, how to write it. Keys that no row has are left out.
COLUMNS: dict[str, list[tuple[str, str, Callable[[Any], str]]]] = {
    "perplexity": [
        ("method", "keys", str),
        ("k_bits", "bits", _bits),
        ("all_in_bits", "bits, all in", _bits),
        ("v_bits", "value bits", str),
        ("sink_tokens", "sinks", str),
        ("times_smaller_bf16", "times smaller than bf16, all in", _number(2)),
        ("text", "text", str),
        ("budget", "budget", _budget),
        ("code_read_ratio", "key codes read, times fewer", _number(1)),
        ("read_ratio", "all in", _number(1)),
        ("perplexity", "perplexity", _number(3)),
        ("kl", "KL", _number(4)),
        ("top1_agreement", "same top token", _percent),
    ],
    "retrieval": [
        ("method", "keys", str),
        ("k_bits", "bits", _bits),
        ("all_in_bits", "bits, all in", _bits),
        ("v_bits", "value bits", str),
        ("text", "text", str),
        ("times_smaller_bf16", "times smaller than bf16, all in", _number(2)),
        ("budget", "budget", _budget),
        ("code_read_ratio", "key codes read, times fewer", _number(1)),
        ("read_ratio", "all in", _number(1)),
    ],
    "sparsity": [
        ("method", "tokens chosen by", str),
        ("scan_bytes", "bytes to score a token", _number(1)),
    ],
    "harness": [
        ("method", "keys", str),
        ("task", "task", str),
        ("metric", "metric", str),
        ("value", "value", _number(4)),
        ("stderr", "standard error", _number(4)),
        ("all_in_bits", "bits, all in", _bits),
        ("compressed", "contexts compressed", "{:,}".format),
        ("too_short", "too short", "{:,}".format),
    ],
    "held_out": [
        ("text", "held-out text", str),
        ("tokens", "tokens", "{:,}".format),
        ("k_bits", "key bits", _bits),
        ("full_perplexity", "perplexity, full cache", _number(3)),
        ("perplexity", "calibrated", _number(3)),
        ("kl", "KL", _number(4)),
        ("drift", "drift", _number(2)),
    ],
    "calibration": [
        ("text", "text", str),
        ("tokens", "tokens", "{:,}".format),
        ("k_bits", "bits, calibrated", _bits),
        ("own_k_bits", "own bases", _bits),
        ("all_in_bits", "bits, all in", _bits),
        ("kl", "KL, calibrated", _number(4)),
        ("kl_own_basis", "own bases, as many bits", _number(4)),
        ("ratio", "ratio", _number(2)),
        ("kl_own_ranges", "KL, own mean and ranges", _number(4)),
        ("own_ranges_all_in_bits", "bits, all in", _bits),
        ("drift", "drift", _number(2)),
    ],
    "first_token": [
        ("case", "cache", str),
        ("tokens", "tokens", "{:,}".format),
        ("ttft_ms", "first token, ms", _number(0)),
        ("ttft_vs_full", "of DynamicCache's", _percent),
        ("key_bits", "key bits, all in", _number(2)),
        ("value_bits", "value bits, all in", _number(2)),
        ("times_smaller_bf16", "times smaller than bf16, all in", _number(2)),
    ],
    "key_error": [
        ("method", "keys", str),
        ("number", "no.", str),
        ("bits", "bits", _bits),
        ("all_in_bits", "bits, all in", _bits),
        ("relative_error", "relative error", _number(4)),
        ("ratio_min", "times smaller: min", _number(1)),
        ("ratio_median", "median", _number(1)),
        ("ratio_mean", "mean", _number(1)),
        ("score_ratio_median", "of scores, median", _number(1)),
    ],
    "families": [
        ("family", "family", str),
        ("works", "keys are packed", str),
        ("compressed", "layers compressed", str),
        ("layers", "of", str),
        ("key_error", "error of 8-bit keys", "{:.1e}".format),
        ("why", "why", str),
    ],
    "memory": [
        ("method", "cache", str),
        ("v_bits", "value bits", str),
        ("tokens", "tokens", "{:,}".format),
        ("key_code_bits", "keys: codes", _number(2)),
        ("key_basis_bits", "basis, scales, means", _number(2)),
        ("key_exact_bits", "exact", _number(2)),
        ("key_bits", "all in", _number(2)),
        ("value_code_bits", "values: codes", _number(2)),
        ("value_scale_bits", "scales", _number(2)),
        ("value_exact_bits", "exact", _number(2)),
        ("value_bits", "all in", _number(2)),
        ("cache_bytes", "cache, MB", _megabytes),
        ("times_smaller_bf16", "times smaller than bf16, all in", _number(2)),
    ],
    "attend": [
        ("case", "case", str),
        ("kv_len", "tokens", "{:,}".format),
        ("k_bits", "key bits", _bits),
        ("v_bits", "value bits", _bits),
        ("ms", "ms (median)", _number(2)),
        ("best_ms", "ms (best)", _number(2)),
        ("ns_per_token", "ns a token and KV head", _number(1)),
        ("speedup_vs_torch_best", "against torch's best", _times),
        ("speedup_vs_enable_gqa", "against enable_gqa", _times),
        ("speedup_vs_ggml_f16", "against ggml f16", _times),
        ("speedup_vs_ggml_q4_0", "ggml q4_0", _times),
        ("bytes", "MB read", _megabytes),
        ("gbytes_per_s", "GB/s", _number(1)),
        ("bandwidth_fraction", "of memory bandwidth", _percent),
        ("bandwidth_fraction_same_size", "of a cached buffer's", _percent),
    ],
    "generate": [
        ("case", "cache", str),
        ("dtype", "numbers", str),
        ("ttft_ms", "first token, ms", _number(0)),
        ("ttft_vs_full", "of DynamicCache's", _percent),
        ("decode_ms", "ms a token", _number(1)),
        ("tokens_per_second", "tokens/s", _number(1)),
        ("speedup_vs_full", "against DynamicCache", _times),
        ("cache_bytes", "cache, all in, MB", _megabytes),
        ("cache_ratio", "times smaller", _number(1)),
    ],
    "steps": [
        ("case", "keys", str),
        ("kv_len", "tokens", "{:,}".format),
        ("ordinary_ms", "ms a step", _number(2)),
        ("boundary_ms", "ms a step that packs", _number(2)),
        ("boundary_ratio", "ratio", _number(3)),
    ],
    "sparse": [
        ("case", "case", str),
        ("kv_len", "tokens", "{:,}".format),
        ("attended", "attended", "{:,}".format),
        ("ms", "ms (median)", _number(2)),
        ("select_ms", "select", _number(2)),
        ("gather_ms", "gather", _number(2)),
        ("attend_ms", "attend", _number(2)),
        ("speedup_vs_dense", "against all tokens", _times),
        ("speedup_vs_torch_best", "against torch's best", _times),
        ("speedup_vs_enable_gqa", "against enable_gqa", _times),
        ("code_read_ratio", "key codes read, times fewer", _number(1)),
        ("read_ratio", "all in", _number(1)),
    ],
    "fit": [
        ("case", "step", str),
        ("ms", "ms (median)", _number(2)),
        ("best_ms", "ms (best)", _number(2)),
        ("gflops", "GFLOP/s", _number(0)),
        ("speedup_vs_svd", "against torch.linalg.svd", _times),
        ("keys_gbytes_per_s", "GB/s of keys", _number(1)),
        ("bandwidth_fraction", "of reading them", _percent),
        ("fraction_of_prefill", "of the layer's prefill", _fine_percent),
        ("peak_fraction", "memory added, of the layer's full cache", _percent),
    ],
    "prefill": [
        ("case", "step", str),
        ("tokens", "tokens", "{:,}".format),
        ("ms", "ms (median)", _number(1)),
        ("fraction_of_prefill", "of the prefill", _percent),
    ],
    "demo": [
        ("method", "cache", str),
        ("perplexity", "perplexity", _number(3)),
        ("kl", "KL", _number(4)),
        ("top1_agreement", "same top token", _percent),
        ("cache_bytes", "keys and values, all in, MB", _megabytes),
        ("cache_ratio", "times smaller", _number(2)),
        ("all_in_bits", "bits a key number", _bits),
        ("prefill_seconds", "prefill, s", _number(2)),
        ("compress_seconds", "compressing it, s", _number(2)),
        ("decode_ms", "ms a token", _number(1)),
        ("tokens_per_second", "tokens/s", _number(1)),
    ],
}

TRANSPOSED = {"demo"}


def cells(
    rows: Sequence[dict], keys: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Headings and formatted cells of rows of one benchmark; empty where a row lacks a value.

    Rows that are only drawn are left out, those of retrieval and of errors of keys summarized. For
    the benchmarks of ``TRANSPOSED`` each row of results becomes a column.

    Parameters
    ----------
    rows : of one benchmark.
    keys : the columns to show, by their keys in the rows and in this order; None for all.

    Raises
    ------
    ValueError
        For rows of no known benchmark, or a key that is no column of their table.
    """
    from svdq_bench.quality.summary import DRAWN_ONLY, summarize_key_errors

    rows = [row for row in rows if row.get("benchmark") not in DRAWN_ONLY]
    if not rows or rows[0].get("benchmark") not in COLUMNS:
        raise ValueError(f"expected rows with benchmark one of {sorted(COLUMNS)}")
    benchmark = rows[0]["benchmark"]
    columns = COLUMNS[benchmark]
    if benchmark == "retrieval":
        rows, pooled = _retrieval_columns(rows)
        columns = columns + pooled
    elif benchmark == "sparsity":
        rows, budgets = _recall_columns(rows)
        columns = columns + budgets
    elif benchmark == "key_error":
        rows = summarize_key_errors(rows)
    columns = [c for c in columns if any(c[0] in row for row in rows)]
    if len({row.get("text") for row in rows}) == 1:  # one text for all needs no column
        columns = [c for c in columns if c[0] != "text"]
    if keys is not None:
        columns = _chosen_columns(columns, keys)
    body = [
        ["" if row.get(key) is None else write(row[key]) for key, _, write in columns]
        for row in rows
    ]
    headings = [heading for _, heading, _ in columns]
    if benchmark in TRANSPOSED:
        headings, *body = map(list, zip(headings, *body, strict=True))
    return headings, body


def _chosen_columns(columns: list[tuple], keys: Sequence[str]) -> list[tuple]:
    """The columns of these keys, in the order of the keys."""
    by_key = {column[0]: column for column in columns}
    unknown = [key for key in keys if key not in by_key]
    if unknown:
        raise ValueError(f"the table has no column {unknown[0]!r}, only {', '.join(by_key)}")
    return [by_key[key] for key in keys]


def _retrieval_columns(rows: Sequence[dict]) -> tuple[list[dict], list]:
    """A row a method, and the columns of its accuracies by task and by length of context."""
    from svdq_bench.quality.summary import summarize

    summary = [_with_intervals(line) for line in summarize(rows)]
    keys = list(dict.fromkeys(key for row in summary for key in row))
    columns = []
    for key in keys:
        kind, _, name = key.partition(": ")
        if kind == "task":  # in words, so that a heading can wrap
            columns.append((key, name.replace("_", " "), _percent))
    columns.append(("able", "all that the model can do", _percent))
    columns.append(("able_interval", "points to the full cache", _points_interval))
    lengths = [key for key in keys if key.startswith("tokens: ")]
    for key in lengths if len(lengths) > 1 else []:  # of one length it is the column before
        columns.append((key, f"these at {int(key.removeprefix('tokens: ')):,}", _percent))
    columns.append(("probability", "probability of the answer", _percent))
    columns.append(("probability_interval", "points to the full cache", _points_interval))
    columns.append(("log_likelihood", "log-likelihood, nats", _number(3)))
    columns.append(("log_likelihood_interval", "nats to the full cache", _nats_interval))
    return summary, columns


def _with_intervals(line: dict) -> dict:
    """A line of the summary with each difference and its half-width, if it has one, in a pair."""
    pairs = {
        f"{name}_interval": (line[f"{name}_difference"], line.get(f"{name}_half_width"))
        for name in ("able", "log_likelihood", "probability")
        if f"{name}_difference" in line
    }
    return line | pairs


def _recall_columns(rows: Sequence[dict]) -> tuple[list[dict], list]:
    """A row a method, and the columns of its recall by budget."""
    from svdq_bench.quality.summary import summarize_recall

    summary = summarize_recall(rows)
    keys = list(dict.fromkeys(key for row in summary for key in row))
    budgets = [key for key in keys if key.startswith("budget: ")]
    return summary, [(key, key.removeprefix("budget: "), _number(3)) for key in budgets]


def layer_cells(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the ratios of errors of keys: a line a layer, a column a method.

    Methods are named by their numbers in the table of :func:`cells`.
    """
    rows = [row for row in rows if row.get("benchmark") == "key_error"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found: dict[int, dict[str, str]] = {}
    for row in rows:
        ratio = row["ratio"]
        found.setdefault(row["layer"], {})[row["method"]] = "" if ratio is None else f"{ratio:.1f}"
    body = [[str(layer), *(line.get(m, "") for m in methods)] for layer, line in found.items()]
    return ["layer", *(str(i) for i in range(1, len(methods) + 1))], body
