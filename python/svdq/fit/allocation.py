"""Bits of the latent channels: water-filling in units of attention score.

A channel of variance v that is coded with b bits leaves an error of v * d(b). Measured in units of
attention score, so that channels of all heads and layers compare, the widths that minimise the sum
of all errors for a given number of bits are those that minimise, channel by channel,

    v * d(b) + lambda * (b + overhead)

with one ``lambda`` for all of them, the price of a bit; ``overhead`` is what a coded channel costs
in addition to its codes (its row of the basis and its scale), spread over the tokens. So the price
is all that a layer needs of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq.layout import VALUE_BITS, WIDTHS

# d(b): mean squared error of b-bit codes of a normal variable of variance 1, in the range where the
# fourth power of the error is least (see fit_quantizer). By integration.
DISTORTION = {8: 1.39e-4, 4: 0.01552, 2: 0.1388, 1: 0.4042, 0: 1.0}
# The same of b-bit values with a scale that is unbiased along the token (kernels/rotation.h).
VALUE_DISTORTION = {4: 0.0117, 3: 0.0407, 2: 0.1357}


@dataclass(frozen=True)
class Emphasis:
    """How much more small channels count than their score variance v says.

    A channel counts with ``mean * (v / mean) ** power``, the mean being that of its head, and one
    that is dropped with ``dropped`` times that. Variances are those of the prompt, and what is
    dropped is missing from every token. Chosen by KL on two models, see docs/allocation.md.
    """

    power: float = 1.0
    dropped: float = 1.0


PLAIN = Emphasis()
USUAL = Emphasis(0.9, 1.0)
BELOW_ONE_BIT = Emphasis(0.85, 1.25)  # where most channels are dropped

GRANULE = 4  # channels that share a width; bands of one bit are pairs of granules


def overhead_bits(head_dim: int, num_tokens: int) -> float:
    """Bits per token of a coded channel in addition to its codes: basis in bfloat16, scale."""
    return (16 * head_dim + 32) / max(num_tokens, 1)


def water_fill(
    spectrum: Tensor, lambda_: float, overhead: float = 0.0, emphasis: Emphasis = PLAIN
) -> Tensor:
    """Widths of least error plus price.

    Parameters
    ----------
    spectrum : [N, D] score variances of the channels of N heads, each row in descending order.
    lambda_ : price of a bit, in squared score units.
    overhead : bits per token that any coded channel costs in addition to its code.
    emphasis : how much small channels count.

    Returns
    -------
    bands : [N, 4] int32 on the CPU: channels at 8, 4, 2 and 1 bits.
    """
    spectrum = spectrum.detach().cpu().double()
    if emphasis.power != 1:
        mean = spectrum.mean(1, keepdim=True).clamp(min=1e-300)
        spectrum = mean * (spectrum / mean).clamp(min=0).pow(emphasis.power)
    granules = _granules(spectrum)
    widths = torch.tensor([*WIDTHS, 0])
    distortion = torch.tensor([DISTORTION[int(w)] for w in widths], dtype=torch.float64)
    distortion[-1] *= emphasis.dropped
    price = lambda_ * GRANULE * (widths + overhead * (widths > 0))
    cost = granules[..., None] * distortion + price  # widest first: of equals the wider
    counts = torch.nn.functional.one_hot(cost.argmin(-1), len(widths)).sum(1)[:, :-1]
    _pair_ones(counts, granules, lambda_ * GRANULE * (1 + overhead))
    return (counts * GRANULE).int()


def solve_lambda(
    spectra: Sequence[Tensor], k_bits: float, overhead: float = 0.0
) -> tuple[float, list[Tensor]]:
    """The price at which heads take ``k_bits`` bits a number on average, or just below.

    Parameters
    ----------
    spectra : [H, D] score variances of every layer.
    k_bits : code bits per key number, averaged over all of them.

    Returns
    -------
    lambda_ : the price.
    bands : [H, 4] int32 of every layer.
    """
    joined = torch.cat(list(spectra)).double()
    price = solve_price(
        lambda x: code_bits(water_fill(joined, x, overhead)),
        k_bits * joined.numel(),
        float(joined.max()),
    )
    return price, list(water_fill(joined, price, overhead).split([len(x) for x in spectra]))


def solve_price(bits_at: Callable[[float], int], budget: float, largest: float) -> float:
    """The least price at which the bits stay within a budget, by bisection.

    ``largest`` is the largest variance: no key is coded at a price well above it.
    """
    low, high = largest * 1e-12, largest * 2 + 1e-30
    for _ in range(60):
        middle = (low * high) ** 0.5
        if bits_at(middle) > budget:
            low = middle
        else:
            high = middle
    return high


def equal_budgets(spectrum: Tensor, k_bits: float) -> Tensor:
    """Widths of least error with as many bytes for each head: [H, 4] int32.

    Parameters
    ----------
    spectrum : [H, D] score variances, in descending order.
    k_bits : code bits per key number of every head, rounded down to whole bytes a token.
    """
    dim = spectrum.shape[1]
    budget = int(k_bits * dim / 8) * 8
    if budget == 0:
        raise ValueError(f"k_bits={k_bits} of head_dim {dim} is less than a byte a token and head")
    rows = []
    for head in spectrum:
        _, (bands,) = solve_lambda([head[None]], budget / dim)
        rows.append(_fill(bands[0].tolist(), _granules(head[None])[0].tolist(), budget))
    return torch.tensor(rows, dtype=torch.int32)


def code_something(bands: Tensor, spectrum: Tensor) -> Tensor:
    """The same bands, or two bits for the first channels of one head where no head has any."""
    if int(bands.sum()) == 0:
        bands = bands.clone()
        bands[int(spectrum[:, 0].argmax()), WIDTHS.index(2)] = GRANULE
    return bands


def _granules(spectrum: Tensor) -> Tensor:
    """Variance of each granule of channels that share a width: [N, D / GRANULE] float64."""
    return spectrum.detach().cpu().double().unflatten(1, (-1, GRANULE)).sum(-1)


def code_bits(bands: Tensor) -> int:
    """Bits of a token's codes, all heads together."""
    return int((bands.long() * torch.tensor(WIDTHS)).sum())


def _pair_ones(counts: Tensor, granules: Tensor, price: float) -> None:
    """Make the granules of one bit even: drop the last or add the next, whichever costs less."""
    one = WIDTHS.index(1)
    gain = 1 - DISTORTION[1]
    for row in (counts[:, one] % 2).nonzero().flatten().tolist():
        end = int(counts[row].sum())
        added = price - gain * float(granules[row, end]) if end < granules.shape[1] else torch.inf
        dropped = gain * float(granules[row, end - 1]) - price
        counts[row, one] += 1 if added < dropped else -1


def _fill(bands: list[int], granules: list[float], budget: int) -> list[int]:
    """Spend the rest of a budget of bits, a multiple of 8, by the largest gain for a bit."""
    counts = {width: n // GRANULE for width, n in zip(WIDTHS, bands, strict=True)}
    counts[0] = len(granules) - sum(counts.values())
    left = budget - sum(GRANULE * width * n for width, n in counts.items())
    while left:
        steps = [(2, 4), (4, 8), (0, 2)]
        if counts[1]:
            steps = [(2, 4), (4, 8)]
        options = []
        for narrow, wide in steps:
            cost = GRANULE * (wide - narrow)
            if counts[narrow] and cost <= left:
                first = sum(n for width, n in counts.items() if width > narrow)
                gain = granules[first] * (DISTORTION[narrow] - DISTORTION[wide])
                options.append((gain / cost, {narrow: -1, wide: 1}))
        if counts[1]:  # a pair of granules
            first = sum(n for width, n in counts.items() if width > 1)
            gain = sum(granules[first : first + 2]) * (DISTORTION[1] - DISTORTION[2])
            options.append((gain / (2 * GRANULE), {1: -2, 2: 2}))
        if counts[0] > 1:
            first = len(granules) - counts[0]
            gain = sum(granules[first : first + 2]) * (1 - DISTORTION[1])
            options.append((gain / (2 * GRANULE), {0: -2, 1: 2}))
        if not options:
            raise ValueError(
                f"a head of {len(granules) * GRANULE} channels cannot take {budget} bits"
            )
        for width, change in max(options, key=lambda option: option[0])[1].items():
            counts[width] += change
        left = budget - sum(GRANULE * width * n for width, n in counts.items())
    return [counts[width] * GRANULE for width in WIDTHS]


def value_widths(loss: Tensor, lambda_: float, head_dim: int) -> tuple[int, ...]:
    """Bits of each head's values of least loss plus price.

    In the mean head a relative error of the values counts like as large a variance of the scores,
    because either moves the output by that much times ``sum p^2 |v|^2``.

    Parameters
    ----------
    loss : [H], relative to the mean of all heads.
    lambda_ : price of a bit, in squared score units.
    """
    distortion = torch.tensor([VALUE_DISTORTION[bits] for bits in VALUE_BITS], dtype=torch.float64)
    price = lambda_ * head_dim * torch.tensor(VALUE_BITS)
    cost = loss.cpu().double()[:, None] * distortion + price
    return tuple(VALUE_BITS[i] for i in cost.argmin(1).tolist())
