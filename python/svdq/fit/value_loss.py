"""What coding the values of a head costs, measured on some of the prompt's queries.

Codes of values are unbiased along a token and their errors are independent of each other, so those
of the tokens that a query attends to add up as variances: with probabilities p, values v and the
relative squared error d(b) of b-bit codes, an output moves by ``d(b) * sum p^2 |v|^2``. Heads whose
attention is spread over many tokens average errors away and can do with fewer bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq.ops import NO_RULES, LogitRules
from svdq.ops.exact import capped
from svdq.ops.tensors import normal_tensors

SAMPLE_QUERIES = 32  # of a prompt
PIECE = 8  # queries whose probabilities are held at once


def sample_positions(num_tokens: int) -> list[int]:
    """Positions of the queries that are looked at: spread over the last three quarters."""
    first = num_tokens // 4
    count = min(SAMPLE_QUERIES, num_tokens - first)
    return [num_tokens - 1 - i * (num_tokens - first) // count for i in range(count)][::-1]


class ValueLoss:
    """Mean of ``sum p^2 |v|^2`` over queries, relative to the output of the whole layer.

    Parameters
    ----------
    exact : sinks and tokens of the window, which are not coded.

    Attributes
    ----------
    noise : [B, H] float32, summed over queries, mean over the query heads of a KV head; of tokens
        that are neither sinks nor in the window.
    output : [B] float32, the squares of the outputs, likewise, of all heads together.
    """

    NAMES = ("noise", "output")

    @normal_tensors
    def __init__(
        self, batch: int, heads: int, exact: tuple[int, int], device: torch.device
    ) -> None:
        self.noise = torch.zeros((batch, heads), dtype=torch.float32, device=device)
        self.output = torch.zeros(batch, dtype=torch.float32, device=device)
        self.sink_tokens, self.residual_length = exact

    def add(
        self,
        b: int,
        query: Tensor,
        positions: list[int],
        keys: Tensor,
        values: Tensor,
        rules: LogitRules = NO_RULES,
    ) -> None:
        """Add queries of sequence b.

        Parameters
        ----------
        query : [Hq, N, D], rotated and times the softmax scale.
        positions : of these queries among the keys.
        keys, values : [H, T, D], rotated.
        rules : softcap, learned sinks and sliding window of the model.
        """
        heads, tokens = keys.shape[:2]
        at = torch.tensor(positions, device=keys.device)[:, None]
        slots = torch.arange(keys.shape[1], device=keys.device)
        sinks = None if rules.sinks is None else rules.sinks.view(len(keys), -1, 1)
        for h, own in enumerate(query.to(keys.dtype).unflatten(0, (len(keys), -1))):
            norms = torch.linalg.vector_norm(values[h], dim=-1, dtype=torch.float32).square()
            # A few queries of a head at a time: probabilities over a long prompt are large.
            pieces = zip(own.split(PIECE, dim=1), at.split(PIECE), strict=True)
            for i, some, last in (
                (i, q, last) for piece, last in pieces for i, q in enumerate(piece)
            ):
                scores = capped((some @ keys[h].T).float(), rules.softcap)
                scores.masked_fill_(slots > last, -torch.inf)
                if rules.window_size:
                    scores.masked_fill_(slots <= last - rules.window_size, -torch.inf)
                p = scores.softmax(-1)
                if sinks is not None:
                    p *= (scores.logsumexp(-1, keepdim=True) - sinks[h, i]).sigmoid()
                out = (p.to(values.dtype) @ values[h]).float()
                self.output[b] += out.square().sum() / len(own)
                coded = (slots >= self.sink_tokens) & (slots <= last - self.residual_length)
                self.noise[b, h] += (p.mul_(coded).square_() @ norms).sum() / len(own)

    def mean(self) -> Tensor:
        """Loss of each head relative to its layer's output, mean over the sequences: [H]."""
        relative = self.noise / self.output[:, None].clamp(min=1e-30)
        return relative.mean(0).cpu()

    @normal_tensors
    def select(self, indices: list[int]) -> None:
        """Make sequence i a copy of the old sequence ``indices[i]``."""
        self.noise, self.output = self.noise[indices], self.output[indices]
