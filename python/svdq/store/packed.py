"""Packed tokens of one layer: pages, the codec of every sequence, outliers and landmarks.

Slot s of a sequence is its s-th real token (padding is not stored).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from svdq import ops
from svdq.fit.bases import Bases, fit_bases, fit_codes, thinned
from svdq.fit.calibration import CalibratedLayer
from svdq.fit.key_gain import amplified
from svdq.fit.pre_channels import PreChannels
from svdq.fit.ranges import coding_errors, fit_ranges
from svdq.layout import PageLayout
from svdq.ops import KeyCodec, PackedKeys
from svdq.ops.tensors import int32_tensor, normal_tensors
from svdq.store.drift import Drift
from svdq.store.landmarks import CHUNK_TOKENS, Landmarks
from svdq.store.outliers import Outliers
from svdq.store.page_pool import PagePool

PIECE_TOKENS = 2048  # keys that have to be copied are copied so many at a time


class PackedStore:
    """Packed tokens of one layer, with a basis for each of its sequences.

    Parameters
    ----------
    layout : layout of the pages.
    batch_size : sequences, B.
    dtype : the model's dtype, in which values of 16 and 32 bits are held.
    device : of all tensors.
    outlier_fraction : share of a prompt's tokens whose keys are held exact too, in every head.
    landmarks : whether pages come with landmarks, which choose the tokens that are attended.
    calibrated : codec that sequences begin with, shared by all of them; None: each has its own.
    prompt_ranges : whether mean and scales are each sequence's own all the same.

    Attributes
    ----------
    pool : the pages, and those of each sequence.
    codec : of all sequences; that of a sequence is valid where ``fitted``. ``inv_freq`` is None
        before the first fit and where keys are packed as they come. Tensors that all share are
        those of ``calibrated``, with a leading dimension of 1.
    drift : errors of packed keys.
    domain : by sequence, error of its first keys under the calibration over what that saw; NaN
        where it was not measured.
    position, first_position : position of slot 0 of each sequence, as a list and as [B] int32.
    """

    @normal_tensors
    def __init__(
        self,
        layout: PageLayout,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        outlier_fraction: float = 0.0,
        landmarks: bool = False,
        *,
        calibrated: CalibratedLayer | None = None,
        prompt_ranges: bool = False,
    ) -> None:
        self.layout, self.dtype, self.device = layout, dtype, device
        self.outlier_fraction = outlier_fraction
        self.calibrated, self.prompt_ranges = calibrated, prompt_ranges
        heads, dim = layout.num_kv_heads, layout.head_dim
        self.landmarks = Landmarks(layout, device) if landmarks else None
        self.pool = PagePool(layout, batch_size, dtype, device, self.landmarks)
        self.codec = KeyCodec.empty(layout, batch_size, device)
        if calibrated is not None:
            shared = calibrated.codec
            own = self.codec if prompt_ranges else shared
            self.codec = replace(own, basis=shared.basis)
        self.domain = [torch.nan] * batch_size
        self.drift = Drift(batch_size, heads, device)
        self.outliers: Outliers | None = None
        if outlier_fraction:
            self.outliers = Outliers(batch_size, heads, dim, dtype, device)
        self.fitted = [False] * batch_size
        self.set_first_position([0] * batch_size)

    def set_first_position(self, first_position: list[int]) -> None:
        """Set the position of slot 0 of each sequence."""
        self.position = first_position
        self.first_position = int32_tensor(first_position, self.device)

    def set_frequencies(self, inv_freq: Tensor | None) -> None:
        """Set the inverse frequencies of all sequences."""
        self.codec = replace(self.codec, inv_freq=inv_freq)

    @property
    def slots(self) -> list[int]:
        """Packed slots of each sequence."""
        return self.pool.slots

    def tokens_after(self, sink_tokens: int) -> int:
        """Packed tokens of the longest sequence after the first ones, which are in the window."""
        return max(max(self.slots) - sink_tokens, 0)

    def packed_keys(self, sink_tokens: int = 0) -> PackedKeys:
        """All sequences, as operators take them."""
        pool, outliers = self.pool, self.outliers
        return PackedKeys(
            self.layout,
            self._batch_codec(),
            pool.k_pages,
            pool.page_table,
            pool.cache_seqlens,
            v_pages=pool.v_pages,
            first_position=self.first_position,
            sink_tokens=sink_tokens,
            outlier_slots=None if outliers is None else outliers.slots,
            outlier_keys=None if outliers is None else outliers.keys,
        )

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors of the codec that sequences have their own of, by name."""
        shared = {} if self.calibrated is None else self.calibrated.codec.tensors()
        return {name: x for name, x in self.codec.tensors().items() if x is not shared.get(name)}

    @normal_tensors
    def _own_codecs(self) -> None:
        """Give every sequence a codec of its own, so far a copy of the one they share."""
        batch, own = len(self.fitted), self.own_tensors()
        shared = {name: x for name, x in self.codec.tensors().items() if name not in own}
        copies = {n: x.expand(batch, *x.shape[1:]).clone() for n, x in shared.items()}
        self.codec = replace(self.codec, **copies)

    def _batch_codec(self) -> KeyCodec:
        """The codec with a row for each sequence, as operators take it.

        Rows of what they share are copied for a call: operators know no shared rows.
        """
        batch = len(self.fitted)
        found = self.codec.tensors()
        if all(len(x) == batch for x in found.values()):
            return self.codec
        rows = {n: x.expand(batch, *x.shape[1:]).contiguous() for n, x in found.items()}
        return replace(self.codec, **rows)

    def _codec_of(self, b: int) -> KeyCodec:
        """The codec of sequence b."""
        own = self.own_tensors()
        rows = {n: x[b if n in own else 0] for n, x in self.codec.tensors().items()}
        return replace(self.codec, **rows)

    def begin(
        self,
        b: int,
        keys: Tensor,
        slot: int,
        *,
        clip: bool,
        gain: Tensor | None = None,
        bound: float | None = None,
    ) -> None:
        """Begin sequence b with the calibrated codec; its keys are [H, T, D] from ``slot`` on.

        With ``prompt_ranges`` mean and scales are fitted to these keys. With a ``bound`` the codec
        is, if their error is more than that many times what the calibration saw.
        """
        calibrated = self.calibrated
        some, inv_freq, position = keys, self.codec.inv_freq, self.position[b] + slot
        if clip:  # ranges are searched on a sample anyway
            some, inv_freq, position = thinned(some, inv_freq, position)
        codec = replace(calibrated.codec.sequence(0), inv_freq=inv_freq)
        if self.prompt_ranges or bound is not None:
            some = amplified(some, gain)
        if self.prompt_ranges:
            where = {"inv_freq": inv_freq, "position": position}
            codec = fit_ranges(some, codec, self.layout, clip=clip, **where)
        for name, own in self.own_tensors().items():
            own[b] = getattr(codec, name)
        self.fitted[b] = True
        self.drift.expect(b, calibrated.error)
        if bound is None:
            return
        error = coding_errors(some, codec, self.layout, position).mean(dim=1)
        tiny = torch.finfo(torch.float32).tiny
        self.domain[b] = float((error / calibrated.error.clamp(min=tiny)).mean())
        if self.domain[b] > bound:
            self._own_codecs()
            self.fit(b, keys, slot, clip=clip, gain=gain)
            self.drift.forget(b)

    def fit(
        self,
        b: int,
        keys: Tensor,
        slot: int,
        *,
        clip: bool,
        bases: Bases | None = None,
        gain: Tensor | None = None,
    ) -> None:
        """Fit sequence b's codec to its keys, ``[H, T, D]`` from slot ``slot`` on.

        ``bases`` are those of these keys, where they are known already; ``gain`` [H, 1, D] is what
        the keys have yet to be multiplied by. With a calibration channels count by the energy of
        the queries that it saw.
        """
        inv_freq, position = self.codec.inv_freq, self.position[b] + slot
        pre = PreChannels.of(self.layout, inv_freq)
        if clip:  # ranges are searched on a sample anyway
            keys, inv_freq, position = thinned(keys, inv_freq, position)
        keys, where = amplified(keys, gain), {"inv_freq": inv_freq, "position": position}
        if bases is None:
            energy = None
            if self.calibrated is not None:
                energy = self.calibrated.energy
            bases = fit_bases(keys, pre, clip=clip, energy=energy, **where)
        self.codec.copy_sequence(b, fit_codes(keys, bases, self.layout, clip=clip, **where))
        self.fitted[b] = True

    def pack(
        self, b: int, keys: Tensor, values: Tensor, *, skip: int = 0, gain: Tensor | None = None
    ) -> None:
        """Pack sequence b's next tokens, ``[H, T, D]`` keys and values, behind its packed slots.

        ``skip`` of them, sinks, are read in the window: they are neither outliers nor signs of
        drift. ``gain`` [H, 1, D] is what the keys have yet to be multiplied by, piece by piece.
        """
        start, end = self.slots[b], self.slots[b] + keys.shape[1]
        self.pool.extend(b, end)
        table = self.pool.host_table(b)
        errors, slot = [], start
        for piece in keys.split(keys.shape[1] if gain is None else PIECE_TOKENS, dim=1):
            errors.append(self._pack_keys(b, amplified(piece, gain), table, slot))
            slot += piece.shape[1]
        errors = errors[0] if len(errors) == 1 else torch.cat(errors, dim=1)
        ops.pack_values_(self.pool.v_pages, values, self.layout, table, start)
        self.pool.set_slots(b, end)
        if self.outliers is not None:
            fraction = None if self.drift.known[b] else self.outlier_fraction
            self.outliers.choose(b, keys, errors, start, fraction=fraction, skip=skip, gain=gain)
        self.drift.note(b, errors[:, skip:].mean(dim=1))

    def _pack_keys(self, b: int, keys: Tensor, table: Tensor, slot: int) -> Tensor:
        """Pack keys [H, T, D] of sequence b from slot ``slot`` on; their squared errors [H, T]."""
        errors = torch.empty(keys.shape[:2], dtype=torch.float32, device=self.device)
        ops.pack_keys_(
            self.pool.k_pages,
            keys,
            self._codec_of(b),
            self.layout,
            table,
            slot,
            position=self.position[b] + slot,
            errors=errors,
        )
        if self.landmarks is not None:
            start = slot - slot % CHUNK_TOKENS
            if start < slot:  # of the earlier keys of a part full chunk there are codes alone
                old = self.decoded_keys(b, start, slot - start)
                keys = torch.cat([old.to(keys.dtype), keys], dim=1)
            self.landmarks.add(keys, self.pool.pages[b], start)
        return errors

    def decoded_keys(self, b: int, slot: int, num_tokens: int) -> Tensor:
        """Keys [H, num_tokens, D] float32 of sequence b from slot ``slot`` on, decoded."""
        return ops.unpack_keys(
            self.pool.k_pages,
            self._codec_of(b),
            self.layout,
            self.pool.host_table(b),
            slot,
            num_tokens,
            position=self.position[b] + slot,
        )

    def successor(self, keep: list[int]) -> PackedStore:
        """An empty store for the tokens that follow; sequences ``keep`` go on with their bases."""
        new = PackedStore(
            self.layout,
            len(self.slots),
            self.dtype,
            self.device,
            self.outlier_fraction,
            self.landmarks is not None,
            calibrated=self.calibrated,
        )
        new._own_codecs()  # of a calibrated store too: those that do not go on are fitted
        new.set_frequencies(self.codec.inv_freq)
        new.set_first_position([p + n for p, n in zip(self.position, self.slots, strict=True)])
        for b in keep:
            new.codec.copy_sequence(b, self._codec_of(b))
            new.drift.copy_sequence(b, self.drift)
            if self.outliers is not None:
                new.outliers.min_error[b] = self.outliers.min_error[b]
            new.fitted[b], new.domain[b] = self.fitted[b], self.domain[b]
        return new

    def truncate(self, b: int, slots: int) -> None:
        """Forget packed slots of sequence b from ``slots`` on; with the last of them its basis."""
        self.pool.truncate(b, slots)
        self.fitted[b] = self.fitted[b] and slots > 0
        if self.outliers is not None:
            self.outliers.truncate(b, slots)
        if not self.fitted[b]:
            self.drift.forget(b)
            self.domain[b] = torch.nan

    @normal_tensors
    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``, sharing its pages."""
        chosen = torch.tensor(indices, dtype=torch.long)
        own = {name: x[chosen] for name, x in self.own_tensors().items()}
        self.codec = replace(self.codec, **own)
        self.fitted = [self.fitted[i] for i in indices]
        self.domain = [self.domain[i] for i in indices]
        self.drift.select(indices)
        if self.outliers is not None:
            self.outliers.select(indices)
        self.set_first_position([self.position[i] for i in indices])
        self.pool.select(indices)
