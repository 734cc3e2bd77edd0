"""Memory of a cache by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from svdq.cache.layer import SVDqLayer
from svdq.cache.tensor_walk import held_bytes, nbytes, reachable_tensors
from svdq.fit.allocator import Allocator
from svdq.layout import PAGE_TOKENS
from svdq.store.layer_store import LayerStore
from svdq.store.packed import PackedStore


@dataclass
class MemoryReport:
    """Bytes of a cache by part; the parts add up to all that is allocated.

    Attributes
    ----------
    key_codes, key_scale, key_basis, key_mean : packed keys, and their codecs.
    key_gain : gain of keys, and the energies of queries that it comes from.
    outlier_keys : keys of packed tokens that are held exact too, and their slots.
    landmarks : means of chunks, which choose the tokens that are attended.
    sink_keys, window_keys : uncompressed keys.
    page_tables : of keys and values both, counted with the keys.
    value_codes, value_scales, sink_values, window_values : the same for values; values of 16 and 32
        bits in pages are codes.
    value_loss : what coding values costs, by which their bits are allocated.
    lengths : lengths and positions of the sequences, inverse frequencies.
    waiting : bases and spectra of sequences whose bits are not allocated yet.
    calibration : what was calibrated for all prompts, once however many caches share it.
    other_layers : layers that are not compressed (sliding windows).
    slack : allocated to grow into, not in use.
    tokens : tokens of all sequences, padding not counted.
    key_numbers : numbers that the keys of these tokens have in the compressed layers.
    packed_numbers : those of them that are packed.
    full_bytes : of a cache that holds all tokens in the model's dtype.
    """

    key_codes: int = 0
    key_scale: int = 0
    key_basis: int = 0
    key_mean: int = 0
    key_gain: int = 0
    outlier_keys: int = 0
    landmarks: int = 0
    sink_keys: int = 0
    window_keys: int = 0
    page_tables: int = 0
    value_codes: int = 0
    value_scales: int = 0
    sink_values: int = 0
    window_values: int = 0
    value_loss: int = 0
    lengths: int = 0
    waiting: int = 0
    calibration: int = 0
    other_layers: int = 0
    slack: int = 0
    tokens: int = 0
    key_numbers: int = 0
    packed_numbers: int = 0
    full_bytes: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        names = [field.name for field in fields(self)]
        return {name: getattr(self, name) for name in names[: names.index("slack") + 1]}

    @property
    def prompt_bytes(self) -> int:
        """Everything allocated for these prompts: without what all prompts share."""
        return self.total_bytes - self.calibration

    @property
    def total_bytes(self) -> int:
        """Everything allocated."""
        return sum(self.parts.values())

    @property
    def key_bytes(self) -> int:
        """Everything allocated for the keys."""
        names = list(self.parts)
        return sum(self.parts[name] for name in names[: names.index("page_tables") + 1])

    @property
    def ratio(self) -> float:
        """Bytes of the full cache over those of this one."""
        return self.full_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def key_bits(self) -> float:
        """True bits of a key number: codes, scales, bases, means, exact keys and page tables."""
        return 8 * self.key_bytes / self.key_numbers if self.key_numbers else 0.0

    @property
    def code_bits(self) -> float:
        """Bits of a packed key number, codes alone: the number that papers quote."""
        return 8 * self.key_codes / self.packed_numbers if self.packed_numbers else 0.0

    @property
    def value_bytes(self) -> int:
        """Everything allocated for the values."""
        names = list(self.parts)
        first, last = names.index("value_codes"), names.index("value_loss")
        return sum(self.parts[name] for name in names[first : last + 1])

    @property
    def value_bits(self) -> float:
        """True bits of a value number: codes, scales and exact values."""
        return 8 * self.value_bytes / self.key_numbers if self.key_numbers else 0.0

    @property
    def value_code_bits(self) -> float:
        """Bits of a packed value number, codes alone."""
        return 8 * self.value_codes / self.packed_numbers if self.packed_numbers else 0.0

    def __str__(self) -> str:
        rows = [(name.replace("_", " "), size) for name, size in self.parts.items() if size]
        lines = [f"{name:<16}{size:>14,} B" for name, size in rows]
        lines.append(f"{'total':<16}{self.total_bytes:>14,} B  ({self.tokens:,} tokens)")
        lines.append(f"{'full cache':<16}{self.full_bytes:>14,} B  ({self.ratio:.2f}x)")
        lines.append(f"{'key bits':<16}{self.key_bits:>14.2f}    ({self.code_bits:.2f} in codes)")
        values = f"({self.value_code_bits:.2f} in codes)"
        lines.append(f"{'value bits':<16}{self.value_bits:>14.2f}    {values}")
        return "\n".join(lines)


def memory_report(
    layers: Sequence[Any], frequencies: Sequence[Tensor], allocator: Allocator | None
) -> MemoryReport:
    """Report of a cache's layers and of what they share, from shapes and layouts alone."""
    report = MemoryReport(lengths=sum(map(nbytes, frequencies)))
    report.waiting = sum(map(nbytes, reachable_tensors(allocator)))
    report.calibration = held_bytes([getattr(layer, "calibrated", None) for layer in layers])
    compressed = []
    for layer in layers:
        if not isinstance(layer, SVDqLayer):
            _add_other(report, layer)
        elif layer.seq_length:
            _add_layer(report, layer.tokens)
            static = getattr(layer, "static", None)
            if static is not None:
                report.lengths += nbytes(static.length) + nbytes(static.faults)
            compressed.append(layer.tokens)
    if compressed:
        first = compressed[0]
        report.tokens = sum(first.count(b) for b in range(first.shape[0]))
    return report


def _add_layer(report: MemoryReport, tokens: LayerStore) -> None:
    window, sinks = tokens.window, tokens.settings.sink_tokens
    batch, heads, capacity, dim = window.keys.shape
    token_bytes = heads * dim * window.keys.itemsize
    in_sinks = sum(min(count, sinks) for count in window.count) * token_bytes
    in_window = sum(window.count) * token_bytes - in_sinks
    report.sink_keys += in_sinks
    report.sink_values += in_sinks
    report.window_keys += in_window
    report.window_values += in_window
    report.slack += 2 * (batch * capacity - sum(window.count)) * token_bytes
    report.lengths += nbytes(window.lens)
    count = sum(tokens.count(b) for b in range(batch))
    report.key_numbers += count * heads * dim
    report.full_bytes += 2 * count * token_bytes
    if tokens.fit.energy is not None:
        report.key_gain += nbytes(tokens.fit.energy.total) + nbytes(tokens.fit.energy.count)
    if tokens.fit.calibrated is None:
        report.key_gain += nbytes(tokens.fit.gain)
    if tokens.fit.value_loss is not None:
        held = [getattr(tokens.fit.value_loss, name) for name in tokens.fit.value_loss.NAMES]
        report.value_loss += sum(map(nbytes, held))
    report.waiting += sum(map(nbytes, reachable_tensors(tokens.fit.waiting)))
    for store in tokens.stores:
        _add_packed(report, store)


def _add_packed(report: MemoryReport, packed: PackedStore) -> None:
    layout, pool, drift = packed.layout, packed.pool, packed.drift
    own = packed.own_tensors()
    used = pool.num_used
    v_page_bytes = pool.v_pages.shape[1] * pool.v_pages.itemsize
    report.key_codes += used * layout.k_page_bytes
    report.value_codes += used * layout.v_code_bytes
    report.value_scales += used * (v_page_bytes - layout.v_code_bytes)
    report.slack += (pool.size - used) * (layout.k_page_bytes + v_page_bytes)
    report.key_scale += nbytes(own.get("scale"))
    report.key_basis += nbytes(own.get("basis"))
    report.key_mean += nbytes(own.get("mean")) + nbytes(own.get("post_mean"))
    report.page_tables += nbytes(pool.page_table)
    report.lengths += nbytes(pool.cache_seqlens) + nbytes(packed.first_position)
    report.lengths += nbytes(drift.fit_error) + nbytes(drift.error)
    if packed.outliers is not None:
        held = [getattr(packed.outliers, name) for name in packed.outliers.NAMES]
        report.outlier_keys += sum(map(nbytes, held))
    if packed.landmarks is not None:
        pools = [getattr(packed.landmarks, name) for name in packed.landmarks.NAMES]
        held = sum(map(nbytes, pools))
        in_use = held * used // max(pool.size, 1)
        report.landmarks += in_use
        report.slack += held - in_use
    report.packed_numbers += used * PAGE_TOKENS * layout.num_kv_heads * layout.head_dim


def _add_other(report: MemoryReport, layer: Any) -> None:
    """A layer of transformers: its tensors' numbers are used, the rest of their storages slack."""
    storages = {}
    for tensor in reachable_tensors(layer):
        storage = tensor.untyped_storage()
        used = max(nbytes(tensor), storages.get(storage.data_ptr(), (0, 0))[0])
        storages[storage.data_ptr()] = (used, storage.nbytes())
    report.other_layers += sum(used for used, _ in storages.values())
    report.full_bytes += sum(used for used, _ in storages.values())
    report.slack += sum(size - used for used, size in storages.values())
