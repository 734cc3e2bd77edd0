"""Perplexity, KL divergence and agreement of two models' predictions of the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Positions whose full-vocabulary distributions are held in float64 at once: 134 MB
# for a vocabulary of 256k.
CHUNK_POSITIONS = 64


@dataclass(frozen=True)
class Scores:
    """Sums over predicted tokens; add two of them to pool windows of text.

    Parameters
    ----------
    num_tokens : tokens predicted.
    nll : negative log-likelihood of the true tokens, in nats, summed.
    kl : KL(reference || candidate) over the whole vocabulary, in nats, summed.
    top1 : tokens for which both put the same token first.
    """

    num_tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    top1: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            self.num_tokens + other.num_tokens,
            self.nll + other.nll,
            self.kl + other.kl,
            self.top1 + other.top1,
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll / self.num_tokens)

    @property
    def mean_kl(self) -> float:
        """KL divergence per predicted token, in nats."""
        return self.kl / self.num_tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens for which both put the same token first."""
        return self.top1 / self.num_tokens


def compare_logits(reference: Tensor, candidate: Tensor, targets: Tensor) -> Scores:
    """Score a candidate's predictions against a reference's, in float64 and in chunks of positions.

    Parameters
    ----------
    reference, candidate : [T, vocabulary] logits of any floating type; row t predicts
        ``targets[t]``.
    targets : [T] int64.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, or a logit is not a number (a broken cache must not
        score).
    """
    if reference.shape != candidate.shape or reference.shape[:1] != targets.shape:
        raise ValueError(
            "expected reference and candidate [T, vocabulary] and targets [T], got "
            f"{tuple(reference.shape)}, {tuple(candidate.shape)} and {tuple(targets.shape)}"
        )
    total = Scores()
    for start in range(0, len(targets), CHUNK_POSITIONS):
        rows = slice(start, start + CHUNK_POSITIONS)
        log_p = reference[rows].double().log_softmax(-1)
        log_q = candidate[rows].double().log_softmax(-1)
        if bool(log_p.isnan().any() | log_q.isnan().any()):
            raise ValueError(f"logits of the positions {start} and up are not all numbers")
        p = log_p.exp()
        total += Scores(
            num_tokens=len(log_p),
            nll=-log_q.gather(1, targets[rows, None]).sum().item(),
            kl=torch.where(p > 0, p * (log_p - log_q), 0.0).sum().item(),
            top1=int((log_p.argmax(-1) == log_q.argmax(-1)).sum()),
        )
    return total
