"""Layout of a layer's packed pages: heads, channels at each width, value format."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from svdq import _C

FORMAT_VERSION: int = _C.format.VERSION
PAGE_TOKENS: int = _C.format.PAGE_TOKENS
WIDTHS: tuple[int, ...] = tuple(_C.format.WIDTHS)
ROPE_MODES: tuple[str, ...] = tuple(_C.format.ROPE_MODES)
VALUE_BITS: tuple[int, ...] = tuple(_C.format.VALUE_BITS)  # of packed values
PLAIN_KEYS, EXACT_VALUES, PLAIN_VALUES = 0, 0, 1  # KeyCoding, ValueCoding of kernels/format.h
NO_SLOT: int = _C.format.NO_SLOT  # stands for no token in lists of slots

Bands = tuple[int, int, int, int]  # channels of one head at each width of WIDTHS
NO_BANDS: Bands = (0, 0, 0, 0)


def pages_of(num_tokens: int) -> int:
    """Pages that hold this many slots."""
    return -(-num_tokens // PAGE_TOKENS)


@dataclass(frozen=True)
class PageLayout:
    """Layout of the pages of one layer. The same integers describe it to every operator and in
    files.

    Parameters
    ----------
    head_dim : channels of a head, D; a multiple of 16 up to 512.
    bands : per KV head, the number of channels at each width of ``WIDTHS`` (8, 4, 2, 1 bits), as
        :func:`svdq.ops.allocate_bits` returns them. Channels left over get no bits.
    rope : ``"pre"`` codes un-rotated keys (the paper), ``"post"`` codes rotated keys, ``"hybrid"``
        codes ``pre_bands`` of the un-rotated keys and, as ``bands``, what those leave of the
        rotated keys.
    v_bits : bits of a value, of each KV head or one number for all: 2, 3 or 4 (rotated and packed,
        a scale a token), or 16 or 32 (exact, in the model's dtype) for all heads. Kept as a tuple.
    version : format version of the pages.
    pre_bands : per KV head, like ``bands``, for ``"hybrid"`` alone. None (the default) for all
        heads is the "rotated mean": the un-rotated keys' mean is rotated, all channels are
        post-RoPE channels.
    """

    head_dim: int
    bands: tuple[Bands, ...]
    rope: str = "pre"
    v_bits: int | tuple[int, ...] = 4
    version: int = FORMAT_VERSION
    pre_bands: tuple[Bands, ...] = ()

    def __post_init__(self) -> None:
        if self.rope not in ROPE_MODES:
            raise ValueError(f"rope must be one of {ROPE_MODES}, got {self.rope!r}")
        if self.rope == "hybrid":
            pre_bands = self.pre_bands or (NO_BANDS,) * len(self.bands)
            object.__setattr__(self, "pre_bands", pre_bands)
        elif self.pre_bands:
            raise ValueError(f"pre_bands are for rope 'hybrid' alone, got rope {self.rope!r}")
        if self.pre_bands and len(self.pre_bands) != len(self.bands):
            raise ValueError(
                f"pre_bands must have one entry for each of {len(self.bands)} heads, got "
                f"{len(self.pre_bands)}"
            )
        v_bits = self.v_bits
        if isinstance(v_bits, int):
            v_bits = (v_bits,) * len(self.bands)
        if len(v_bits) != len(self.bands):
            raise ValueError(
                f"v_bits must be one number or one for each of {len(self.bands)} heads, got "
                f"{self.v_bits}"
            )
        object.__setattr__(self, "v_bits", tuple(int(n) for n in v_bits))
        for name in ("bands", "pre_bands"):
            bands = tuple(tuple(int(n) for n in head) for head in getattr(self, name))
            object.__setattr__(self, name, bands)
        _C.check_layout(self.ints)

    @functools.cached_property
    def head_bands(self) -> tuple[tuple[Bands, Bands], ...]:
        """Bands of every head's pre-RoPE and post-RoPE channels, in the order of basis and page."""
        none = (NO_BANDS,) * len(self.bands)
        pre = self.bands if self.rope == "pre" else self.pre_bands or none
        post = none if self.rope == "pre" else self.bands
        return tuple(zip(pre, post, strict=True))

    @functools.cached_property
    def ints(self) -> list[int]:
        """The integers that describe it to operators (``kLayoutHeader`` in kernels/format.h)."""
        rope = ROPE_MODES.index(self.rope)
        header = [self.version, len(self.bands), self.head_dim, rope, PLAIN_KEYS]
        header.append(PLAIN_VALUES if self.packs_values else EXACT_VALUES)
        for (pre, post), v_bits in zip(self.head_bands, self.v_bits, strict=True):
            header += [*pre, *post, v_bits]
        return header

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> PageLayout:
        """Inverse of :attr:`ints`; raises ``ValueError`` for integers that are no valid layout."""
        ints = [int(n) for n in ints]
        _C.check_layout(ints)
        version, num_heads, head_dim, rope = ints[:4]
        n = len(WIDTHS)
        size = 2 * n + 1  # integers of a head
        heads = [ints[6 + size * h : 6 + size * (h + 1)] for h in range(num_heads)]
        pre, post = (tuple(tuple(h[at]) for h in heads) for at in (slice(n), slice(n, 2 * n)))
        mode = ROPE_MODES[rope]
        bands = pre if mode == "pre" else post
        pre_bands = pre if mode == "hybrid" else ()
        v_bits = tuple(head[-1] for head in heads)
        return cls(head_dim, bands, mode, v_bits, version, pre_bands)

    @functools.cached_property
    def packs_values(self) -> bool:
        """True if values are packed, False if they are exact."""
        return all(bits in VALUE_BITS for bits in self.v_bits)

    @functools.cached_property
    def mean_v_bits(self) -> float:
        """Code bits per value number, without scales."""
        return sum(self.v_bits) / len(self.v_bits)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer, H."""
        return len(self.bands)

    @functools.cached_property
    def rank(self) -> int:
        """Coded channels of all heads together: rows of the flattened basis, R."""
        return sum(map(sum, (*self.bands, *self.pre_bands)))

    @property
    def pre_part(self) -> PageLayout | None:
        """The pre-RoPE channels as a layout of their own; None where there are none."""
        bands = self.pre_bands if self.rope == "hybrid" else self.bands
        return None if self.rope == "post" else self._part("pre", bands)

    @property
    def post_part(self) -> PageLayout | None:
        """The post-RoPE channels as a layout of their own; None where there are none."""
        return None if self.rope == "pre" else self._part("post", self.bands)

    def _part(self, rope: str, bands: tuple[Bands, ...]) -> PageLayout | None:
        channels = sum(map(sum, bands))
        return replace(self, rope=rope, bands=bands, pre_bands=()) if channels else None

    @functools.cached_property
    def k_bits(self) -> float:
        """Code bits per key number, without any overhead."""
        bands = (*self.bands, *self.pre_bands)
        bits = sum(n * width for head in bands for n, width in zip(head, WIDTHS, strict=True))
        return bits / (self.num_kv_heads * self.head_dim)

    @functools.cached_property
    def k_page_bytes(self) -> int:
        """Bytes of one key page: the row length of ``k_pages``."""
        return _C.k_page_bytes(self.ints)

    @functools.cached_property
    def v_page_bytes(self) -> int:
        """Bytes of one value page: the row length of ``v_pages`` in bytes."""
        return _C.v_page_bytes(self.ints)

    @functools.cached_property
    def v_code_bytes(self) -> int:
        """Bytes of one value page without its scales."""
        return _C.format.value_code_bytes(self.ints)

    def proxy_page_bytes(self, channels: int) -> int:
        """Bytes of a key page that scoring it by each head's first ``channels`` channels reads."""
        return _C.format.proxy_page_bytes(self.ints, channels)
