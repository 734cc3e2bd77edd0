"""Teacher forcing: several questions about one compressed context, and how sure scores are."""

import json
import math
import re
import statistics

import pytest
import torch
from typer.testing import CliRunner

from cache_support import make_model, make_tokens
from model_support import make_char_tokenizer
from svdq_bench.cli import app
from svdq_bench.cli.formats import nats_interval, points_interval
from svdq_bench.quality import forced
from svdq_bench.quality.forced import force, fork_cache
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.peers import FullCache, Kivi
from svdq_bench.quality.plots import to_svg
from svdq_bench.quality.prefix import read_prefix
from svdq_bench.quality.puzzles import DEPTH_TASKS, TASKS
from svdq_bench.quality.retrieval import Answer, Sweep, answer, evaluate_retrieval, score_columns
from svdq_bench.quality.retrieval_plots import is_drawable
from svdq_bench.quality.tasks import Question, SampleMaker

HAYSTACK = "\n".join(f"Line {i} of a long text. It says little." for i in range(300))
METHODS = [
    FullCache(),
    Kivi(2),
    CacheSettings("paper-1.25", v_bits=4, residual_length=0),
    CacheSettings("1.3", v_bits="exact", residual_length=16, one_by_one=True),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_char_tokenizer()


@pytest.fixture(scope="module")
def maker(tokenizer):
    return SampleMaker(tokenizer, HAYSTACK)


def make_questions(count=3):
    """Questions of random tokens, of different lengths, with two expected strings each."""
    questions = []
    for i in range(count):
        tokens, reply = make_tokens(1, 90 + 20 * i, seed=i), make_tokens(1, 7, seed=50 + i)
        questions.append(Question(tokens[:, :50], ("a", "b"), reply, ((0, 1, 2), (4, 5, 6))))
    return questions


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [448, 475])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_every_question_finds_the_same_cache(method, tokens):
    model, questions = make_model("llama", "sdpa"), make_questions()
    prefix = read_prefix(model, make_tokens(1, tokens))
    cache = method.compress(prefix)
    before = method.memory_columns(cache)
    one_by_one = getattr(method, "one_by_one", False)
    with attention(model, method.implementation):
        asked = [force(model, fork_cache(cache), one, one_by_one) for one in questions]
        alone = [force(model, method.compress(prefix), one, one_by_one) for one in questions]
    assert asked == alone
    assert cache.get_seq_length() == tokens
    assert method.memory_columns(cache) == before


@torch.inference_mode()
def test_scores_are_those_of_the_logits():
    model, (question, *_) = make_model("llama", "sdpa"), make_questions()
    context = make_tokens(1, 80)
    found = force(model, FullCache().compress(read_prefix(model, context)), question)
    whole = torch.cat([context, question.tokens, question.answer], dim=1)
    logits = model(whole).logits[0, -8:-1]  # in one pass without a cache
    logs = logits.double().log_softmax(dim=-1)
    expected = sum(float(logs[i, question.answer[0, i]]) for i in (0, 1, 2, 4, 5, 6))
    # A forward pass in float32 in another order.
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)
    steps = force(model, FullCache().compress(read_prefix(model, context)), question, True)
    assert steps.log_likelihood == pytest.approx(expected, abs=1e-4)
    assert steps.accuracy == found.accuracy


@torch.inference_mode()
def test_greedy_answers_are_accurate():
    model, context = make_model("llama", "sdpa"), make_tokens(1, 80)
    tokens, prefix = make_tokens(1, 20, seed=3), read_prefix(model, context)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    greedy = torch.tensor([answer(model, FullCache().compress(prefix), tokens, 7)])
    for wrong, accuracy in ((None, 1), (0, 0.5), (6, 0.5)):
        reply = greedy.clone()
        if wrong is not None:
            reply[0, wrong] = (reply[0, wrong] + 1) % 256
        question = Question(tokens, ("a", "b"), reply, ((0, 1, 2), (4, 5, 6)))
        found = force(model, FullCache().compress(prefix), question).accuracy
        assert found <= accuracy  # a wrong token may change what follows, too
        assert (found == 1) == (wrong is None)


@pytest.mark.parametrize("wrong, accuracy", [(None, 1), (1, 0.5), (3, 1), (5, 0.5)])
def test_only_expected_strings_are_scored(wrong, accuracy):
    reply = torch.arange(7)[None]
    logits = 20 * torch.eye(7, 9)
    if wrong is not None:
        logits[wrong, 8] = 40
    question = Question(torch.zeros(1, 1), ("a", "b"), reply, ((0, 1, 2), (4, 5, 6)))
    found = forced.score(logits, question)
    assert found.accuracy == accuracy
    # The others have e^-20 of a right token's probability each.
    assert found.log_likelihood == pytest.approx(-20 if accuracy < 1 else 0, abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_questions_of_a_context_have_their_own_answers(task, maker, tokenizer):
    sample = maker.sample(task, 2600, None, "a", questions=5)
    assert sample.context.shape == (1, 2600)
    text = tokenizer.decode(sample.context[0])
    if task == "common_words":
        (question,) = sample.questions
        assert question.answer is None
        return
    assert len({one.expected for one in sample.questions}) == len(sample.questions) == 5
    for question in sample.questions:
        assert all(word in text for word in question.expected)
        reply = question.answer[0]
        words = [tokenizer.decode(reply[list(span)]) for span in question.spans]
        assert words == list(question.expected)
        last = question.spans[-1][-1]
        assert last == len(reply) - 1
    if task == "niah_multivalue":
        assert re.fullmatch(r" \d{5}\n2\. \d{5}", tokenizer.decode(reply))
        places = [text.index(word) for word in question.expected]
        assert places == sorted(places)
    if task == "variable_tracking":
        assert re.fullmatch(r" \w{3}, VAR \w{3}, VAR \w{3}", tokenizer.decode(reply))


def test_needles_of_several_questions_are_spread(maker, tokenizer):
    sample = maker.sample("niah_multikey", 5000, None, "a", questions=8)
    text = tokenizer.decode(sample.context[0])
    places = [text.index(question.expected[0]) / 5000 for question in sample.questions]
    assert all(abs(place - (i + 0.5) / 8) < 1 / 8 for i, place in enumerate(places))
    assert text.count("The special magic number for") == 8 + 3


@pytest.mark.parametrize("questions", [0, 65])
def test_numbers_of_questions_that_cannot_be(questions, maker):
    with pytest.raises(ValueError, match=f"1 .. 64 questions, got {questions}"):
        maker.sample("niah_single", 2600, None, "a", questions)


def test_several_questions_have_no_depth(maker):
    with pytest.raises(ValueError, match="niah_single has no depth of its own, got 0.5"):
        maker.sample("niah_single", 2600, 0.5, "a", 2)
    sweep = Sweep(("niah_single", "niah_multikey"), (2600,), questions=2)
    assert sweep.cells() == [(task, 2600, None) for task in DEPTH_TASKS]


@torch.inference_mode()
def test_rows_tell_scores_and_their_differences(maker, tokenizer):
    model = make_model("llama", "sdpa")
    samples = Sweep(("niah_multikey",), (700,), samples=3, questions=2).make_samples(maker)
    method = CacheSettings("paper-1.25", v_bits=4, residual_length=0)
    full, row = evaluate_retrieval(model, tokenizer, [method], samples)
    found = []
    for sample in next(iter(samples.values())):
        prefix, scores = read_prefix(model, sample.context), []
        for one in (FullCache(), method):
            with attention(model, one.implementation):
                scores.append([force(model, one.compress(prefix), q) for q in sample.questions])
        pairs = zip(*scores, strict=True)
        found.append(statistics.fmean(b.log_likelihood - a.log_likelihood for a, b in pairs))
    assert full["log_likelihood_difference"] == full["log_likelihood_half_width"] == 0
    assert row["full_log_likelihood"] == full["log_likelihood"] < 0
    assert row["log_likelihood_difference"] == pytest.approx(statistics.fmean(found))
    half_width = 4.3027 * (statistics.variance(found) / 3) ** 0.5
    assert row["log_likelihood_half_width"] == pytest.approx(half_width)
    assert (row["scored"], row["contexts"], row["samples"]) == ("forced", 3, 6)
    assert 0 < row["full_probability"] == full["probability"] < 1
    assert row["probability_half_width"] > 0


def test_probability_is_that_of_the_answer():
    assert Answer(0, -2.0).probability == pytest.approx(math.exp(-2))
    assert Answer(0, None).probability is None


def test_open_orders_have_no_likelihood():
    answers = [[Answer(0.5, None)], [Answer(1, None)]]
    assert score_columns("log_likelihood", answers, answers) == {}
    assert score_columns("accuracy", answers, answers)["accuracy"] == 0.75
    assert "accuracy_half_width" not in score_columns("accuracy", answers[:1], answers[:1])


def test_intervals_are_written_with_their_width():
    assert points_interval((-0.0251, 0.031)) == "-2.5 +- 3.1"
    assert points_interval((0.02, None)) == "+2.0"
    assert nats_interval((-0.0251, 0.0314)) == "-0.025 +- 0.031"


def test_command_asks_several_questions_of_several_values(tmp_path):
    make_model("llama", "sdpa").save_pretrained(tmp_path / "model")
    make_char_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(HAYSTACK)
    arguments = [
        "eval", "retrieval", "--model", tmp_path / "model", "--text", tmp_path / "text.txt",
        "--task", "niah_multikey", "--context-tokens", 1100, "--samples", 2, "--questions", 4,
        "--k-bits", 2, "--v-bits", "exact", "--v-bits", 4, "--peer", "kivi:2:32",
        "--json", tmp_path / "rows.json", "--html", tmp_path / "rows.html",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row.get("v_bits") for row in rows] == [None, "exact", "exact", 4]
    assert {row["samples"] for row in rows} == {8}
    assert {row["depth"] for row in rows} == {None}
    assert "log-likelihood, nats" in (tmp_path / "rows.html").read_text()
    assert "accuracy, points" not in to_svg("retrieval", rows)  # the random model can do nothing


def test_scores_are_drawn_against_bits():
    rows = []
    for method, bits in (("full cache", 32), ("svdq 1", 1.2), ("svdq 2", 2.3), ("KIVI 2", 3)):
        row = {"benchmark": "retrieval", "method": method, "task": "niah_single", "depth": None}
        row |= {
            "context_tokens": 512,
            "all_in_bits": bits,
            "k_bits": bits,
            "cache_ratio": 32 / bits,
        }
        for score, full in (("accuracy", 0.9), ("log_likelihood", -0.5), ("probability", 0.6)):
            row |= {score: full - (bits < 32) / bits, f"full_{score}": full, f"{score}_square": 0.9}
        rows.append(row | {"v_bits": None if bits == 32 else 4, "contexts": 9, "samples": 90})
    assert is_drawable(rows)
    drawn = to_svg("retrieval", rows)
    for text in ("accuracy, points", "probability, points", "log-likelihood, nats"):
        assert text in drawn
    assert "svdq, values 4" in drawn
    assert "KIVI, values 4" in drawn
    assert "full cache, values" not in drawn
    assert not is_drawable(rows[:1])
    # Rows with a depth are drawn by depth.
    assert "depth of the needle" in to_svg("retrieval", [row | {"depth": 0.5} for row in rows])
