"""Bytes of keys that a decoding step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from svdq.cache.layer import SVDqLayer
from svdq.cache.tensor_walk import nbytes
from svdq.config.sparsity import Sparsity
from svdq.layout import PAGE_TOKENS
from svdq.store.layer_store import LayerStore
from svdq.store.packed import PackedStore

FULL_BYTES = 2  # of a key number in a full cache of 16 bits, which papers compare with


@dataclass
class ReadReport:
    """Bytes of keys that the last step of one token read, over all compressed layers.

    Attributes
    ----------
    codes : codes of the packed tokens that were attended.
    scan : proxy channels or landmarks of all packed tokens, which chose those.
    exact : keys of sinks, window and outliers.
    coding : bases, scales and means.
    lists : slots of the chosen tokens, page tables.
    full : keys of all tokens in 16 bits.
    attended, packed : packed tokens that a KV head attended to, and all packed tokens; mean over
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
        """All bytes read for keys."""
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


def read_report(layers: Sequence[SVDqLayer]) -> ReadReport:
    """Report of the last step, from shapes and the number of tokens that were chosen."""
    report = ReadReport()
    stores = [layer.tokens for layer in layers if layer.tokens is not None]
    stores = [tokens for tokens in stores if tokens.attended is not None]
    if not stores:
        raise RuntimeError("no step of one token has attended to packed tokens yet")
    for tokens in stores:
        _add_layer(report, tokens)
    report.attended /= len(stores)
    report.packed /= len(stores)
    return report


def _add_layer(report: ReadReport, tokens: LayerStore) -> None:
    batch, heads, dim = tokens.shape
    token_bytes = heads * dim * tokens.window.keys.itemsize
    report.full += sum(tokens.count(b) for b in range(batch)) * heads * dim * FULL_BYTES
    report.exact += sum(tokens.window.count) * token_bytes
    sinks = tokens.settings.sink_tokens
    # A store that the step itself has opened is empty and comes last.
    for store, attended in zip(tokens.stores, tokens.attended, strict=False):
        report.attended += attended
        report.packed += store.tokens_after(sinks)
        add_store(report, store, attended, sinks, tokens.sparsity)
        sinks = 0


def add_store(
    report: ReadReport, store: PackedStore, attended: int, sinks: int, sparsity: Sparsity | None
) -> None:
    """Add the reads of a step in a store, of whose tokens a KV head attended to so many."""
    layout = store.layout
    for slots in store.slots:
        chosen = min(attended, max(slots - sinks, 0))
        report.codes += chosen * layout.k_page_bytes // PAGE_TOKENS
        if sparsity is None or attended >= store.tokens_after(sinks):
            continue
        report.lists += 4 * chosen * layout.num_kv_heads
        if sparsity.scorer == "latent":
            report.scan += slots * layout.proxy_page_bytes(sparsity.channels) // PAGE_TOKENS
        else:
            report.scan += store.landmarks.scan_bytes(slots)
    report.coding += sum(map(nbytes, store.codec.tensors().values()))
    report.lists += nbytes(store.pool.page_table)
    if store.outliers is not None:
        report.exact += nbytes(store.outliers.keys)
