"""The fit of one layer's keys: energy of the queries, key gain, bases and widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq.config.settings import Settings
from svdq.fit.allocation import overhead_bits
from svdq.fit.allocator import Answer, Demand, Widths
from svdq.fit.bases import Bases, fit_bases, thinned
from svdq.fit.calibration import CalibratedLayer
from svdq.fit.key_gain import QueryEnergy, key_gain
from svdq.fit.pre_channels import PreChannels
from svdq.fit.value_loss import ValueLoss
from svdq.layout import NO_BANDS, PageLayout
from svdq.ops.tensors import normal_tensors

# allocate(demand, answer), see svdq.fit.allocator.Allocator.ask.
Allocate = Callable[[Demand, Answer], None]


@dataclass(frozen=True)
class SequenceFit:
    """Fit of one sequence before its widths are known.

    Parameters
    ----------
    gain : [H, D] float32 that keys are multiplied by, or None.
    bases : of the keys times their gain; by score variance where the queries' energy is known.
    """

    gain: Tensor | None
    bases: Bases


class LayerFit:
    """Fits one layer's keys.

    Parameters
    ----------
    settings : how to compress.
    shape : B, H, D.
    dtype, device : of the keys.
    frequencies : maps the largest position in use to the layer's inverse frequencies; None for
        layers whose keys are packed as they come.
    allocate : called as ``allocate(demand, answer)`` for the layer's widths, see
        :meth:`svdq.fit.allocator.Allocator.ask`; None where a schedule says them.
    calibrated : codec, widths and gain for all sequences, on ``device``; then nothing is measured.

    Attributes
    ----------
    layout : layout of the pages where a schedule or a calibration says it, else None.
    energy : of the queries, where they matter.
    value_loss : what coding the values costs, where their bits are allocated.
    gain : [B, H, D] bfloat16 that the stored keys of each sequence are multiplied by, [1, H, D] of
        a calibration; None where the settings ask for none.
    waiting : fits of sequences that wait for their widths.
    """

    @normal_tensors
    def __init__(
        self,
        settings: Settings,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        frequencies: Callable[[int], Tensor] | None,
        allocate: Allocate | None,
        *,
        calibrated: CalibratedLayer | None = None,
    ) -> None:
        batch, heads, dim = shape
        self.settings, self.dtype, self.device = settings, dtype, device
        self.heads, self.dim = heads, dim
        self.frequencies, self.allocate = frequencies, allocate
        self.layout: PageLayout | None = None
        self.energy: QueryEnergy | None = None
        self.value_loss: ValueLoss | None = None
        self.gain: Tensor | None = None
        self.waiting: dict[int, SequenceFit] = {}
        self._pre_layout: PageLayout | None = None  # a hybrid layout; only its pre-RoPE part counts
        self.calibrated = calibrated
        if calibrated is not None:
            self.layout, self.gain = calibrated.page_layout(settings, dtype), calibrated.gain
            return
        if settings.packs:
            self._make_layout()
        if settings.needs_queries:
            self.energy = QueryEnergy(batch, heads, dim, device)
        if settings.allocates_values:
            exact = settings.sink_tokens, settings.residual_length
            self.value_loss = ValueLoss(batch, heads, exact, device)
        if settings.query_weighted:
            self.gain = torch.ones((batch, heads, dim), dtype=torch.bfloat16, device=device)

    def _make_layout(self) -> None:
        """Make the scheduled layout; settings that do not fit the model fail before tokens come."""
        pre, post = self.settings.pre_bands(), (0, 0, 4, 0)  # some channels, until allocated
        if not self.settings.allocates:
            pre, post = self.settings.scheduled_bands(self.dim)
        bands, pre_bands = [post] * self.heads, [pre] * self.heads
        layout = self.settings.layout(bands, self.dim, self.dtype, pre_bands)
        if not self.settings.allocates:
            self.layout = layout
        if layout.rope == "hybrid":
            self._pre_layout = layout

    @property
    def min_tokens(self) -> int:
        """Tokens that a sequence needs before it is fitted."""
        asked = self.settings.min_fit_tokens
        return 4 * self.dim if asked is None else asked

    @property
    def lacking_gain(self) -> Tensor | None:
        """Factor [H, 1, D] of a calibration that new keys have yet to be multiplied by."""
        if self.calibrated is None or self.gain is None:
            return None
        return self.gain[0, :, None].to(self.dtype)

    def batch_gain(self, batch: int) -> Tensor | None:
        """The gain with a row for each sequence, as :func:`svdq.ops.decode_step_` takes it."""
        if self.gain is None or len(self.gain) == batch:
            return self.gain
        return self.gain.expand(batch, -1, -1).contiguous()

    def inv_freq(self, last_position: int) -> Tensor | None:
        """The layer's inverse frequencies, for positions up to this one."""
        return None if self.frequencies is None else self.frequencies(last_position).to(self.device)

    def amplified(self, keys: Tensor) -> Tensor:
        """New keys [B, H, L, D] as they are stored."""
        return keys if self.gain is None else keys * self.gain[:, :, None].to(keys.dtype)

    def matching_query(self, query: Tensor) -> Tensor:
        """Queries [B, Hq, L, D] that give the same scores with the stored keys."""
        if self.gain is None:
            return query
        inverse = (1 / self.gain).to(query.dtype)[:, :, None, None]
        return (query.unflatten(1, (self.heads, -1)) * inverse).flatten(1, 2)

    def measure(
        self, b: int, keys: Tensor, inv_freq: Tensor | None, position: int, is_packed: bool
    ) -> SequenceFit:
        """Gain and bases of sequence b's stored keys, [H, T, D], the first of them at ``position``.

        The gain of a sequence that is packed already stays.
        """
        pre = None if self._pre_layout is None else PreChannels.of(self._pre_layout, inv_freq)
        # Before the gain is applied: a copy of few keys, not of all.
        keys, inv_freq, position = thinned(keys, inv_freq, position)
        rotary_pairs = 0 if inv_freq is None else inv_freq.numel()
        gain = energy = None
        if self.energy is not None:
            energy = self.energy.mean(b, rotary_pairs)
        if self.gain is not None:
            stored = self.gain[b].float()
            gain = stored if is_packed else key_gain(energy)
            keys = keys * (gain / stored)[:, None].to(keys.dtype)
            energy = energy / gain.square()
        bases = fit_bases(
            keys,
            pre,
            inv_freq=inv_freq,
            position=position,
            clip=self.settings.clip,
            energy=energy,
        )
        return SequenceFit(gain, bases)

    def set_gain(self, b: int, gain: Tensor) -> Tensor:
        """Set sequence b's gain; returns the factor [H, 1, D] that its stored keys still lack."""
        factor = (gain / self.gain[b].float()).to(self.dtype)[:, None]
        self.gain[b] = gain
        return factor

    def ask_widths(self, num_tokens: int, answer: Callable[[PageLayout], None]) -> None:
        """Ask for the layer's widths by the spectra of all that wait; ``answer`` gets the layout.

        ``num_tokens`` is the length of the longest of them.
        """
        spectrum = torch.stack([fit.bases.spectrum for fit in self.waiting.values()]).mean(dim=0)

        def receive(widths: Widths) -> None:
            pre = (NO_BANDS,) * self.heads
            if self._pre_layout is not None:
                pre = self._pre_layout.pre_bands
            post = [tuple(head) for head in widths.bands.tolist()]
            layout = self.settings.layout(post, self.dim, self.dtype, pre, widths.v_bits)
            answer(layout)

        loss = None if self.value_loss is None else self.value_loss.mean()
        taken = self.settings.pre_bits(self.dim)
        self.allocate(Demand(spectrum, overhead_bits(self.dim, num_tokens), taken, loss), receive)

    @normal_tensors
    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        waiting = self.waiting
        self.waiting = {to: waiting[i] for to, i in enumerate(indices) if i in waiting}
        for measured in (self.energy, self.value_loss):
            if measured is not None:
                measured.select(indices)
        if self.gain is not None and self.calibrated is None:
            self.gain = self.gain[indices]
