"""A layer at its full capacity: decode steps that the host does not touch."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq import ops
from svdq.layout import PAGE_TOKENS, pages_of
from svdq.ops import LogitRules
from svdq.ops.tensors import normal_tensors
from svdq.store.token_store import TokenStore

MAX_QUERIES = PAGE_TOKENS  # tokens of a step


class StaticStep:
    """Holds a layer's tokens at fixed addresses while ``active``; their lengths are on the device.

    While it is active, what the host knows of lengths (``window.count``, ``pool.slots``) is of
    the past; :meth:`stop` reads them back.

    Parameters
    ----------
    tokens : the tokens of the layer.
    capacity : tokens that a sequence may have.

    Attributes
    ----------
    active : whether the lengths are on the device alone.
    length : [1] int64, tokens of a sequence, left padding included, as transformers counts.
    faults : [B] int32, nonzero for sequences that a CUDA kernel could not go on with.
    """

    @normal_tensors
    def __init__(self, tokens: TokenStore, capacity: int) -> None:
        self.tokens, self.capacity, self.active = tokens, capacity, False
        self.length = torch.zeros(1, dtype=torch.long, device=tokens.device)
        self.faults = self._no_faults()

    def _no_faults(self) -> Tensor:
        return torch.zeros(self.tokens.shape[0], dtype=torch.int32, device=self.tokens.device)

    @normal_tensors
    def start(self, length: int) -> None:
        """Give the tokens their capacity and leave their lengths to the device."""
        tokens, pool = self.tokens, self.tokens.packed.pool
        rows = tokens.steady_tokens + MAX_QUERIES
        if tokens.window.capacity < rows:
            tokens.window.resize(rows)
        pool.spread(pages_of(self.capacity))
        self.length.fill_(length)
        if self.faults.shape[0] != tokens.shape[0]:
            self.faults = self._no_faults()
        self.active = True
        self._mark_addresses()

    def _mark_addresses(self) -> None:
        """Tell compiled graphs that these tensors stay where they are."""
        tokens = self.tokens
        packed = tokens.packed.packed_keys().flat()
        held = [*packed.values(), *tokens.window.window.flat().values(), tokens.fit.gain]
        for tensor in (*held, self.length, self.faults):
            if isinstance(tensor, Tensor):
                torch._dynamo.mark_static_address(tensor)

    def stop(self) -> int:
        """Read the lengths back, so that the host goes on; the tokens of a sequence.

        Raises
        ------
        RuntimeError
            If a CUDA kernel could not go on with some sequence.
        """
        faults = self.faults.tolist()
        if any(faults):
            raise RuntimeError(
                f"sequences {[b for b, fault in enumerate(faults) if fault]} met keys or values "
                f"that are not finite, or their capacity, max_cache_len={self.capacity}; their "
                "outputs have been NaN since; call reset()"
            )
        self.active = False
        window, pool = self.tokens.window, self.tokens.packed.pool
        window.count = window.lens.tolist()
        pool.grown(pool.cache_seqlens.tolist())
        self.tokens.pack_due()
        return int(self.length)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, sm_scale: float, rules: LogitRules
    ) -> Tensor:
        """Attend to all tokens and store the new: [B, L, Hq, D]; shapes as for a LayerStore."""
        tokens = self.tokens
        out = ops.decode_step_(
            query,
            keys,
            values,
            tokens.packed.packed_keys(tokens.settings.sink_tokens),
            tokens.window.window,
            sm_scale,
            residual_length=tokens.settings.residual_length,
            faults=self.faults,
            gain=tokens.fit.batch_gain(query.shape[0]),
            rules=rules,
        )
        self.length.add_(query.shape[2])
        return out.transpose(1, 2)
