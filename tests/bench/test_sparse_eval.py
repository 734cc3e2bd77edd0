"""Key sparsity under test: caches with budgets, how they are fed, and what their rows say."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from cache_support import make_model, make_tokens
from model_support import make_char_tokenizer, make_text, save_model
from svdq_bench.cli import app
from svdq_bench.cli.methods import make_methods, with_budgets
from svdq_bench.cli.options import Rope, ScorerName
from svdq_bench.cli.table import cells
from svdq_bench.quality.methods import CacheSettings, feeds_one_by_one, read_columns
from svdq_bench.quality.peers import FullCache, PerChannel
from svdq_bench.quality.perplexity import Task, evaluate_perplexity, predict
from svdq_bench.quality.plots import to_svg
from svdq_bench.quality.prefix import read_prefix
from svdq_bench.quality.retrieval import Sweep, answer, evaluate_retrieval
from svdq_bench.quality.summary import summarize
from svdq_bench.quality.tasks import SampleMaker

TASK = Task((10,), 448, 80)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def settings(**options):
    return CacheSettings("paper-1.25", **{"v_bits": "exact", "one_by_one": True} | options)


@torch.inference_mode()
def test_tokens_fed_one_by_one_are_predicted_alike():
    model, tokens = make_model("llama", "sdpa"), make_tokens(1, 90)
    prefix = read_prefix(model, tokens[:, :60])
    logits = [
        predict(model, tokens[:, 60:], FullCache().compress(prefix), prefix.first, one_by_one)
        for one_by_one in (False, True)
    ]
    assert logits[0].shape == (30, 256)
    # A forward pass in float32 over 90 tokens in another order.
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    one = predict(model, tokens[:, :1], FullCache().compress(prefix), prefix.first, True)
    assert torch.equal(one, prefix.first)


@torch.inference_mode()
@pytest.mark.parametrize("one_by_one, lengths", [(False, [20]), (True, [1] * 20)])
def test_questions_are_fed_at_once_or_one_by_one(one_by_one, lengths):
    model, tokens = make_model("llama", "sdpa"), make_tokens(1, 70)
    cache, fed = FullCache().compress(read_prefix(model, tokens[:, :50])), []
    hook = model.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape[1]))
    found = answer(model, cache, tokens[:, 50:], 4, one_by_one=one_by_one)
    hook.remove()
    assert fed == [*lengths, 1, 1, 1]
    expected = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=4
    )
    assert found == expected[0, 70:].tolist()


@pytest.fixture(scope="module")
def rows():
    """Dense, a budget of everything, a smaller one, and the least, by both scorers."""
    methods = [settings(), settings(sparse_budget=4096)]
    for scorer in ("latent", "landmarks"):
        methods += [settings(sparse_budget=b, sparse_scorer=scorer) for b in (1 / 2, 8)]
    methods.append(settings(sparse_budget=8, dense_layers=1))
    model, token_ids = make_model("llama", "sdpa"), make_tokens(1, 600)[0]
    return evaluate_perplexity(model, token_ids, methods, TASK)[1:]


def test_smaller_budgets_are_further_from_the_full_cache(rows):
    dense, everything, *sparse, half_dense = (row["kl"] for row in rows)
    assert everything == dense > 0  # nothing is left out, so nothing changes
    for half, least in zip(sparse[::2], sparse[1::2], strict=True):
        assert dense < half < least
    assert dense < half_dense < sparse[1]


def test_rows_tell_budgets_and_what_was_read(rows):
    dense, everything, half, least, _, landmarks, half_dense = rows
    assert "budget" not in dense
    assert everything["budget"] == 4096
    assert (half["budget"], half["scorer"], half["channels"]) == (0.5, "latent", 16)
    assert landmarks["scorer"] == "landmarks"
    assert "channels" not in landmarks
    assert half_dense["dense_layers"] == 1
    # 448 + 79 tokens; the window and what fills no page are exact, 448 packed, 440 to choose from.
    full, code = 527 * 64 * 2, 64 * 1.25 / 8
    assert dense["code_read_ratio"] == pytest.approx(full / (440 * code))
    assert half["code_read_ratio"] == pytest.approx(full / (220 * code))
    assert least["code_read_ratio"] == pytest.approx(full / (8 * code))
    assert half_dense["code_read_ratio"] == pytest.approx(2 * full / (448 * code))
    for row in rows:
        assert 0 < row["read_ratio"] < row["code_read_ratio"]


def test_steps_alone_tell_what_was_read():
    model = make_model("llama", "sdpa")
    prefix = read_prefix(model, make_tokens(1, 448))
    one = settings(sparse_budget=8)
    cache = one.compress(prefix)
    assert read_columns(one, cache) == {}  # no step was taken
    assert read_columns(PerChannel(2), FullCache().compress(prefix)) == {}
    rows = evaluate_perplexity(
        model, make_tokens(1, 600)[0], [settings(one_by_one=False)], Task((10,), 448, 20)
    )
    assert "read_ratio" not in rows[1]


def test_labels_and_layers():
    one = settings(sparse_budget=1 / 32, dense_layers=1)
    assert one.label == ("svdq paper-1.25, pre-RoPE, clipped, 1/32 by 16 channels, 1 dense layers")
    other = settings(sparse_budget=2048, sparse_scorer="landmarks")
    assert other.label.endswith("clipped, 2,048 tokens by landmarks")
    config = make_model("llama", "sdpa").config
    assert [x.sparsity for x in other.make_cache(config).svdq_layers].count(None) == 0
    first, second = one.make_cache(config).svdq_layers
    assert first.sparsity is None
    assert second.sparsity.budget == 1 / 32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparse_budget": 0}, "sparse_budget must be"),
        ({"sparse_budget": 8, "sparse_scorer": "x"}, "sparse_scorer must be one of"),
        ({"sparse_budget": 8, "sparse_channels": 36}, "sparse_channels must be"),
        ({"sparse_budget": 8, "keys": "exact"}, "'exact' are not packed, so none can be left out"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        CacheSettings(**{"keys": "paper-1.25"} | options)


def test_some_layer_must_have_the_budget():
    config = make_model("llama", "sdpa").config
    with pytest.raises(ValueError, match="dense_layers must be below the model's 2 layers, got 2"):
        settings(sparse_budget=8, dense_layers=2).make_cache(config)


def test_every_cache_is_tested_alone_and_with_every_budget():
    methods = make_methods(
        ["paper-1.25", "2.25"],
        ["kivi:2:32"],
        v_bits="exact",
        rope=Rope.pre,
        clip=True,
        sink_tokens=8,
    )
    assert with_budgets(methods, None, [ScorerName.latent], 8, 0) == methods
    found = with_budgets(methods, ["1/4", "8"], list(ScorerName), 12, 1)
    assert len(found) == 2 * (1 + 2 * 2) + 1
    assert found[-1] == methods[-1]
    for first, keys in ((0, "paper-1.25"), (5, "2.25")):
        own = found[first : first + 5]
        assert {one.keys for one in own} == {keys}
        assert all(map(feeds_one_by_one, own))
        assert [(one.sparse_budget, one.sparse_scorer) for one in own] == [
            (None, "latent"),
            (0.25, "latent"),
            (8, "latent"),
            (0.25, "landmarks"),
            (8, "landmarks"),
        ]
        assert {(one.sparse_channels, one.dense_layers) for one in own[1:]} == {(12, 1)}
    assert not feeds_one_by_one(found[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "tiny")
    (folder / "text.txt").write_text(make_text(900))
    return folder


def test_perplexity_against_budget(folder, tmp_path):
    result = invoke(
        "eval", "perplexity", "--model", folder / "tiny", "--text-file", folder / "text.txt",
        "--prefill-tokens", 400, "--predict-tokens", 20, "--window-start", 100, "--residual-length",
        64, "--sparse-budget", "1/8", "--sparse-budget", 16, "--sparse-channels", 12,
        "--dense-layers", 1, "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row.get("budget") for row in rows] == [None, None, 0.125, 16]
    assert [row.get("residual_length") for row in rows] == [None, 64, 64, 64]
    assert all((row["channels"], row["dense_layers"]) == (12, 1) for row in rows[2:])
    headings, body = cells(rows)
    at = headings.index("budget")
    assert [line[at] for line in body] == ["", "", "1/8", "16 tokens"]
    plot = to_svg("perplexity", rows)
    assert "by 12 channels" in plot
    assert ">1/8<" in plot


def test_perplexity_without_budgets_is_drawn_against_bits():
    row = {
        "benchmark": "perplexity",
        "method": "svdq x",
        "all_in_bits": 2,
        "kl": 0.1,
        "preset": "x",
    }
    assert "bits a key number" in to_svg("perplexity", [row])
    sparse = row | {"method": "svdq x, 1/4 by 8 channels", "budget": 0.25, "kl": 0.2}
    drawn = to_svg("perplexity", [row, sparse, sparse | {"budget": 0.125}])
    assert "bits a key number" not in drawn
    assert "svdq x, by 8 channels" in drawn


def test_retrieval_with_a_budget(folder, tmp_path):
    make_model("llama", "sdpa").save_pretrained(tmp_path / "model")
    make_char_tokenizer().save_pretrained(tmp_path / "model")
    result = invoke(
        "eval", "retrieval", "--model", tmp_path / "model", "--haystack", "noise",
        "--task", "niah_single", "--context-tokens", 700, "--depth", 0.5, "--samples", 1,
        "--residual-length", 64, "--sparse-budget", "1/4", "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    full, dense, sparse = json.loads((tmp_path / "rows.json").read_text())
    assert "read_ratio" not in full
    assert sparse["budget"] == 0.25
    assert sparse["code_read_ratio"] == pytest.approx(4 * dense["code_read_ratio"], rel=0.01)
    line = summarize([full, dense, sparse])[2]
    assert (line["budget"], line["read_ratio"]) == (0.25, sparse["read_ratio"])
    headings, body = cells([full, dense, sparse])
    assert body[2][headings.index("budget")] == "1/4"


def test_questions_may_see_all_tokens(tmp_path, monkeypatch):
    make_model("llama", "sdpa").save_pretrained(tmp_path / "model")
    make_char_tokenizer().save_pretrained(tmp_path / "model")
    fed = []

    def reply(model, cache, question, max_tokens, stop, one_by_one):
        fed.append((one_by_one, getattr(cache, "svdq_layers", [])[:1]))
        return []

    monkeypatch.setattr("svdq_bench.quality.retrieval.answer", reply)
    arguments = (
        "eval", "retrieval", "--model", tmp_path / "model", "--haystack", "noise", "--task",
        "niah_single", "--context-tokens", 700, "--depth", 0.5, "--samples", 1, "--sparse-budget",
        "1/4", "--dense-question", "--decode", "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert invoke(*arguments).exit_code == 0
    assert [one_by_one for one_by_one, _ in fed] == [False] * 3
    assert [layer.sparsity is None for _, layers in fed for layer in layers] == [True, False]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["sparse_question"] for row in rows] == [False] * 3


def test_caches_under_test_are_asked_one_by_one(monkeypatch):
    fed = []

    def reply(model, cache, question, max_tokens, stop, one_by_one):
        fed.append(one_by_one)
        return []

    monkeypatch.setattr("svdq_bench.quality.retrieval.answer", reply)
    tokenizer, model = make_char_tokenizer(), make_model("llama", "sdpa")
    samples = Sweep(("niah_single",), (700,), (0.5,), 1).make_samples(SampleMaker(tokenizer))
    methods = [settings(one_by_one=False), settings()]
    evaluate_retrieval(model, tokenizer, methods, samples, decode=True)
    assert fed == [False, False, True]


@pytest.mark.parametrize("command", ["perplexity", "retrieval"])
@pytest.mark.parametrize(
    "options, message",
    [
        (("--sparse-budget", "3/2"), "a budget must be .* got '3/2'"),
        (("--sparse-budget", "8", "--sparse-channels", "6"), "sparse_channels must be"),
        (("--sparse-budget", "8", "--preset", "exact"), "none can be left out"),
        (("--dense-layers", "2"), "--dense-layers .* see --sparse-budget"),
    ],
)
def test_wrong_usage_is_said(command, options, message):
    result = invoke("eval", command, *options)
    assert result.exit_code == 2
    lines = result.output.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
