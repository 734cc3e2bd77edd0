"""The tensors that an object holds, and their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def nbytes(tensor: Tensor | None) -> int:
    """Bytes of a tensor's numbers; 0 for None."""
    return 0 if tensor is None else tensor.numel() * tensor.itemsize


def reachable_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors that can be reached from a value through containers and our own objects."""
    yield from _walk(value, set())


def _walk(value: Any, seen: set[int]) -> Iterator[Tensor]:
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
        yield from _walk(child, seen)


def held_bytes(value: Any) -> int:
    """Bytes of the storages of all tensors that can be reached, each counted once."""
    storages: dict[tuple, int] = {}
    for tensor in reachable_tensors(value):
        storage = tensor.untyped_storage()
        # Parts of a file that is mapped may be storages of their own at one address.
        at = (storage.device, storage.data_ptr())
        storages[at] = max(storage.nbytes(), storages.get(at, 0))
    return sum(storages.values())
