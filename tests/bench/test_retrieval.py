"""Retrieval: the questions that are made, how they are asked, scored and summed up."""

import json
import re
import statistics
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from cache_support import make_model, make_tokens
from model_support import make_char_tokenizer
from svdq_bench.cli import app
from svdq_bench.cli.table import cells
from svdq_bench.quality import retrieval
from svdq_bench.quality.intervals import t_quantile
from svdq_bench.quality.peers import FullCache, Kivi, PerChannel
from svdq_bench.quality.prefix import read_prefix
from svdq_bench.quality.puzzles import DEPTH_TASKS, TASKS
from svdq_bench.quality.retrieval import Sweep, answer, evaluate_retrieval
from svdq_bench.quality.summary import able_tasks, pooled, summarize
from svdq_bench.quality.tasks import NOISE, Question, SampleMaker

HAYSTACK = "\n".join(f"Line {i} of a long text. It says little." for i in range(300))
LENGTH = 2600  # characters


@pytest.fixture(scope="module")
def tokenizer():
    return make_char_tokenizer()


@pytest.fixture(scope="module")
def maker(tokenizer):
    return SampleMaker(tokenizer, HAYSTACK)


def depth_of(task, depth=0.5):
    return depth if task in DEPTH_TASKS else None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1, 2 * LENGTH])
def test_contexts_have_their_length(task, length, maker, tokenizer):
    sample = maker.sample(task, length, depth_of(task), "a")
    assert sample.context.shape == (1, length)
    assert sample.context.dtype == sample.questions[0].tokens.dtype == torch.long
    text = tokenizer.decode(sample.context[0])
    assert text.startswith("w1 user ")  # the chat template's head; its tail is in the question
    (asked,) = sample.questions
    for word in asked.expected:
        assert word in text
    question = tokenizer.decode(asked.tokens[0])
    assert "w1 assistant The " in question
    assert re.search(r"(is|are|VAR|1\.)$", question)


@pytest.mark.parametrize("task", TASKS)
def test_samples_follow_from_the_seed(task, maker):
    one, same, other = (maker.sample(task, LENGTH, depth_of(task), seed) for seed in "aab")
    assert torch.equal(one.context, same.context)
    assert torch.equal(one.questions[0].tokens, same.questions[0].tokens)
    assert one.questions[0].expected == same.questions[0].expected
    assert not torch.equal(one.context, other.context)
    assert one.questions[0].expected != other.questions[0].expected


def needles_of(text):
    """Key, number and place of every needle in a text; each has its own line."""
    pattern = r"(?:The|One of the) special magic numbers? for (\w+ \w+) is: (\d{5})\.\n"
    return [(found[1], found[2], found.start()) for found in re.finditer(pattern, text)]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_needles_stand_between_sentences_at_their_depth(chat, depth):
    tokenizer = make_char_tokenizer(chat)
    sample = SampleMaker(tokenizer, HAYSTACK).sample("niah_multikey", LENGTH, depth, "s")
    text = tokenizer.decode(sample.context[0])
    (question,) = sample.questions
    asked = re.search(r"number for (\w+ \w+) mentioned", tokenizer.decode(question.tokens[0]))[1]
    needles = needles_of(text)
    assert len(needles) == len({key for key, *_ in needles}) == 4
    assert [number for key, number, _ in needles if key == asked] == list(question.expected)
    head = text.index("\n\n") + 2
    hay_before = 0
    for key, number, place in needles:
        before = text[head : place - 1]  # without the needle's own line end
        at_the_end = depth == 1 and key == asked  # where the haystack is cut, whatever is there
        assert not before or before.endswith((".", "\n")) or at_the_end, before[-20:]
        hay_before = len(re.sub(r"\nThe special magic .*\n", "", before))
        if key == asked:
            assert number == question.expected[0]
            break
    hay = len(re.sub(r"\nThe special magic .*\n", "", text[head:]))
    # The way to the nearest end of a sentence is at most half of the longest one.
    assert hay_before / hay == pytest.approx(depth, abs=20 / hay)


def test_values_of_one_key_are_all_expected(maker, tokenizer):
    sample = maker.sample("niah_multivalue", LENGTH, None, "a")
    needles = needles_of(tokenizer.decode(sample.context[0]))
    assert len({key for key, *_ in needles}) == 1
    assert [number for _, number, _ in needles] == list(sample.questions[0].expected)
    assert len(needles) == 2


def test_variables_follow_a_chain(maker, tokenizer):
    sample = maker.sample("variable_tracking", LENGTH, None, "a")
    text = tokenizer.decode(sample.context[0])
    value = re.search(r"value (\d{5}) in", tokenizer.decode(sample.questions[0].tokens[0]))[1]
    one, two, three = sample.questions[0].expected
    chain = re.findall(r"VAR ([A-Z]{3}) = (VAR [A-Z]{3}|\d{5})\.", text)
    assert chain == [(one, value), (two, f"VAR {one}"), (three, f"VAR {two}")]


def test_common_words_are_the_most_common(maker, tokenizer):
    sample = maker.sample("common_words", LENGTH, None, "a")
    text = tokenizer.decode(sample.context[0])
    words = re.findall(r"\d+\. ([a-z]+(?: [a-z]+)?)", text.partition("often.")[2])
    most = Counter(words).most_common(6)
    assert {word for word, _ in most[:5]} == set(sample.questions[0].expected)
    assert most[4][1] > 2 * most[5][1]


def test_noise_fills_any_length(tokenizer):
    sample = SampleMaker(tokenizer, NOISE).sample("niah_single", 5000, 0.5, "a")
    assert sample.context.shape[1] == 5000
    assert tokenizer.decode(sample.context[0]).count("The sky is blue.") > 40


def test_score_is_the_share_found():
    question = Question(torch.zeros(1, 1), ("ABC", "12345"))
    assert question.score("abc and 12345") == 1
    assert question.score("it is 123456") == 0.5
    assert question.score("") == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("niah", LENGTH), "tasks are niah_single, .* got 'niah'"),
        (("niah_single", LENGTH), "niah_single needs a depth, got None"),
        (("common_words", LENGTH, 0.5), "common_words has no depth of its own, got 0.5"),
        (("niah_single", LENGTH, 1.5), "depth must be 0 .. 1, got 1.5"),
        (("niah_single", 150, 0.5), "niah_single does not fit into a context of 150 tokens"),
        (("common_words", 300), "common_words does not fit into a context of 300 tokens"),
    ],
)
def test_samples_that_cannot_be(arguments, message, maker):
    with pytest.raises(ValueError, match=message):
        maker.sample(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": ("niah_single", "x")}, "got niah_single, x"),
        ({"tasks": ()}, "got none"),
        ({"samples": 0}, "at least one sample"),
        ({"depths": (0.5, 2)}, "depths must be 0 .. 1"),
    ],
)
def test_sweeps_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**options)


def test_sweep_asks_depths_where_there_is_one(maker):
    sweep = Sweep(("niah_single", "niah_multivalue"), (LENGTH,), (0.0, 1.0), samples=2)
    samples = sweep.make_samples(maker)
    assert list(samples) == [
        ("niah_single", LENGTH, 0.0),
        ("niah_single", LENGTH, 1.0),
        ("niah_multivalue", LENGTH, None),
    ]
    assert all(len(group) == 2 for group in samples.values())
    assert (
        len({sample.questions[0].expected for group in samples.values() for sample in group}) == 6
    )


@torch.inference_mode()
def test_answer_is_greedy_generation():
    model, tokens = make_model("llama", "sdpa"), make_tokens(1, 60)
    prefix = read_prefix(model, tokens[:, :50])
    found = answer(model, FullCache().compress(prefix), tokens[:, 50:], 12)
    expected = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12
    )
    assert found == expected[0, 60:].tolist()
    cache = FullCache().compress(prefix)
    assert answer(model, cache, tokens[:, 50:], 12, lambda t: len(t) == 3) == found[:3]
    model.generation_config.eos_token_id = [255, found[4]]
    cut = answer(model, FullCache().compress(prefix), tokens[:, 50:], 12)
    assert cut == found[: found.index(found[4])]


def test_every_method_answers_on_one_prefill(monkeypatch, maker, tokenizer):
    model = make_model("llama", "sdpa")
    sweep = Sweep(("niah_single", "variable_tracking"), (700,), (0.0, 1.0), samples=2)
    samples = sweep.make_samples(maker)
    prefills, by_question = [], {}
    for group in samples.values():
        by_question |= {tuple(s.questions[0].tokens[0].tolist()): s.questions[0] for s in group}

    def read(model, context):
        prefills.append(context)
        return read_prefix(model, context)

    def reply(model, cache, question, max_tokens, stop, one_by_one):
        """All right from the full cache; the first variable from two bits; nothing from one."""
        expected = by_question[tuple(question[0].tolist())].expected
        bits = getattr(cache, "peer_columns", {"k_bits": 32})["k_bits"]
        words = expected if bits == 32 else expected[:1] if bits == 2 else ()
        return tokenizer(" ".join(words)).input_ids

    monkeypatch.setattr(retrieval, "read_prefix", read)
    monkeypatch.setattr(retrieval, "answer", reply)
    steps = []
    methods = [Kivi(2), PerChannel(1)]
    rows = evaluate_retrieval(model, tokenizer, methods, samples, steps.append, decode=True)
    assert len(prefills) == len(steps) == 6
    assert len(rows) == 3 * 3
    for row in rows:
        assert row["full_accuracy"] == 1
        assert row["samples"] == row["contexts"] == 2
        assert row["scored"] == "decoded"
        third = pytest.approx(1 / 3) if row["task"] == "variable_tracking" else 1
        assert row["accuracy"] == {32: 1, 2: third, 1: 0}[row["k_bits"]]
        assert row["accuracy_difference"] == pytest.approx(row["accuracy"] - 1)
        assert row["accuracy_square"] == pytest.approx((1 - row["accuracy"]) ** 2)
    assert [row["depth"] for row in rows[::3]] == [0.0, 1.0, None]


def test_contexts_must_leave_room_for_the_answer(maker, tokenizer):
    model = make_model("llama", "sdpa")
    longest = model.config.max_position_embeddings
    samples = {("niah_single", longest, 0.5): [maker.sample("niah_single", longest, 0.5)]}
    with pytest.raises(ValueError, match=f"takes up to {longest} tokens"):
        evaluate_retrieval(model, tokenizer, [], samples)


def make_rows():
    """Two methods on two tasks of two lengths; the model can do one of the tasks."""
    rows = []
    for method, shift in (("full cache", 0.0), ("kivi", 0.2)):
        for length, samples in ((100, 1), (200, 3)):
            for task, full in (("easy", 0.9), ("hard", 0.1)):
                accuracy = full - shift * (task == "easy")
                row = {"method": method, "task": task, "context_tokens": length}
                row |= {"accuracy": accuracy, "full_accuracy": full, "samples": samples}
                row |= {"depth": None, "k_bits": 2, "all_in_bits": length / 50, "cache_ratio": 2}
                rows.append({"benchmark": "retrieval"} | row)
    rows[-2]["accuracy"] = 0.3  # kivi, 200 tokens, easy
    return rows


def test_summary_pools_by_samples_and_knows_what_the_model_can_do():
    rows = make_rows()
    assert able_tasks(rows) == {"easy"}
    full, kivi = summarize(rows)
    assert pooled(rows[:4]) == pytest.approx(0.5)
    assert full["task: easy"] == full["able"] == pytest.approx(0.9)
    assert kivi["task: hard"] == pytest.approx(0.1)
    assert kivi["task: easy"] == kivi["able"] == pytest.approx((0.7 + 3 * 0.3) / 4)
    assert (kivi["tokens: 100"], kivi["tokens: 200"]) == (pytest.approx(0.7), pytest.approx(0.3))
    assert kivi["all_in_bits"] == pytest.approx((2 * 1 + 4 * 3) / 4)


def test_summary_tells_the_width_of_paired_differences():
    scores = {"easy": ([1, 0, 1, 1, 0], [1, 1, 1, 0, 1]), "hard": ([1, 0.5, 1], [1, 1, 1])}
    rows, means, variances = [], [], []
    for task, (found, full) in scores.items():
        differences = [a - b for a, b in zip(found, full, strict=True)]
        means.append(statistics.fmean(differences))
        variances.append(statistics.variance(differences) / len(differences))
        for part in (slice(0, 2), slice(2, None)):  # as of two depths
            row = {"method": "svdq", "task": task, "context_tokens": 100, "k_bits": 1}
            row |= {"accuracy": statistics.fmean(found[part]), "samples": len(found[part])}
            row |= {"full_accuracy": statistics.fmean(full[part]), "contexts": len(found[part])}
            row |= {"accuracy_square": statistics.fmean(d * d for d in differences[part])}
            rows.append(row | {"all_in_bits": 1, "cache_ratio": 2})
    (line,) = summarize(rows)
    assert line["able_difference"] == pytest.approx(statistics.fmean(means))
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 4 + variances[1] ** 2 / 2)
    expected = t_quantile(freedom) * sum(variances) ** 0.5 / 2
    assert line["able_half_width"] == pytest.approx(expected)
    assert "able_half_width" not in summarize(make_rows())[0]


def test_summary_keeps_values_and_texts_apart():
    rows = [row | {"text": "topics", "v_bits": bits} for bits in (4, 2) for row in make_rows()]
    rows += [row | {"text": "code"} for row in rows]
    lines = summarize(rows)
    assert len(lines) == 8
    assert {(line["v_bits"], line["text"]) for line in lines[::2]} == {
        (bits, text) for bits in (4, 2) for text in ("topics", "code")
    }
    headings, body = cells(rows)
    assert headings[3:5] == ["value bits", "text"]
    assert "text" not in cells(rows[:8])[0]  # all of one text


def test_summary_takes_a_matched_peer_as_one_method():
    rows = make_rows()
    for row in rows[4:]:
        row |= {"method": f"KIVI {row['context_tokens']}", "matched": "kivi, matched"}
    assert [row["method"] for row in summarize(rows)] == ["full cache", "kivi, matched"]


def test_summary_without_a_task_that_the_model_can_do():
    rows = [row | {"full_accuracy": 0.0} for row in make_rows()]
    assert able_tasks(rows) == set()
    assert not any("able" in row or "tokens: 100" in row for row in summarize(rows))


def test_table_is_the_summary():
    headings, body = cells(make_rows())
    expected = ["easy", "hard", "all that the model can do", "these at 100", "these at 200"]
    assert headings[3:] == expected
    assert body[1][:4] == ["kivi", "2", "3.5", "40.0 %"]


def test_command_writes_rows(tmp_path):
    make_model("llama", "sdpa").save_pretrained(tmp_path / "model")
    make_char_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(HAYSTACK)
    arguments = [
        "eval", "retrieval", "--model", tmp_path / "model", "--text-file", tmp_path / "text.txt",
        "--task", "niah_single", "--task", "niah_multivalue", "--context-tokens", 700, "--depth", 0,
        "--depth", 0.5, "--samples", 2, "--preset", "2.25", "--peer", "kivi", "--peer", "think:0.5",
        "--json", tmp_path / "out" / "rows.json", "--csv", tmp_path / "rows.csv",
        "--html", tmp_path / "rows.html",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert len(rows) == 3 * 4
    assert {row["depth"] for row in rows} == {0, 0.5, None}
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert {row["context_tokens"] for row in rows} == {700}
    assert {row["text"] for row in rows} == {"text.txt"}
    assert all(row["log_likelihood_half_width"] > 0 for row in rows if row["k_bits"] < 32)
    assert "ThinK" in result.output
    assert "+-" in result.output
    assert (tmp_path / "rows.csv").read_text().count("\n") == 1 + len(rows)
    assert "<svg" in (tmp_path / "rows.html").read_text()
