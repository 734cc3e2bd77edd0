"""Synthetic keys, packed caches and comparisons that say where they failed."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from svdq import reference
from svdq.layout import PageLayout, pages_of
from svdq.ops import NO_RULES, KeyCodec, LogitRules, PackedKeys, Window

FLOAT_ERROR = 2.0**-24  # relative rounding error of float32
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor | float = 0.0) -> None:
    """Fails unless ``|actual - expected| <= tolerance`` everywhere, and shows the worst element."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {expected.shape}"
    got, want = actual.double(), expected.double()
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64).expand_as(got)
    bad = ~((got - want).abs() <= tolerance) & (got != want)  # NaN is bad
    if not bad.any():
        return
    excess = torch.where(bad, (got - want).abs() - tolerance, -1.0).nan_to_num(nan=torch.inf)
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{int(bad.sum())} of {bad.numel()} elements ({bad.double().mean():.2%}) differ; worst at "
        f"{at}: got {got[at]:.9g}, expected {want[at]:.9g}, tolerance {tolerance[at]:.3g}"
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Fails unless dtype and every element are the same; NaN is never the same."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert_within(actual, expected)


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.double().square().mean().sqrt())


def make_inv_freq(rotary_dim: int, theta: float = 1e4) -> Tensor:
    """Inverse frequencies as models define them, [rotary_dim / 2] float32."""
    return theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)


def make_keys(
    num_heads: int,
    num_tokens: int,
    head_dim: int,
    mean: float = 2.0,
    inv_freq: Tensor | None = None,
    position: int = 0,
) -> Tensor:
    """Keys like a model's, [H, T, D] float32: each head's deviations fall from 1 to 1/64.

    They are rotated by ``inv_freq`` if it is given, so that un-rotated they are as compressible.
    """
    deviations = 64.0 ** -torch.linspace(0, 1, head_dim)
    bases = torch.linalg.qr(torch.randn(num_heads, head_dim, head_dim)).Q
    keys = torch.randn(num_heads, num_tokens, head_dim) * deviations @ bases
    keys += mean * torch.randn(num_heads, 1, head_dim)
    return reference.rotate(keys, position + torch.arange(num_tokens), inv_freq).float()


def assert_orthogonal(rows):
    """Rows of a basis [r, D] are orthogonal, of length 1 but for the root of a channel's gain."""
    lengths = rows.float().norm(dim=1)
    assert ((lengths > 0.7) & (lengths < 1.42)).all()  # gains are 1/2 to 2
    unit = rows.float() / lengths[:, None]
    assert_within(unit @ unit.T, torch.eye(len(rows)), 0.02)


def make_layout(
    head_dim: int, schedule: list[int], num_heads: int = 1, rope: str = "post", **options
) -> PageLayout:
    """Layout of a schedule of equal groups, the same for all heads.

    A hybrid one has 4 pre-RoPE channels of 8 and 4 of 4 bits in addition, unless ``pre_bands``
    says otherwise.
    """
    bands = reference.allocate_bits(torch.zeros(num_heads, head_dim), schedule)
    if rope == "hybrid":
        options.setdefault("pre_bands", ((4, 4, 0, 0),) * num_heads)
    return PageLayout(head_dim, tuple(map(tuple, bands.tolist())), rope, **options)


def make_k_pages(layout: PageLayout, num_pages: int) -> Tensor:
    """A pool of key pages full of random codes."""
    return torch.randint(0, 256, (num_pages, layout.k_page_bytes), dtype=torch.uint8)


def make_v_pages(layout: PageLayout, num_pages: int, dtype: torch.dtype | None = None) -> Tensor:
    """A pool of value pages, every number of which is NaN until it is written."""
    if layout.packs_values:
        return torch.full((num_pages, layout.v_page_bytes), 255, dtype=torch.uint8)
    dtype = dtype or {16: torch.bfloat16, 32: torch.float32}[layout.v_bits[0]]
    return torch.full((num_pages, layout.v_page_bytes // dtype.itemsize), torch.nan, dtype=dtype)


@dataclass
class Cache:
    """Arguments of ``attend`` except the query, flat; what no sequence uses is random or NaN."""

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    cache_seqlens: Tensor
    basis: Tensor
    scale: Tensor
    mean: Tensor
    layout: PageLayout
    window_keys: Tensor
    window_values: Tensor
    window_lens: Tensor
    sm_scale: float
    inv_freq: Tensor | None
    first_position: Tensor | None
    sink_tokens: int
    causal: bool
    post_mean: Tensor | None = None
    outlier_slots: Tensor | None = None
    outlier_keys: Tensor | None = None
    token_slots: Tensor | None = None
    rules: LogitRules = NO_RULES
    query_position: Tensor | None = None

    @property
    def codec(self) -> KeyCodec:
        return KeyCodec(self.basis, self.scale, self.mean, self.post_mean, self.inv_freq)

    @property
    def packed(self) -> PackedKeys:
        return PackedKeys(
            self.layout,
            self.codec,
            self.k_pages,
            self.page_table,
            self.cache_seqlens,
            self.v_pages,
            self.first_position,
            self.sink_tokens,
            self.outlier_slots,
            self.outlier_keys,
            self.token_slots,
        )

    @property
    def window(self) -> Window:
        return Window(self.window_keys, self.window_values, self.window_lens)

    def kwargs(self) -> dict:
        """Keyword arguments of ``svdq.ops.attend`` and ``svdq.reference.attend``."""
        return {
            "packed": self.packed,
            "window": self.window,
            "sm_scale": self.sm_scale,
            "causal": self.causal,
            "rules": self.rules,
            "query_position": self.query_position,
        }

    def flat(self) -> dict[str, Any]:
        """Arguments of ``torch.ops.svdq.attend`` by the names of its schema."""
        others = {"sm_scale": self.sm_scale, "causal": self.causal}
        others["query_position"] = self.query_position
        return {**self.packed.flat(), **self.window.flat(), **self.rules.flat(), **others}

    def but(self, **changes) -> "Cache":
        """This cache with some fields replaced."""
        return replace(self, **changes)


def make_cache(
    layout: PageLayout,
    seqlens: list[int],
    window_lens: list[int],
    *,
    rotary_dim: int | None = None,
    first_positions: list[int] | None = None,
    sink_tokens: int = 0,
    causal: bool = True,
    window_dtype: torch.dtype = torch.float32,
    v_dtype: torch.dtype | None = None,
) -> tuple[Cache, list[Tensor], list[Tensor]]:
    """A cache packed by the reference, with the keys and values [H, T, D] of its sequences."""
    heads, dim, batch = layout.num_kv_heads, layout.head_dim, len(seqlens)
    inv_freq = make_inv_freq(rotary_dim or dim) if layout.rope != "post" else None
    num_pages = [pages_of(n) for n in seqlens]
    pool = sum(num_pages) + 2
    k_pages, v_pages = make_k_pages(layout, pool), make_v_pages(layout, pool, v_dtype)
    order = torch.randperm(pool, dtype=torch.int32)
    page_table = torch.zeros(batch, max(num_pages), dtype=torch.int32)
    basis = torch.zeros(batch, layout.rank, dim, dtype=torch.bfloat16)
    scale, mean = torch.zeros(batch, layout.rank), torch.zeros(batch, heads, dim)
    post_mean = torch.zeros(batch, heads, dim) if layout.rope == "hybrid" else None
    rows = max(window_lens) + 3
    exact = torch.full((2, batch, heads, rows, dim), torch.nan)
    keys, values = [], []
    for b, tokens in enumerate(seqlens):
        table = order[sum(num_pages[:b]) :][: num_pages[b]]
        page_table[b, : len(table)] = table
        position = first_positions[b] if first_positions else 0
        every = make_keys(heads, tokens + window_lens[b], dim, inv_freq=inv_freq, position=position)
        every_value = torch.randn_like(every)
        exact[0, b, :, : window_lens[b]] = every[:, tokens:]
        exact[1, b, :, : window_lens[b]] = every_value[:, tokens:]
        keys.append(every[:, :tokens])
        values.append(every_value[:, :tokens])
        if tokens == 0:
            continue
        codec = reference.fit_keys(keys[b], layout, inv_freq, position)
        for name, batched in (("basis", basis), ("scale", scale), ("mean", mean)):
            batched[b] = getattr(codec, name)
        if post_mean is not None:
            post_mean[b] = codec.post_mean
        reference.pack_keys_(k_pages, keys[b], codec, layout, table, 0, position=position)
        reference.pack_values_(v_pages, values[b], layout, table, 0)
    cache = Cache(
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=page_table,
        cache_seqlens=torch.tensor(seqlens, dtype=torch.int32),
        basis=basis,
        scale=scale,
        mean=mean,
        layout=layout,
        window_keys=exact[0].to(window_dtype),
        window_values=exact[1].to(window_dtype),
        window_lens=torch.tensor(window_lens, dtype=torch.int32),
        sm_scale=dim**-0.5,
        inv_freq=inv_freq,
        first_position=first_positions and torch.tensor(first_positions, dtype=torch.int32),
        sink_tokens=sink_tokens,
        causal=causal,
        post_mean=post_mean,
    )
    return cache, keys, values
