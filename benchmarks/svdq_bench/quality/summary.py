"""Rows pooled: of retrieval by task, length, and what the model itself can do; errors of keys over
layers; recall by budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from svdq_bench.quality.budgets import budget_text
from svdq_bench.quality.intervals import Interval, mean_half_width

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
    """One row a method: scores by task and by length, pooled over the rest.

    Returns
    -------
    Rows with method, v_bits, text, the means of k_bits, all_in_bits, cache_ratio and
    times_smaller_bf16, of sparse ones the budget and what was read, ``task: NAME`` and ``tokens:
    LENGTH`` (accuracies; the latter over the tasks that the model itself can do, if there are any),
    ``able``, the mean over these tasks, and ``log_likelihood`` and ``probability``, means over the
    tasks whose answers are fixed. Each of the three has a ``_difference`` from the full cache's and
    the ``_half_width`` of its 95 % confidence interval.
    """
    able = able_tasks(rows)
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        # Matched peers differ in their settings from length to length; they are one method.
        name = row.get("matched") or row["method"]
        found.setdefault((name, row.get("v_bits"), row.get("text")), []).append(row)
    summary = []
    for (method, v_bits, text), group in found.items():
        line = {"benchmark": "retrieval-summary", "method": method}
        line |= {k: v for k, v in (("v_bits", v_bits), ("text", text)) if v is not None}
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
            line |= _difference("able", "accuracy", tasks)
        for score in ("log_likelihood", "probability"):
            tasks = [part for part in by_task.values() if part and score in part[0]]
            if tasks:
                line[score] = statistics.fmean(pooled(part, score) for part in tasks)
                line |= _difference(score, score, tasks)
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


def _difference(name: str, score: str, tasks: Sequence[Sequence[dict]]) -> dict[str, float]:
    """A method's mean score over tasks less the full cache's, and how sure that is.

    Both answer the same questions, so that differences of contexts are what varies. Empty where
    rows do not say their squares; without a width where a task has one context alone.
    """
    square = f"{score}_square"
    if not all(square in row for rows in tasks for row in rows):
        return {}
    intervals = []
    for rows in tasks:
        contexts = sum(row["contexts"] for row in rows)
        mean = pooled(rows, score) - pooled(rows, f"full_{score}")
        squares = sum(row[square] * row["contexts"] for row in rows) / contexts
        intervals.append(Interval(mean, squares, contexts))
    found = {f"{name}_difference": statistics.fmean(one.mean for one in intervals)}
    half_width = mean_half_width(intervals)
    return found if half_width is None else found | {f"{name}_half_width": half_width}


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
