"""The way back from a step: what a layer held before it got new tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from svdq.ops.tensors import normal_tensors
from svdq.store.packed import PackedStore
from svdq.store.token_store import TokenStore


def checkpoint(tokens: TokenStore, new_tokens: int) -> Callable[[], None]:
    """What to call to forget all that happens to ``tokens`` up to so many new ones.

    A step that packs nothing only writes behind the tokens of the window, so that little has to be
    remembered. Packed slots stay as they are as well, so pages are never copied.
    """
    counts = [tokens.count(b) for b in range(tokens.shape[0])]
    packs = any(tokens.packs(b, count + new_tokens) for b, count in enumerate(counts))
    if packs or not all(counts):
        return _full_checkpoint(tokens)
    count, measures = list(tokens.window.count), _measures(tokens)

    def restore() -> None:
        tokens.window.set_count(count)
        vars(tokens.fit).update(measures)

    return restore


@normal_tensors
def _measures(tokens: TokenStore) -> dict[str, Any]:
    """What a fit knows of queries and values, while it may still change."""
    if tokens.packed is not None and all(tokens.packed.fitted):
        return {}
    return {name: _copied(getattr(tokens.fit, name), {}) for name in ("energy", "value_loss")}


@normal_tensors
def _full_checkpoint(tokens: TokenStore) -> Callable[[], None]:
    """The same by a copy of everything but the pages."""
    fit = tokens.fit
    shared = [tokens.settings, fit.settings, fit.layout, fit.frequencies, fit.allocate]
    if fit.calibrated is not None:  # caches share it, and nothing writes to it
        shared += [fit.calibrated, *fit.calibrated.tensors().values()]
    pages = []
    for store in tokens.stores:
        shared += [store.layout, store.codec.inv_freq]
        pages += _page_tensors(store)
    known = {id(x): x for x in shared} | {id(x): None for x in pages}
    saved = {name: _copied(x, known) for name, x in vars(tokens).items()}
    landmarks = [_part_full_landmarks(store) for store in tokens.stores]

    def restore() -> None:
        now = tokens.stores
        vars(tokens).update(saved)
        for store, later, rows in zip(tokens.stores, now, landmarks, strict=False):
            _take_pages(store, later)
            for page, row in rows.items():
                for name, x in row.items():
                    getattr(store.landmarks, name)[page] = x

    return restore


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """A copy of tensors, containers and our own objects; ``known`` has what stands for others.

    It is no ``copy.deepcopy``, which looks at storages, and fake tensors have none.
    """
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, Tensor):
        found = value.clone()
    elif isinstance(value, (list, tuple)):
        found = type(value)(_copied(x, known) for x in value)
    elif isinstance(value, dict):
        found = {key: _copied(x, known) for key, x in value.items()}
    elif type(value).__module__.startswith("svdq."):
        found = known[id(value)] = object.__new__(type(value))
        vars(found).update({name: _copied(x, known) for name, x in vars(value).items()})
    else:
        return value
    known[id(value)] = found
    return found


def _page_tensors(store: PackedStore) -> list[Tensor]:
    held = [store.pool.k_pages, store.pool.v_pages]
    if store.landmarks is not None:
        held += [getattr(store.landmarks, name) for name in store.landmarks.NAMES]
    return held


def _take_pages(store: PackedStore, later: PackedStore) -> None:
    """Give a store the pages of what it has become; those it does not name are free."""
    if store.landmarks is not None:
        for name in store.landmarks.NAMES:
            setattr(store.landmarks, name, getattr(later.landmarks, name))
    store.pool.k_pages, store.pool.v_pages = later.pool.k_pages, later.pool.v_pages
    store.pool.set_pages(store.pool.pages)


def _part_full_landmarks(store: PackedStore) -> dict[int, dict]:
    """Landmarks of the last page of each sequence: a part-full chunk's is replaced as it fills."""
    if store.landmarks is None:
        return {}
    last = {pages[-1] for pages in store.pool.pages if pages}
    names = store.landmarks.NAMES
    return {page: {x: getattr(store.landmarks, x)[page].clone() for x in names} for page in last}
