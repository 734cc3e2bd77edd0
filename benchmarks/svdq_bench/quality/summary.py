"""Rows pooled: of retrieval by task, length, and what the model itself can do; errors of keys over
layers; recall by budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from svdq_bench.quality.budgets import budget_text

# Benchmarks whose rows, one for every head, are only drawn.
DRAWN_ONLY = ("bits", "spectrum")
# A task is the model's own to fail where the full cache's accuracy is below this.
ABLE = 0.5


def able_tasks(rows: Sequence[dict]) -> set[str]:
    """Tasks whose pooled accuracy of the full cache is at least ``ABLE``."""
    tasks = {row["task"] for row in rows}
    return {
        task
        for task in tasks
        if pooled([row for row in rows if row["task"] == task], "full_accuracy") >= ABLE
    }


def pooled(rows: Sequence[dict], key: str = "accuracy") -> float:
    """Mean of a column, rows weighted by their samples."""
    return sum(row[key] * row["samples"] for row in rows) / sum(row["samples"] for row in rows)


def summarize(rows: Sequence[dict]) -> list[dict]:
    """One row a method: accuracy by task and by length, pooled over the rest.

    Returns
    -------
    Rows with method, the means of k_bits, all_in_bits, cache_ratio and times_smaller_bf16, of
    sparse ones the budget and what was read, ``task: NAME`` and ``tokens: LENGTH`` (accuracies; the
    latter over the tasks that the model itself can do, if there are any), ``able``, the mean over
    these tasks, ``able_difference`` to the full cache's, and ``able_stderr``, the standard error of
    that difference.
    """
    able = able_tasks(rows)
    found: dict[str, list[dict]] = {}
    for row in rows:
        # Matched peers differ in their settings from length to length; they are one method.
        found.setdefault(row.get("matched") or row["method"], []).append(row)
    summary = []
    for method, group in found.items():
        line = {"benchmark": "retrieval-summary", "method": method}
        for key in ("k_bits", "all_in_bits", "cache_ratio"):
            line[key] = pooled(group, key)
        if all("times_smaller_bf16" in row for row in group):
            line["times_smaller_bf16"] = pooled(group, "times_smaller_bf16")
        if "budget" in group[0]:
            line["budget"] = group[0]["budget"]
        if all("read_ratio" in row for row in group):
            line |= {key: pooled(group, key) for key in ("code_read_ratio", "read_ratio")}
        by_task = {task: [r for r in group if r["task"] == task] for task in _order(rows, "task")}
        line |= {f"task: {task}": pooled(part) for task, part in by_task.items() if part}
        doable = [row for row in group if row["task"] in able]
        if doable:
            for length in _order(rows, "context_tokens"):
                part = [row for row in doable if row["context_tokens"] == length]
                if part:
                    line[f"tokens: {length}"] = pooled(part)
            tasks = [by_task[task] for task in sorted(able) if by_task[task]]
            line["able"] = statistics.fmean(map(pooled, tasks))
            line |= _difference(tasks)
        summary.append(line)
    return summary


def summarize_recall(rows: Sequence[dict]) -> list[dict]:
    """One row a method: scan_bytes where it has any, and ``budget: BUDGET``, what it recalls."""
    summary = []
    for method in _order(rows, "method"):
        group = [row for row in rows if row["method"] == method]
        line = {"benchmark": "sparsity-summary", "method": method}
        if "scan_bytes" in group[0]:
            line["scan_bytes"] = group[0]["scan_bytes"]
        line |= {f"budget: {budget_text(row['budget'])}": row["recall"] for row in group}
        summary.append(line)
    return summary


def _difference(tasks: Sequence[Sequence[dict]]) -> dict[str, float]:
    """A method's accuracy, a mean over tasks, less the full cache's, and how sure that is.

    Both answer the same samples, so that differences of single samples are what varies. Empty where
    rows do not say their squares, or a task has one sample alone.
    """
    counts = [sum(row["samples"] for row in rows) for rows in tasks]
    if min(counts) < 2 or not all("squared_difference" in row for rows in tasks for row in rows):
        return {}
    means = [pooled(rows) - pooled(rows, "full_accuracy") for rows in tasks]
    variances = [
        max(pooled(rows, "squared_difference") - mean**2, 0) / (count - 1)
        for rows, mean, count in zip(tasks, means, counts, strict=True)
    ]
    return {
        "able_difference": statistics.fmean(means),
        "able_stderr": math.sqrt(sum(variances)) / len(tasks),
    }


def summarize_key_errors(rows: Sequence[dict]) -> list[dict]:
    """One row a method: bits and error, mean over layers, and how the ratios spread over layers.

    Returns
    -------
    Rows with number (from 1), method, bits, all_in_bits, relative_error, the minimum, median and
    mean of ratio, and the median of score_ratio; without what no layer has.
    """
    summary = []
    for number, method in enumerate(_order(rows, "method"), 1):
        group = [row for row in rows if row["method"] == method]
        line = {"benchmark": "key_error-summary", "method": method, "number": number}
        for key in ("bits", "all_in_bits", "relative_error"):
            line[key] = _over_layers(statistics.fmean, group, key)
        line["ratio_min"] = _over_layers(min, group, "ratio")
        line["ratio_median"] = _over_layers(statistics.median, group, "ratio")
        line["ratio_mean"] = _over_layers(statistics.fmean, group, "ratio")
        line["score_ratio_median"] = _over_layers(statistics.median, group, "score_ratio")
        summary.append({key: value for key, value in line.items() if value is not None})
    return summary


def _over_layers(
    pool: Callable[[list[float]], float], rows: Sequence[dict], key: str
) -> float | None:
    """A column pooled, or None where no row has a value."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return pool(values) if values else None


def _order(rows: Sequence[dict], key: str) -> list:
    """Values of a column in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))
