"""What coding the values of a head costs, against its definition and against coding them."""

import pytest
import torch

from support import assert_within
from svdq import reference, sample_positions
from svdq.fit.allocation import VALUE_DISTORTION
from svdq.fit.value_loss import SAMPLE_QUERIES, ValueLoss


@pytest.mark.parametrize("tokens", [1, 2, 5, 40, 43, 100, 3000])
def test_positions_are_of_the_last_three_quarters(tokens):
    positions = sample_positions(tokens)
    assert positions == sorted(set(positions)) and positions[-1] == tokens - 1
    assert positions[0] >= tokens // 4
    assert len(positions) == min(SAMPLE_QUERIES, tokens - tokens // 4)


def make_sequence(tokens=400, heads=2, group=3, dim=64):
    query = torch.randn(heads * group, len(sample_positions(tokens)), dim) / 4
    keys, values = torch.randn(2, heads, tokens, dim)
    values[1] *= 3
    return query, sample_positions(tokens), keys, values


def attention(query, positions, keys):
    """Causal probabilities [Hq, N, T] float64 of queries at these positions."""
    keys = keys.double().repeat_interleave(len(query) // len(keys), 0)
    hidden = torch.arange(keys.shape[1]) > torch.tensor(positions)[:, None]
    return (query.double() @ keys.mT).masked_fill(hidden, -torch.inf).softmax(-1)


def test_loss_is_that_of_independent_errors():
    """The mean squared error of outputs, when values are coded, is the loss times d(bits)."""
    query, positions, keys, values = make_sequence()
    loss = ValueLoss(1, 2, (0, 0), torch.device("cpu"))
    loss.add(0, query, positions, keys, values)
    p = attention(query, positions, keys)
    every = values.double().repeat_interleave(3, 0)
    output = (p @ every).square().sum(-1).unflatten(0, (2, 3)).mean(1).sum()
    for bits, distortion in VALUE_DISTORTION.items():
        scale, codes, _ = reference.quantize_values(values, bits)
        decoded = (codes - (2**bits - 1) / 2) * scale[..., None] @ reference.rotation(64)
        error = p @ (decoded - values).repeat_interleave(3, 0)
        lost = error.square().sum(-1).unflatten(0, (2, 3)).mean(1).sum(1) / output
        # Errors are independent to the extent that tokens are; a few hundred of them leave a fifth.
        assert_within(loss.mean().double() * distortion / lost, torch.ones(2).double(), 0.2)


def test_sinks_and_window_lose_nothing():
    query, positions, keys, values = make_sequence()
    sinks, window = 8, 64
    loss = ValueLoss(1, 2, (sinks, window), torch.device("cpu"))
    loss.add(0, query, positions, keys, values)
    p = attention(query, positions, keys)
    every = values.double().repeat_interleave(3, 0)
    output = (p @ every).square().sum(-1).unflatten(0, (2, 3)).mean(1).sum()
    p[..., :sinks] = 0
    for n, position in enumerate(positions):
        p[:, n, max(position - window + 1, 0) :] = 0
    noise = (p.square() @ every.square().sum(-1)[..., None]).sum((1, 2)).unflatten(0, (2, 3))
    assert_within(loss.mean(), (noise.mean(1) / output).float(), 1e-5 * float(loss.mean().max()))


def test_sequences_count_alike():
    query, positions, keys, values = make_sequence()
    alone, both = (ValueLoss(n, 2, (0, 0), torch.device("cpu")) for n in (1, 2))
    alone.add(0, query, positions, keys, values)
    for b in range(2):
        both.add(b, query, positions, keys, values)
    both.add(1, query, positions, keys, values)  # more queries of one sequence
    assert_within(both.mean(), alone.mean(), 1e-5 * float(alone.mean().max()))
    both.select([1, 1, 0])
    assert both.noise.shape == (3, 2) and both.output.shape == (3,)
