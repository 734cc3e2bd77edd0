"""Calls of attend to test every backend with."""

from dataclasses import dataclass, field

import torch

PAPER_1_25 = (4, 4, 2, 0, 0, 0, 0, 0)
PAPER_2_25 = (8, 4, 4, 2, 0, 0, 0, 0)
MIXED = (8, 4, 2, 1, 1, 0, 0, 0)
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call of attend; heads are KV heads, groups are query heads of each."""

    schedule: tuple[int, ...] = MIXED
    rope: str = "post"
    head_dim: int = 64
    heads: int = 2
    group: int = 2
    q_len: int = 1
    seqlens: tuple[int, ...] = (150,)
    window_lens: tuple[int, ...] = (20,)
    dtype: torch.dtype = FLOAT32
    v_bits: int | tuple[int, ...] = 4
    bands: tuple = ()  # instead of a schedule
    pre_bands: tuple = ()  # of a hybrid case
    options: dict = field(default_factory=dict, hash=False)  # of make_cache


def pre(**changes) -> Case:
    return Case(rope="pre", **changes)


def hybrid(**changes) -> Case:
    return Case(rope="hybrid", **changes)


def rotated_mean(**changes) -> Case:
    """Hybrid without pre-RoPE channels."""
    return hybrid(pre_bands=((0, 0, 0, 0),) * changes.get("heads", 2), **changes)


CASES = {
    "paper-1.25-post": Case(PAPER_1_25, head_dim=128, group=4, options={"sink_tokens": 8}),
    "paper-1.25-pre": pre(schedule=PAPER_1_25, head_dim=128, group=4, options={"sink_tokens": 8}),
    "paper-2.25-post": Case(PAPER_2_25, head_dim=128, group=4),
    "paper-2.25-pre": pre(schedule=PAPER_2_25, head_dim=128, group=4),
    "8-bit": Case((8,)),
    "8-bit-pre": pre(schedule=(8,)),
    "4-bit": Case((4,)),
    "2-bit-pre": pre(schedule=(2,)),
    "1-bit": Case((1,)),
    "1-bit-pre": pre(schedule=(1,)),
    "head-dim-16": Case((4, 2), head_dim=16),
    "head-dim-80": pre(head_dim=80),
    "head-dim-96": Case(head_dim=96),
    "head-dim-256": pre(head_dim=256, seqlens=(70,)),
    "head-dim-512": Case(head_dim=512, seqlens=(70,)),
    "mha": Case(heads=4, group=1),
    "gqa-3": pre(heads=3, group=3),
    "gqa-4": Case(group=4),
    "gqa-7": pre(group=7),
    "mqa": Case(heads=1, group=8),
    "batch": Case(q_len=2, seqlens=(130, 0, 64), window_lens=(5, 17, 130)),
    "batch-pre": pre(
        q_len=2,
        seqlens=(130, 1, 64),
        window_lens=(5, 17, 2),
        options={"first_positions": [0, -7, 100_000], "sink_tokens": 4},
    ),
    "heads-of-different-size": Case(
        bands=((8, 0, 4, 8), (0, 0, 0, 0), (0, 12, 0, 0), (0, 0, 4, 32)), heads=4
    ),
    "heads-of-different-size-pre": pre(
        bands=((8, 0, 4, 8), (0, 0, 0, 0), (0, 12, 0, 0), (0, 0, 4, 32)), heads=4
    ),
    "partial-rotary": pre(head_dim=80, options={"rotary_dim": 32}),
    "rotary-of-one-pair": pre(options={"rotary_dim": 2}),
    "one-packed-token": pre(seqlens=(1,)),
    "window-of-one": Case(window_lens=(1,)),
    "full-pages": pre(seqlens=(128,), window_lens=(64,)),
    "a-slot-past-a-page": Case(seqlens=(129,), window_lens=(65,)),
    "empty-packed": Case(seqlens=(0,)),
    "empty-packed-pre": pre(seqlens=(0,), q_len=3),
    "empty-window": Case(window_lens=(0,), options={"causal": False}),
    "sinks-over-a-page": pre(options={"sink_tokens": 70}),
    "sinks-are-all": Case(seqlens=(60, 150), window_lens=(20, 20), options={"sink_tokens": 64}),
    "not-causal": Case(q_len=5, options={"causal": False}),
    "more-queries-than-rows": Case(q_len=7, seqlens=(0, 70), window_lens=(3, 4)),
    "q-len-17": pre(q_len=17, window_lens=(90,)),
    "q-len-64": Case(q_len=64, window_lens=(64,), group=3),
    "splits": Case(PAPER_1_25, seqlens=(4097,), window_lens=(70,), heads=1),
    "splits-pre": pre(schedule=PAPER_1_25, seqlens=(4250, 40), window_lens=(70, 9), heads=1),
    "2-bit-values": Case(v_bits=2),
    "2-bit-values-of-96": pre(v_bits=2, head_dim=96),
    "3-bit-values": Case(v_bits=3),
    "3-bit-values-of-128": pre(v_bits=3, head_dim=128, group=4),
    "3-bit-values-of-80": Case(v_bits=3, head_dim=80, q_len=3),
    "values-differ-by-head": Case(v_bits=(4, 2), head_dim=128, group=4),
    "values-differ-by-head-pre": pre(v_bits=(3, 4, 2), heads=3, q_len=17, window_lens=(90,)),
    "bfloat16-values": Case(v_bits=16, options={"v_dtype": BFLOAT16}),
    "float16-values": pre(v_bits=16, options={"v_dtype": FLOAT16}),
    "float32-values": Case(v_bits=32),
    "bfloat16": pre(dtype=BFLOAT16, options={"window_dtype": BFLOAT16}),
    "float16": Case(dtype=FLOAT16, options={"window_dtype": FLOAT16}),
    "mixed-dtypes": Case(dtype=BFLOAT16, options={"window_dtype": FLOAT32}),
    "float32-on-bfloat16": pre(options={"window_dtype": BFLOAT16}),
    "hybrid-paper-1.25": hybrid(
        schedule=PAPER_1_25, head_dim=128, group=4, options={"sink_tokens": 8}
    ),
    "hybrid-mixed": hybrid(group=4),
    "hybrid-every-pre-width": hybrid(pre_bands=((4, 8, 4, 8),) * 2),
    "hybrid-1-bit-pre": hybrid(pre_bands=((0, 0, 0, 16),) * 2),
    "hybrid-all-channels-twice": hybrid(schedule=(2, 1), pre_bands=((0, 0, 32, 32),) * 2),
    "hybrid-head-dim-16": hybrid(schedule=(4, 2), head_dim=16),
    "hybrid-head-dim-80": hybrid(head_dim=80, options={"rotary_dim": 32}),
    "hybrid-head-dim-256": hybrid(head_dim=256, seqlens=(70,)),
    "hybrid-head-dim-512": hybrid(schedule=PAPER_1_25, head_dim=512, seqlens=(70,)),
    "hybrid-heads-of-different-size": hybrid(
        bands=((8, 0, 4, 8), (0, 0, 0, 0), (0, 12, 0, 0), (0, 0, 4, 32), (0, 0, 0, 0)),
        pre_bands=((0, 4, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (4, 0, 0, 8), (0, 4, 0, 0)),
        heads=5,
    ),
    "hybrid-pre-alone": hybrid(bands=((0, 0, 0, 0),) * 2, pre_bands=((8, 24, 32, 0),) * 2),
    "hybrid-batch": hybrid(
        q_len=2,
        seqlens=(130, 1, 0, 64),
        window_lens=(5, 17, 9, 2),
        options={"first_positions": [0, -7, 3, 100_000], "sink_tokens": 4},
    ),
    "hybrid-q-len-17": hybrid(q_len=17, window_lens=(90,)),
    "hybrid-splits": hybrid(schedule=PAPER_1_25, seqlens=(4250, 40), window_lens=(70, 9), heads=1),
    "hybrid-float32-values": hybrid(v_bits=32),
    "hybrid-bfloat16-values": hybrid(
        v_bits=16, q_len=5, dtype=BFLOAT16, options={"v_dtype": BFLOAT16, "window_dtype": BFLOAT16}
    ),
    "rotated-mean": rotated_mean(),
    "rotated-mean-paper-1.25": rotated_mean(
        schedule=PAPER_1_25, head_dim=128, group=4, options={"sink_tokens": 8}
    ),
    "rotated-mean-q-len-9": rotated_mean(q_len=9, window_lens=(90,)),
    "rotated-mean-splits": rotated_mean(
        schedule=PAPER_1_25, seqlens=(4250, 40), window_lens=(70, 9), heads=1
    ),
} | {f"q-len-{n}": Case(q_len=n, rope="pre" if n % 2 else "post") for n in range(1, 9)}
