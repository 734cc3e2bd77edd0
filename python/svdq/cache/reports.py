"""What a cache says of itself, from lengths that its layers may have left to a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import Cache
from transformers.utils import logging

from svdq.cache import calibrated
from svdq.cache.build import Frequencies
from svdq.cache.layer import SVDqLayer
from svdq.cache.memory import MemoryReport, memory_report
from svdq.cache.reads import ReadReport, read_report
from svdq.cache.tensor_walk import held_bytes
from svdq.config.settings import Settings
from svdq.fit.allocator import Allocator
from svdq.fit.calibration import Calibration

logger = logging.get_logger(__name__)


class ReportingCache(Cache):
    """A cache's reports, and the way between lengths on the host and on a device.

    Attributes
    ----------
    settings : how to compress.
    calibration : bases for all prompts, or None.
    """

    settings: Settings
    calibration: Calibration | None
    _frequencies: Frequencies
    _allocator: Allocator | None

    def _settle(self) -> None:
        """Make the layers static once all of them have packed every sequence of the same tokens."""
        layers = self.svdq_layers
        if self.settings.max_cache_len is None or all(layer.is_static for layer in layers):
            return
        known = {layer.seq_length for layer in layers if not layer.is_static}
        if len(known) > 1 or known == {0}:
            return
        if all(layer.is_static or layer.can_start for layer in layers):
            for layer in layers:
                if not layer.is_static:
                    layer.start()
        elif layers[-1].seq_length:
            logger.warning_once(
                "SVDqCache: steps run uncompiled until all sequences have the tokens that a basis "
                "is fitted on (min_fit_tokens)"
            )

    @contextlib.contextmanager
    def _on_host(self) -> Iterator[None]:
        """Let the host know the lengths of all layers meanwhile."""
        self._stop()
        yield
        self._settle()

    def _stop(self) -> None:
        for layer in self.svdq_layers:
            if layer.is_static:
                layer.stop()

    @property
    def svdq_layers(self) -> list[SVDqLayer]:
        """The layers that compress."""
        return [layer for layer in self.layers if isinstance(layer, SVDqLayer)]

    def drift(self) -> list[list[float]]:
        """Error of each layer's latest keys over that of the keys it was fitted or calibrated on.

        Returns
        -------
        drift : per compressing layer and sequence, the mean squared error of keys packed lately
            over that of the keys of the fit, mean over heads: 1 where nothing changed. NaN without
            a basis.
        """
        with self._on_host():
            return [layer.tokens.drift() if layer.tokens else [] for layer in self.svdq_layers]

    def domain_drift(self) -> list[float]:
        """Error of each sequence's keys under the calibration over what the calibration saw.

        The mean over layers; of one that has fitted the sequence since, before that. NaN where
        nothing is packed.
        """
        if self.calibration is None:
            raise ValueError("this cache has no calibration that a sequence could drift from")
        with self._on_host():
            known = [x.tokens.domain_drift() for x in self.svdq_layers if x.seq_length]
        return calibrated.mean_drift(known)

    def out_of_domain(self) -> list[bool]:
        """Whether each sequence is unlike the texts of the calibration: its keys have a larger
        error than any text that was held out from them, by a margin (docs/calibration.md)."""
        drifts = self.domain_drift()
        return [drift > self.calibration.drift_bound for drift in drifts]

    def memory_report(self) -> MemoryReport:
        """Bytes by part and of a full cache for the same tokens, and the true bits of a key."""
        with self._on_host():
            return memory_report(self.layers, self._frequencies.known, self._allocator)

    def read_report(self) -> ReadReport:
        """Bytes of keys that the last step of one token read, by part."""
        with self._on_host():
            return read_report(self.svdq_layers)

    def allocated_bytes(self) -> int:
        """Bytes of the storages of all tensors that the cache holds."""
        return held_bytes(self)
