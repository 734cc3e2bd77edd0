"""Retrieval tasks in the manner of RULER (arXiv 2404.06654), from a seed and a tokenizer alone.

A sample is a long context with something hidden in it, a question, the beginning of the answer, and
the strings that a right answer holds. The context is put together out of tokens, so its length is
exact. Numbers are shorter and hops fewer than RULER's, so that models of a few hundred million
parameters can do some of the tasks; the shape of each task and its scoring are RULER's.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from svdq_bench.quality.words import ADJECTIVES, NOUNS

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)

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
# A needle is moved by up to this many tokens, so that it does not cut a sentence.
SEARCH_TOKENS = 64


@dataclass(frozen=True)
class Puzzle:
    """The words of a sample, before a haystack is put around them.

    Parameters
    ----------
    instruction : before the context.
    needles : sentences to hide.
    question : after the context.
    answer_prefix : how the model's answer begins.
    expected : strings that a right answer holds.
    places : depth of each needle, 0 (front) to 1 (end), in the order of the needles; None where it
        is the sample's own.
    words : for tasks whose context is a list of words, makes one of at least some number of words.
    """

    instruction: str
    needles: tuple[str, ...]
    question: str
    answer_prefix: str
    expected: tuple[str, ...]
    places: tuple[float | None, ...] = ()
    words: Callable[[int], list[str]] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Sample:
    """A question about a context.

    Parameters
    ----------
    task, depth : which task; depth of the needle asked for, None where there are several.
    context : [1, T] int64, what is prefilled and compressed.
    question : [1, L] int64, what is fed then.
    expected : strings that a right answer holds.
    """

    task: str
    depth: float | None
    context: Tensor
    question: Tensor
    expected: tuple[str, ...]

    def score(self, answer: str) -> float:
        """Share of the expected strings that are in an answer, upper and lower case alike."""
        text = answer.lower()
        return sum(word.lower() in text for word in self.expected) / len(self.expected)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _keys(rng: random.Random, count: int) -> list[str]:
    adjectives, nouns = rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count)
    return [f"{a} {n}" for a, n in zip(adjectives, nouns, strict=True)]


def _niah(needles: list[tuple[str, str]], asked: str, places: Sequence[float | None]) -> Puzzle:
    """A puzzle of (key, number) pairs, the asked key's numbers expected."""
    expected = tuple(number for key, number in needles if key == asked)
    noun, verb, list_start, number_is = "number", "is", "", "The special magic number"
    if len(expected) > 1:  # small models answer a numbered list best
        noun, verb, list_start = "numbers", "are", " these:\n1."
        number_is = "One of the special magic numbers"
    return Puzzle(
        "Some special magic numbers are hidden within the following text. Memorize them: you will "
        "be asked about them afterwards.",
        tuple(f"{number_is} for {key} is: {number}." for key, number in needles),
        f"What {verb} the special magic {noun} for {asked} mentioned in the text?",
        f"The special magic {noun} for {asked} mentioned in the text {verb}{list_start}",
        expected,
        tuple(places),
    )


def niah_single(rng: random.Random) -> Puzzle:
    """One needle: a key and its number."""
    (key,) = _keys(rng, 1)
    return _niah([(key, _number(rng))], key, [None])


def niah_multikey(rng: random.Random) -> Puzzle:
    """The needle asked for among others that look alike."""
    keys = _keys(rng, 1 + DISTRACTORS)
    places = [None, *(rng.random() for _ in range(DISTRACTORS))]
    return _niah([(key, _number(rng)) for key in keys], keys[0], places)


def niah_multivalue(rng: random.Random) -> Puzzle:
    """Several numbers of one key, all of them asked for."""
    (key,) = _keys(rng, 1)
    places = [(i + rng.random()) / VALUES for i in range(VALUES)]
    return _niah([(key, _number(rng)) for _ in range(VALUES)], key, places)


def variable_tracking(rng: random.Random) -> Puzzle:
    """A chain of assignments: which variables have the value that the first one was given?"""
    letters = rng.sample(string.ascii_uppercase, HOPS + 1)
    names = [first + "".join(rng.choices(string.ascii_uppercase, k=2)) for first in letters]
    value = _number(rng)
    needles = [f"VAR {names[0]} = {value}."]
    needles += [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False)]
    return Puzzle(
        "Memorize and track the chain of variable assignments hidden in the following text.",
        tuple(needles),
        f"Find all variables that are assigned the value {value} in the text above.",
        f"The {HOPS + 1} variables that are assigned the value {value} in the text above are VAR",
        tuple(names),
        tuple((i + rng.random()) / (HOPS + 1) for i in range(HOPS + 1)),
    )


def common_words(rng: random.Random) -> Puzzle:
    """A list of words, some of which come more often than the others."""
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
        f"What are the {COMMON_WORDS} most common words in the above list?",
        f"The {COMMON_WORDS} most common words in the list are these:\n1.",
        tuple(common),
        words=words,
    )


TASKS: dict[str, Callable[[random.Random], Puzzle]] = {
    "niah_single": niah_single,
    "niah_multikey": niah_multikey,
    "niah_multivalue": niah_multivalue,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}
# Tasks that ask for one needle, at a depth that is swept.
DEPTH_TASKS = ("niah_single", "niah_multikey")


class SampleMaker:
    """Builds samples for one tokenizer and haystack.

    Parameters
    ----------
    tokenizer : with a chat template or without.
    haystack : text that needles are hidden in; repeated where it is too short.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, haystack: str = NOISE) -> None:
        self.tokenizer = tokenizer
        self.hay = self._encode(haystack)
        if not self.hay:
            raise ValueError("the haystack has no tokens")
        self._ends: dict[int, bool] = {}

    def sample(
        self, task: str, context_tokens: int, depth: float | None = None, seed: str = ""
    ) -> Sample:
        """A sample whose context has exactly ``context_tokens`` tokens.

        Parameters
        ----------
        depth : where the needle asked for is hidden, 0 (front) to 1 (end); for ``DEPTH_TASKS``.
        seed : the same sample comes out of the same words.
        """
        _check(task, depth)
        rng = random.Random(f"{seed}/{task}/{context_tokens}/{depth}")
        puzzle = TASKS[task](rng)
        head, tail = self._frame(puzzle)
        room = context_tokens - len(head)
        fill = self._fill_words if puzzle.words else self._fill_hay
        body = fill(puzzle, room, depth, rng)
        if body is None:
            raise ValueError(f"{task} does not fit into a context of {context_tokens} tokens")
        context = torch.tensor([head + body])
        return Sample(task, depth, context, torch.tensor([tail]), puzzle.expected)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _frame(self, puzzle: Puzzle) -> tuple[list[int], list[int]]:
        """Tokens before and after the context, those of the chat template included."""
        mark = "\N{PILCROW SIGN}text\N{PILCROW SIGN}"
        user = f"{puzzle.instruction}\n\n{mark}\n\n{puzzle.question}"
        if getattr(self.tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": user}]
            prompt = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        else:
            prompt = f"{user}\n\n"
        head, tail = (prompt + puzzle.answer_prefix).split(mark)
        return self._encode(head), self._encode(tail)

    def _fill_hay(
        self, puzzle: Puzzle, room: int, depth: float | None, rng: random.Random
    ) -> list[int] | None:
        """Haystack of ``room`` tokens with the needles in it; None if they do not fit."""
        needles = [self._encode(f"\n{needle}\n") for needle in puzzle.needles]
        num_hay = room - sum(map(len, needles))
        if num_hay < 1:
            return None
        start = rng.randrange(len(self.hay))
        hay = [self.hay[(start + i) % len(self.hay)] for i in range(num_hay)]
        places = [depth if place is None else place for place in puzzle.places]
        body, last = [], 0
        order = sorted(range(len(needles)), key=lambda i: places[i])
        for index in order:
            place = max(self._sentence_end(hay, round(places[index] * num_hay)), last)
            body += hay[last:place] + needles[index]
            last = place
        return body + hay[last:]

    def _sentence_end(self, hay: list[int], wanted: int) -> int:
        """The end of a sentence or line nearest to a place, else the place itself."""
        if wanted in (0, len(hay)):
            return wanted
        for distance in range(SEARCH_TOKENS):
            for place in (wanted - distance, wanted + distance):
                if 0 < place < len(hay) and self._ends_sentence(hay[place - 1]):
                    return place
        return wanted

    def _ends_sentence(self, token: int) -> bool:
        if token not in self._ends:
            text = self.tokenizer.decode([token])
            self._ends[token] = "\n" in text or text.endswith(".")
        return self._ends[token]

    def _fill_words(
        self, puzzle: Puzzle, room: int, depth: float | None, rng: random.Random
    ) -> list[int] | None:
        """A numbered list of words of ``room`` tokens, filled up with line ends."""
        state = rng.getstate()

        def listed(count: int) -> list[int]:
            rng.setstate(state)
            return self._encode(" ".join(f"{i}. {w}" for i, w in enumerate(puzzle.words(count), 1)))

        # More words than tokens never fit. The number that does is found by halving.
        fits, too_many = COMMON_WORDS * COMMON_TIMES, room + 1
        if len(listed(fits)) > room:
            return None
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if len(listed(middle)) <= room else (fits, middle)
        body = listed(fits)
        filler = self._encode("\n") or self.hay[:1]
        return (filler * room)[: room - len(body)] + body


def _check(task: str, depth: float | None) -> None:
    if task not in TASKS:
        raise ValueError(f"tasks are {', '.join(TASKS)}, got {task!r}")
    if (depth is not None) != (task in DEPTH_TASKS):
        needs = "needs a depth" if task in DEPTH_TASKS else "has no depth of its own"
        raise ValueError(f"{task} {needs}, got {depth}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be 0 .. 1, got {depth}")
