"""What a cache's memory goes into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from svdq.cache.layer import SVDqLayer
from svdq.layout import PAGE_TOKENS
from svdq.store.layer_store import TokenStore
from svdq.store.packed import PackedStore

if TYPE_CHECKING:
    from svdq.cache.cache import SVDqCache


@dataclass
class MemoryReport:
    """Bytes of a cache by part; the parts add up to all that is allocated.

    Attributes
    ----------
    key_codes, key_scale, key_basis, key_mean : packed keys, and what decodes them.
    key_weight : weights of keys, and the energies of queries that they come from.
    outlier_keys : keys of packed tokens that are held exact too, and which they are.
    landmarks : means of chunks, which choose what is attended.
    sink_keys, window_keys : exact keys.
    page_tables : of keys and values both, counted with the keys.
    value_codes, value_scales, sink_values, window_values : the same for values; exact values in
        pages are codes.
    lengths : lengths and positions of the sequences, inverse frequencies.
    waiting : bases and spectra of sequences whose bits are not allocated yet.
    other_layers : layers that are not compressed (sliding windows).
    slack : allocated to grow into, not in use.
    tokens : tokens of all sequences, padding not counted.
    key_numbers : numbers that the keys of these tokens have in the compressed layers.
    packed_numbers : those of them that are packed.
    full_bytes : of a cache that holds all of it in the model's dtype.
    """

    key_codes: int = 0
    key_scale: int = 0
    key_basis: int = 0
    key_mean: int = 0
    key_weight: int = 0
    outlier_keys: int = 0
    landmarks: int = 0
    sink_keys: int = 0
    window_keys: int = 0
    page_tables: int = 0
    value_codes: int = 0
    value_scales: int = 0
    sink_values: int = 0
    window_values: int = 0
    lengths: int = 0
    waiting: int = 0
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
    def total_bytes(self) -> int:
        """Everything allocated."""
        return sum(self.parts.values())

    @property
    def key_bytes(self) -> int:
        """Everything that is there for the keys."""
        names = list(self.parts)
        return sum(self.parts[name] for name in names[: names.index("page_tables") + 1])

    @property
    def ratio(self) -> float:
        """How many times smaller than the full cache."""
        return self.full_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def key_bits(self) -> float:
        """True bits of a key number: codes, scales, bases, means, exact keys and page tables."""
        return 8 * self.key_bytes / self.key_numbers if self.key_numbers else 0.0

    @property
    def code_bits(self) -> float:
        """Bits of a packed key number, codes alone: the number that papers quote."""
        return 8 * self.key_codes / self.packed_numbers if self.packed_numbers else 0.0

    def __str__(self) -> str:
        rows = [(name.replace("_", " "), size) for name, size in self.parts.items() if size]
        lines = [f"{name:<16}{size:>14,} B" for name, size in rows]
        lines.append(f"{'total':<16}{self.total_bytes:>14,} B  ({self.tokens:,} tokens)")
        lines.append(f"{'full cache':<16}{self.full_bytes:>14,} B  ({self.ratio:.2f}x)")
        lines.append(f"{'key bits':<16}{self.key_bits:>14.2f}    ({self.code_bits:.2f} in codes)")
        return "\n".join(lines)


def memory_report(cache: SVDqCache) -> MemoryReport:
    """Report of a cache, from shapes and layouts alone."""
    report = MemoryReport(lengths=sum(_nbytes(x) for x in cache._frequencies))
    report.waiting = sum(x.nbytes for x in _reachable_tensors(cache._allocator, set()))
    for layer in cache.layers:
        if not isinstance(layer, SVDqLayer):
            _add_other(report, layer)
        elif layer.seq_length:
            _add_layer(report, layer.tokens, layer.batch_size)
    first = next((layer for layer in cache.svdq_layers if layer.seq_length), None)
    if first is not None:
        report.tokens = sum(first.tokens.count(b) for b in range(first.batch_size))
    return report


def held_bytes(cache: SVDqCache) -> int:
    """Bytes of the storages of all tensors that can be reached from a cache, each counted once."""
    storages = {}
    for tensor in _reachable_tensors(cache, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _add_layer(report: MemoryReport, tokens: TokenStore, batch: int) -> None:
    rows, sinks = tokens.rows, tokens.settings.sink_tokens
    _, heads, capacity, dim = rows.keys.shape
    row_bytes = heads * dim * rows.keys.itemsize
    in_sinks = sum(min(count, sinks) for count in rows.count) * row_bytes
    in_window = sum(rows.count) * row_bytes - in_sinks
    report.sink_keys += in_sinks
    report.sink_values += in_sinks
    report.window_keys += in_window
    report.window_values += in_window
    report.slack += 2 * (batch * capacity - sum(rows.count)) * row_bytes
    report.lengths += _nbytes(rows.lens)
    count = sum(tokens.count(b) for b in range(batch))
    report.key_numbers += count * heads * dim
    report.full_bytes += 2 * count * row_bytes
    if tokens.energy is not None:
        report.key_weight += _nbytes(tokens.energy.total) + _nbytes(tokens.energy.count)
    if tokens.weight is not None:
        report.key_weight += _nbytes(tokens.weight)
    report.waiting += sum(x.nbytes for x in _reachable_tensors(tokens.waiting, set()))
    for store in tokens.stores:
        _add_packed(report, store)


def _add_packed(report: MemoryReport, packed: PackedStore) -> None:
    layout, used = packed.layout, len(packed.used_pages)
    v_page_bytes = packed.v_pages.shape[1] * packed.v_pages.itemsize
    window_values = layout.v_bits > 8
    v_code_bytes = layout.num_kv_heads * PAGE_TOKENS * layout.head_dim * layout.v_bits // 8
    report.key_codes += used * layout.k_page_bytes
    report.value_codes += used * v_code_bytes
    report.value_scales += 0 if window_values else used * (v_page_bytes - v_code_bytes)
    report.slack += (packed.k_pages.shape[0] - used) * (layout.k_page_bytes + v_page_bytes)
    report.key_scale += _nbytes(packed.scale)
    report.key_basis += _nbytes(packed.basis)
    report.key_mean += _nbytes(packed.mean)
    if packed.post_mean is not None:
        report.key_mean += _nbytes(packed.post_mean)
    report.page_tables += _nbytes(packed.page_table)
    report.lengths += _nbytes(packed.cache_seqlens) + _nbytes(packed.first_position)
    report.lengths += _nbytes(packed.fit_error) + _nbytes(packed.error)
    if packed.outliers is not None:
        held = (packed.outliers.slots, packed.outliers.keys, packed.outliers.least)
        report.outlier_keys += sum(map(_nbytes, held))
    if packed.landmarks is not None:
        pools = [getattr(packed.landmarks, name) for name in packed.landmarks.NAMES]
        held = sum(map(_nbytes, pools))
        in_use = held * used // max(packed.k_pages.shape[0], 1)
        report.landmarks += in_use
        report.slack += held - in_use
    report.packed_numbers += used * PAGE_TOKENS * layout.num_kv_heads * layout.head_dim


def _add_other(report: MemoryReport, layer: Any) -> None:
    """A layer of transformers: what its tensors show is used, the rest of their storages slack."""
    storages = {}
    for tensor in _reachable_tensors(layer, set()):
        storage = tensor.untyped_storage()
        used = max(_nbytes(tensor), storages.get(storage.data_ptr(), (0, 0))[0])
        storages[storage.data_ptr()] = (used, storage.nbytes())
    report.other_layers += sum(used for used, _ in storages.values())
    report.full_bytes += sum(used for used, _ in storages.values())
    report.slack += sum(size - used for used, size in storages.values())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _reachable_tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        children = value.values()
    elif isinstance(value, (list, tuple)):
        children = value
    elif type(value).__module__.split(".")[0] in ("svdq", "transformers"):
        children = vars(value).values() if hasattr(value, "__dict__") else ()
    else:
        return
    for child in children:
        yield from _reachable_tensors(child, seen)
