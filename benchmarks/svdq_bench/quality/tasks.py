"""Samples of the retrieval tasks for one tokenizer: a long context and questions about it.

A sample is a context with something hidden in it and questions that are each asked on their own,
with the beginning of the answer and the strings that a right answer holds. The context is put
together out of tokens, so its length is exact.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from svdq_bench.quality.puzzles import (
    COMMON_TIMES,
    COMMON_WORDS,
    DEPTH_TASKS,
    TASKS,
    Asked,
    Puzzle,
)

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)

# A needle is moved by up to this many tokens, so that it does not cut a sentence.
SEARCH_TOKENS = 64
# Keys of the needles of a context are of different words, and there are so many words.
MAX_QUESTIONS = 64


@dataclass(frozen=True)
class Question:
    """What is fed after a context.

    Parameters
    ----------
    tokens : [1, L] int64, the question and the beginning of its answer.
    expected : strings that a right answer holds.
    answer : [1, A] int64, the expected strings as an answer would go on with them; None where
        their order is open.
    spans : of each expected string the indices of its tokens in the answer, without spaces.
    """

    tokens: Tensor
    expected: tuple[str, ...]
    answer: Tensor | None = None
    spans: tuple[tuple[int, ...], ...] = ()

    def score(self, answer: str) -> float:
        """Share of the expected strings that are in an answer, upper and lower case alike."""
        text = answer.lower()
        return sum(word.lower() in text for word in self.expected) / len(self.expected)


@dataclass(frozen=True)
class Sample:
    """A context and questions about it.

    Parameters
    ----------
    task, depth : which task; depth of the needle asked for, None where there are several.
    context : [1, T] int64, what is prefilled and compressed.
    questions : each asked on its own.
    """

    task: str
    depth: float | None
    context: Tensor
    questions: tuple[Question, ...]


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
        self,
        task: str,
        context_tokens: int,
        depth: float | None = None,
        seed: str = "",
        questions: int = 1,
    ) -> Sample:
        """A sample whose context has exactly ``context_tokens`` tokens.

        Parameters
        ----------
        depth : where the needle asked for is hidden, 0 (front) to 1 (end); for ``DEPTH_TASKS`` with
            one question. The needles of several are spread.
        seed : the same sample comes out of the same words.
        questions : needles that are asked for; of a list of words there is one question.
        """
        _check(task, depth, questions)
        rng = random.Random(f"{seed}/{task}/{context_tokens}/{depth}")
        puzzle = TASKS[task](rng, questions)
        frames = [self._frame(puzzle, asked) for asked in puzzle.questions]
        head = frames[0][0]
        room = context_tokens - len(head)
        fill = self._fill_words if puzzle.words else self._fill_hay
        body = fill(puzzle, room, depth, rng)
        if body is None:
            raise ValueError(f"{task} does not fit into a context of {context_tokens} tokens")
        asked = zip(puzzle.questions, frames, strict=True)
        found = tuple(self._question(question, tail) for question, (_, tail) in asked)
        return Sample(task, depth, torch.tensor([head + body]), found)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _question(self, asked: Asked, tail: list[int]) -> Question:
        """A question of these tokens, with its answer where the order of that is fixed."""
        tokens = torch.tensor([tail])
        if asked.joins is None:
            return Question(tokens, asked.expected)
        answer, spans = [], []
        for join, word in zip(("", *asked.joins), asked.expected, strict=True):
            answer += self._encode(join) if join else []
            own = self._encode(f" {word}")
            # A space of its own is the format of an answer, not what was to be found.
            known = [i for i, token in enumerate(own) if self.tokenizer.decode([token]).strip()]
            spans.append(tuple(len(answer) + i for i in known))
            answer += own
        return Question(tokens, asked.expected, torch.tensor([answer]), tuple(spans))

    def _frame(self, puzzle: Puzzle, asked: Asked) -> tuple[list[int], list[int]]:
        """Tokens before and after the context, those of the chat template included."""
        mark = "\N{PILCROW SIGN}text\N{PILCROW SIGN}"
        user = f"{puzzle.instruction}\n\n{mark}\n\n{asked.text}"
        if getattr(self.tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": user}]
            prompt = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        else:
            prompt = f"{user}\n\n"
        head, tail = (prompt + asked.answer_prefix).split(mark)
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


def _check(task: str, depth: float | None, questions: int) -> None:
    if task not in TASKS:
        raise ValueError(f"tasks are {', '.join(TASKS)}, got {task!r}")
    if not 1 <= questions <= MAX_QUESTIONS:
        raise ValueError(f"a context has 1 .. {MAX_QUESTIONS} questions, got {questions}")
    if (depth is not None) != has_depth(task, questions):
        needs = "needs a depth" if has_depth(task, questions) else "has no depth of its own"
        raise ValueError(f"{task} {needs}, got {depth}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be 0 .. 1, got {depth}")


def has_depth(task: str, questions: int) -> bool:
    """True if a task asks for one needle, whose depth can be chosen."""
    return task in DEPTH_TASKS and questions == 1
