"""Who gets how many bits: a budget, what layers ask for, and the price that meets both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from svdq.fit.allocation import (
    BELOW_ONE_BIT,
    USUAL,
    Emphasis,
    code_bits,
    code_something,
    equal_budgets,
    solve_price,
    value_widths,
    water_fill,
)
from svdq.layout import VALUE_BITS


@dataclass(frozen=True)
class Demand:
    """What a layer tells of itself when it asks for widths.

    Parameters
    ----------
    spectrum : [H, D] score variances, in descending order.
    overhead : bits per token of any coded channel, see :func:`overhead_bits`.
    taken : bits per key number that the layer spends otherwise, of its share of ``k_bits``.
    value_loss : [H] loss of values, see :class:`svdq.fit.value_loss.ValueLoss`; None where their
        bits are given.
    """

    spectrum: Tensor
    overhead: float = 0.0
    taken: float = 0.0
    value_loss: Tensor | None = None


@dataclass(frozen=True)
class Widths:
    """Bands of a layer's heads, [H, 4] int32, and the bits of their values where asked for."""

    bands: Tensor
    v_bits: tuple[int, ...] | None = None


Answer = Callable[[Widths], None]


@dataclass(frozen=True)
class Budget:
    """Bits to spend on average; of the three, ``kv_bits`` or one or both of the others.

    Parameters
    ----------
    k_bits : code bits per key number.
    v_bits : code bits per value number; None where each head's are given.
    kv_bits : code bits per number of keys and values together, at one price for both.
    """

    k_bits: float | None = None
    v_bits: float | None = None
    kv_bits: float | None = None

    def check(self, taken: float) -> None:
        """Refuse budgets that pre-RoPE channels, which take so many bits of a key, use up."""
        if self.k_bits is not None and taken >= self.k_bits:
            raise ValueError(
                f"k_bits={self.k_bits} must be more than the {taken} that pre-RoPE channels take"
            )
        least = taken + min(VALUE_BITS)
        if self.kv_bits is not None and 2 * self.kv_bits <= least:
            raise ValueError(
                f"kv_bits={self.kv_bits} must be more than {least / 2}: values take "
                f"{min(VALUE_BITS)} bits at least, pre-RoPE channels {taken} of a key"
            )


@dataclass(frozen=True)
class Solution:
    """Prices of a bit, in squared score units, and how they are applied.

    Parameters
    ----------
    lambda_ : price of a bit of the keys.
    emphasis : how much small channels count.
    value_lambda : price of a bit of the values.
    mean_loss : of values, over all heads, which is the unit of theirs.
    """

    lambda_: float
    emphasis: Emphasis = USUAL
    value_lambda: float = 0.0
    mean_loss: float = 1.0

    def widths(self, demand: Demand, overhead: float) -> Widths:
        """What a layer gets: at least one coded channel, bits of values where it tells a loss."""
        bands = water_fill(demand.spectrum, self.lambda_, overhead, self.emphasis)
        v_bits = None
        if demand.value_loss is not None:
            loss, dim = demand.value_loss / self.mean_loss, demand.spectrum.shape[1]
            v_bits = value_widths(loss, self.value_lambda, dim)
        return Widths(code_something(bands, demand.spectrum), v_bits)


def solve_widths(demands: Sequence[Demand], budget: Budget) -> tuple[Solution, list[Widths]]:
    """The prices at which layers stay within a budget, or just below, and what they get.

    Every layer gets at least one coded channel.
    """
    overhead = sum(x.overhead for x in demands) / len(demands)
    solution = _solve(demands, budget, overhead, USUAL)
    widths = [solution.widths(x, overhead) for x in demands]
    if sum(code_bits(x.bands) for x in widths) < sum(x.spectrum.numel() for x in demands):
        solution = _solve(demands, budget, overhead, BELOW_ONE_BIT)
        widths = [solution.widths(x, overhead) for x in demands]
    return solution, widths


def _solve(
    demands: Sequence[Demand], budget: Budget, overhead: float, emphasis: Emphasis
) -> Solution:
    spectra = torch.cat([x.spectrum for x in demands]).double()
    numbers, dim = spectra.numel(), spectra.shape[1]
    taken = sum(x.taken * x.spectrum.numel() for x in demands)

    def key_bits(price: float) -> int:
        return code_bits(water_fill(spectra, price, overhead, emphasis))

    largest = float(spectra.max())
    if demands[0].value_loss is None:
        price = solve_price(key_bits, budget.k_bits * numbers - taken, largest)
        return Solution(price, emphasis)
    loss = torch.cat([x.value_loss for x in demands]).cpu().double()
    mean_loss = max(float(loss.mean()), 1e-30)
    loss = loss / mean_loss

    def value_bits(price: float) -> int:
        return dim * sum(value_widths(loss, price, dim))

    largest_loss = float(loss.max())
    if budget.kv_bits is None:
        price = solve_price(key_bits, budget.k_bits * numbers - taken, largest)
        value_price = solve_price(value_bits, budget.v_bits * numbers, largest_loss)
        return Solution(price, emphasis, value_price, mean_loss)
    price = solve_price(
        lambda x: key_bits(x) + value_bits(x),
        2 * budget.kv_bits * numbers - taken,
        max(largest, largest_loss),
    )
    return Solution(price, emphasis, price, mean_loss)


@dataclass
class Allocator:
    """Widths for the layers of one cache, which ask for them one after another.

    With a price, or where a budget holds for each layer or head, a layer is answered at once. A
    budget for the whole model is solved when all its layers have told their spectra: until then
    they wait and hold their tokens exact. The price stays for what is fitted later.

    Parameters
    ----------
    num_layers : layers that will ask.
    budget : bits on average; ``k_bits`` is None with a price.
    lambda_ : price of a bit in squared score units.
    scope : ``"model"``, ``"layer"`` or ``"head"``, over which the budget is an average.
    known : widths by layer where a profile says them; then nothing is solved.
    """

    num_layers: int
    budget: Budget
    lambda_: float | None = None
    scope: str = "model"
    known: dict[int, Widths] | None = None
    solution: Solution | None = field(init=False, default=None)
    _waiting: dict[int, tuple[Demand, Answer]] = field(init=False)  # by layer

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all that layers asked and the solution."""
        self.solution = None if self.lambda_ is None else Solution(self.lambda_)
        self._waiting = {}

    def state(self) -> dict[str, Any]:
        """What is known of widths, as JSON has it: prices, and widths that a profile said."""
        known = None
        if self.known is not None:
            known = {str(i): [own.bands.tolist(), own.v_bits] for i, own in self.known.items()}
        return {"solution": self.solution and asdict(self.solution), "known": known}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what another allocator's :meth:`state` said."""
        if state["solution"] is not None:
            fields = dict(state["solution"])
            self.solution = Solution(**{**fields, "emphasis": Emphasis(**fields["emphasis"])})
        if state["known"] is not None:
            self.known = {
                int(layer): Widths(
                    torch.tensor(bands, dtype=torch.int32), None if bits is None else tuple(bits)
                )
                for layer, (bands, bits) in state["known"].items()
            }

    def checkpoint(self) -> Callable[[], None]:
        """What to call to forget all that layers ask from here on."""
        solution, waiting = self.solution, dict(self._waiting)

        def restore() -> None:
            self.solution, self._waiting = solution, waiting

        return restore

    def ask(self, layer: int, demand: Demand, answer: Answer) -> None:
        """Tell what a layer asks for; ``answer`` is called with its widths.

        That happens at once or, where layers wait for each other, when the last one asks.
        """
        self.budget.check(demand.taken)
        if self.known is not None:
            answer(self.known[layer])
        elif self.scope == "head":
            answer(Widths(equal_budgets(demand.spectrum, self.budget.k_bits - demand.taken)))
        elif self.scope == "layer":
            answer(solve_widths([demand], self.budget)[1][0])
        elif self.solution is not None:
            answer(self.solution.widths(demand, demand.overhead))
        else:
            waiting = replace(demand, spectrum=demand.spectrum.cpu())
            self._waiting[layer] = (waiting, answer)
            if len(self._waiting) == self.num_layers:
                self._answer_all()

    def _answer_all(self) -> None:
        asked = [self._waiting[layer] for layer in sorted(self._waiting)]
        self._waiting = {}
        demands, answers = zip(*asked, strict=True)
        self.solution, widths = solve_widths(demands, self.budget)
        for answer, own in zip(answers, widths, strict=True):
            answer(own)
