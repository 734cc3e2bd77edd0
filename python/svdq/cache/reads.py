"""What a decoding step reads of the keys."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import Tensor

from svdq.layout import PAGE_TOKENS, WIDTHS, PageLayout
from svdq.store.packed import PackedStore
from svdq.store.sparsity import Sparsity

if TYPE_CHECKING:
    from svdq.cache.cache import SVDqCache
    from svdq.cache.layer import SVDqLayer

FULL_BYTES = 2  # of a key number in a full cache of 16 bits, what papers compare with


@dataclass
class ReadReport:
    """Bytes of keys that the last step of one token read, over all compressed layers.

    Attributes
    ----------
    codes : codes of the packed tokens that were attended.
    scan : leading channels or landmarks of all packed tokens, which chose those.
    exact : sinks, window and outliers.
    coding : bases, scales and means.
    lists : slots of the chosen tokens, page tables.
    full : keys of all tokens in 16 bits.
    attended, packed : packed tokens that a KV head attended to, and that there are; mean over
        layers, in the longest sequence.
    """

    codes: int = 0
    scan: int = 0
    exact: int = 0
    coding: int = 0
    lists: int = 0
    full: int = 0
    attended: float = 0.0
    packed: float = 0.0

    @property
    def total(self) -> int:
        """Everything that was read for keys."""
        return self.codes + self.scan + self.exact + self.coding + self.lists

    @property
    def code_ratio(self) -> float:
        """How many times fewer bytes than a full cache, codes alone: the number papers quote."""
        return self.full / self.codes if self.codes else float("inf")

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than a full cache, everything counted."""
        return self.full / self.total if self.total else float("inf")

    def __str__(self) -> str:
        names = [field.name for field in fields(self)][:5]
        lines = [f"{name:<16}{getattr(self, name):>14,} B" for name in names]
        lines.append(f"{'total':<16}{self.total:>14,} B  ({self.ratio:.1f}x fewer)")
        lines.append(f"{'full cache':<16}{self.full:>14,} B  ({self.code_ratio:.1f}x codes alone)")
        lines.append(f"{'packed tokens':<16}{self.attended:>14,.0f}    of {self.packed:,.0f}")
        return "\n".join(lines)


def read_report(cache: SVDqCache) -> ReadReport:
    """Report of the last step, from shapes and the number of tokens that were chosen."""
    report = ReadReport()
    layers = [layer for layer in cache.svdq_layers if layer.attended is not None]
    if not layers:
        raise RuntimeError("no step of one token has attended to packed tokens yet")
    for layer in layers:
        _add_layer(report, layer)
    report.attended /= len(layers)
    report.packed /= len(layers)
    return report


def lead_bytes(layout: PageLayout, channels: int) -> int:
    """Bytes a token of the lines with the leading channels of all heads."""
    bits = 0
    for h in range(layout.num_kv_heads):
        left = channels
        for bands in (layout.pre_bands, layout.bands):
            for count, width in zip(bands[h] if bands else (), WIDTHS, strict=False):
                used = min(count, left)
                bits += (used if width > 1 else -(-used // 8) * 8) * width
                left -= used
    return bits // 8


def _add_layer(report: ReadReport, layer: SVDqLayer) -> None:
    tokens = layer.tokens
    batch, heads, dim = tokens.shape
    row_bytes = heads * dim * tokens.rows.keys.itemsize
    report.full += sum(tokens.count(b) for b in range(batch)) * heads * dim * FULL_BYTES
    report.exact += sum(tokens.rows.count) * row_bytes
    sinks = layer.settings.sink_tokens
    # A store that the step itself has opened is empty and comes last.
    for store, attended in zip(tokens.stores, layer.attended, strict=False):
        report.attended += attended
        report.packed += store.tokens_after(sinks)
        add_store(report, store, attended, sinks, layer.sparsity)
        sinks = 0


def add_store(
    report: ReadReport, store: PackedStore, attended: int, sinks: int, sparsity: Sparsity | None
) -> None:
    """Add what a step read of a store when a KV head attended to so many of its tokens."""
    layout = store.layout
    for slots in store.slots:
        chosen = min(attended, max(slots - sinks, 0))
        report.codes += chosen * layout.k_page_bytes // PAGE_TOKENS
        if sparsity is None or attended >= store.tokens_after(sinks):
            continue
        report.lists += 4 * chosen * layout.num_kv_heads
        if sparsity.scorer == "latent":
            report.scan += slots * lead_bytes(layout, sparsity.channels)
        else:
            report.scan += store.landmarks.scan_bytes(slots)
    coding = [getattr(store, name) for name in store.coding]
    report.coding += sum(map(_nbytes, coding))
    report.lists += _nbytes(store.page_table)
    if store.outliers is not None:
        report.exact += _nbytes(store.outliers.keys)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
