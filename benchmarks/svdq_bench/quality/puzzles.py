"""Words of the retrieval tasks, in the manner of RULER (arXiv 2404.06654), from random numbers.

Numbers are shorter and hops fewer than RULER's, so that models of a few hundred million parameters
can do some of the tasks; the shape of each task and its scoring are RULER's.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from svdq_bench.quality.words import ADJECTIVES, NOUNS

DIGITS = 5
DISTRACTORS = 3
VALUES = 2
HOPS = 2
COMMON_WORDS, COMMON_TIMES, RARE_TIMES = 5, 12, 2
# Tokens that an answer may take.
ANSWER_TOKENS = {
    "niah_single": 24,
    "niah_multikey": 24,
    "niah_multivalue": 48,
    "variable_tracking": 32,
    "common_words": 48,
}


@dataclass(frozen=True)
class Asked:
    """A question in words.

    Parameters
    ----------
    text : the question.
    answer_prefix : how the model's answer begins.
    expected : strings that a right answer holds.
    joins : text between two expected strings and their spaces; None where their order is open.
    """

    text: str
    answer_prefix: str
    expected: tuple[str, ...]
    joins: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Puzzle:
    """The words of a sample, before a haystack is put around them.

    Parameters
    ----------
    instruction : before the context.
    needles : sentences to hide.
    questions : each asked on its own after the context.
    places : depth of each needle, 0 (front) to 1 (end), in the order of the needles; None where it
        is the sample's own.
    words : for tasks whose context is a list of words, makes one of at least some number of words.
    """

    instruction: str
    needles: tuple[str, ...]
    questions: tuple[Asked, ...]
    places: tuple[float | None, ...] = ()
    words: Callable[[int], list[str]] | None = field(default=None, compare=False)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _keys(rng: random.Random, count: int) -> list[str]:
    adjectives, nouns = rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count)
    return [f"{a} {n}" for a, n in zip(adjectives, nouns, strict=True)]


def _spread(rng: random.Random, count: int) -> list[float | None]:
    """Places of needles that are asked for: one has the sample's depth, several are spread."""
    if count == 1:
        return [None]
    return [(i + rng.random()) / count for i in range(count)]


def _niah(
    needles: list[tuple[str, str]], asked: Sequence[str], places: Sequence[float | None]
) -> Puzzle:
    """A puzzle of (key, number) pairs; each of the asked keys is a question."""
    questions = []
    for wanted in asked:
        expected = tuple(number for key, number in needles if key == wanted)
        noun, verb, list_start, number_is = "number", "is", "", "The special magic number"
        if len(expected) > 1:  # small models answer a numbered list best
            noun, verb, list_start = "numbers", "are", " these:\n1."
            number_is = "One of the special magic numbers"
        questions.append(
            Asked(
                f"What {verb} the special magic {noun} for {wanted} mentioned in the text?",
                f"The special magic {noun} for {wanted} mentioned in the text {verb}{list_start}",
                expected,
                tuple(f"\n{i}." for i in range(2, len(expected) + 1)),
            )
        )
    return Puzzle(
        "Some special magic numbers are hidden within the following text. Memorize them: you will "
        "be asked about them afterwards.",
        tuple(f"{number_is} for {key} is: {number}." for key, number in needles),
        tuple(questions),
        tuple(places),
    )


def niah_single(rng: random.Random, questions: int = 1) -> Puzzle:
    """Needles that are all asked for: a key and its number."""
    keys = _keys(rng, questions)
    places = _spread(rng, questions)
    return _niah([(key, _number(rng)) for key in keys], keys, places)


def niah_multikey(rng: random.Random, questions: int = 1) -> Puzzle:
    """The needles asked for among others that look alike."""
    keys = _keys(rng, questions + DISTRACTORS)
    places = [*_spread(rng, questions), *(rng.random() for _ in range(DISTRACTORS))]
    return _niah([(key, _number(rng)) for key in keys], keys[:questions], places)


def niah_multivalue(rng: random.Random, questions: int = 1) -> Puzzle:
    """Several numbers of one key, all of them asked for."""
    keys = _keys(rng, questions)
    places = [(i + rng.random()) / VALUES for _ in keys for i in range(VALUES)]
    needles = [(key, _number(rng)) for key in keys for _ in range(VALUES)]
    return _niah(needles, keys, places)


def variable_tracking(rng: random.Random, questions: int = 1) -> Puzzle:
    """A chain of assignments: which variables have the value that the first one was given?"""
    needles: list[str] = []
    asked: list[Asked] = []
    places: list[float] = []
    taken: set[str] = set()
    while len(asked) < questions:
        letters = rng.sample(string.ascii_uppercase, HOPS + 1)
        names = [first + "".join(rng.choices(string.ascii_uppercase, k=2)) for first in letters]
        value = _number(rng)
        if taken & {*names, value}:
            continue
        taken |= {*names, value}
        needles += [f"VAR {names[0]} = {value}."]
        needles += [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False)]
        places += [(i + rng.random()) / (HOPS + 1) for i in range(HOPS + 1)]
        asked.append(
            Asked(
                f"Find all variables that are assigned the value {value} in the text above.",
                f"The {HOPS + 1} variables that are assigned the value {value} in the text above "
                "are VAR",
                tuple(names),
                (", VAR",) * HOPS,
            )
        )
    return Puzzle(
        "Memorize and track the chain of variable assignments hidden in the following text.",
        tuple(needles),
        tuple(asked),
        tuple(places),
    )


def common_words(rng: random.Random, questions: int = 1) -> Puzzle:
    """A list of words, some of which come more often than the others: one question, always."""
    common = rng.sample(NOUNS, COMMON_WORDS)
    others = sorted({f"{a} {n}" for a in ADJECTIVES for n in NOUNS if n not in common})

    def words(count: int) -> list[str]:
        """A shuffled list; half the words of a long one are common ones."""
        times = max(COMMON_TIMES, count // (2 * COMMON_WORDS))
        rare = rng.sample(others, max((count - times * COMMON_WORDS) // RARE_TIMES, 1))
        found = common * times + rare * RARE_TIMES
        rng.shuffle(found)
        return found

    return Puzzle(
        "Below is a list of words, in which some come more often than the others. Memorize the "
        "ones that come most often.",
        (),
        (
            Asked(
                f"What are the {COMMON_WORDS} most common words in the above list?",
                f"The {COMMON_WORDS} most common words in the list are these:\n1.",
                tuple(common),
            ),
        ),
        words=words,
    )


TASKS: dict[str, Callable[[random.Random, int], Puzzle]] = {
    "niah_single": niah_single,
    "niah_multikey": niah_multikey,
    "niah_multivalue": niah_multivalue,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}
# Tasks that ask for one needle, at a depth that is swept where one question is asked.
DEPTH_TASKS = ("niah_single", "niah_multikey")
