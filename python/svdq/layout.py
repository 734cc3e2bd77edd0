"""Layout of a layer's packed pages: which heads, which channels at which width, which value
format."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from svdq import _C

FORMAT_VERSION: int = _C.format.VERSION
PAGE_TOKENS: int = _C.format.PAGE_TOKENS
WIDTHS: tuple[int, ...] = tuple(_C.format.WIDTHS)
ROPE_MODES: tuple[str, ...] = ("pre", "post")


@dataclass(frozen=True)
class PageLayout:
    """What a page of one layer looks like. The same integers describe it to every operator and in
    files.

    Parameters
    ----------
    head_dim : channels of a head, D; a multiple of 16 up to 512.
    bands : per KV head, the number of channels at each width of ``WIDTHS`` (8, 4, 2, 1 bits), as
        :func:`svdq.ops.allocate_bits` returns them. Channels left over get no bits.
    rope : ``"pre"`` codes un-rotated keys (the paper), ``"post"`` codes rotated keys.
    v_bits : 2 or 4 (packed per token and group), 16 or 32 (values exact in the model's dtype).
    v_group_size : channels that share a value scale; a multiple of 16 dividing head_dim.
    version : format version of the pages.
    """

    head_dim: int
    bands: tuple[tuple[int, int, int, int], ...]
    rope: str = "pre"
    v_bits: int = 4
    v_group_size: int = 64
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.rope not in ROPE_MODES:
            raise ValueError(f"rope must be one of {ROPE_MODES}, got {self.rope!r}")
        object.__setattr__(self, "bands", tuple(tuple(int(n) for n in head) for head in self.bands))
        _C.check_layout(self.ints)

    @functools.cached_property
    def ints(self) -> list[int]:
        """The integers that describe it to operators (``kLayoutHeader`` in kernels/format.h)."""
        none = (0,) * len(WIDTHS)
        head_ints = [
            n for head in self.bands for n in (head + none if self.rope == "pre" else none + head)
        ]
        rope = ROPE_MODES.index(self.rope)
        header = [self.version, len(self.bands), self.head_dim, rope, self.v_bits]
        return [*header, self.v_group_size, *head_ints]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> PageLayout:
        """Inverse of :attr:`ints`; raises ``ValueError`` for integers that are no valid layout."""
        ints = [int(n) for n in ints]
        _C.check_layout(ints)
        version, num_heads, head_dim, rope, v_bits, v_group_size = ints[:6]
        n = len(WIDTHS)
        heads = [ints[6 + 2 * n * h : 6 + 2 * n * (h + 1)] for h in range(num_heads)]
        bands = tuple(tuple(head[n:] if rope else head[:n]) for head in heads)
        return cls(head_dim, bands, ROPE_MODES[rope], v_bits, v_group_size, version)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer, H."""
        return len(self.bands)

    @functools.cached_property
    def rank(self) -> int:
        """Coded channels of all heads together: rows of the flattened basis, R."""
        return sum(sum(head) for head in self.bands)

    @functools.cached_property
    def k_bits(self) -> float:
        """Code bits per key number, without any overhead."""
        bits = sum(n * width for head in self.bands for n, width in zip(head, WIDTHS, strict=True))
        return bits / (self.num_kv_heads * self.head_dim)

    @functools.cached_property
    def k_page_bytes(self) -> int:
        """Bytes of one key page: the row length of ``k_pages``."""
        return _C.k_page_bytes(self.ints)

    @functools.cached_property
    def v_page_bytes(self) -> int:
        """Bytes of one value page: the row length of ``v_pages`` in bytes."""
        return _C.v_page_bytes(self.ints)
