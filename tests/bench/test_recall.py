"""Recall of attention mass: budgets in words, choices, scorers on packed codes, and the command."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from cache_support import make_model, make_tokens
from model_support import make_text, save_model
from svdq import reference
from svdq.config.sparsity import Sparsity
from svdq.layout import NO_SLOT
from svdq.store.attend import select_tokens
from svdq_bench.cli import app
from svdq_bench.cli.table import cells
from svdq_bench.quality.budgets import budget_text, parse_budget
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.prefix import read_prefix
from svdq_bench.quality.recall import (
    BEST_CHUNKS,
    BEST_TOKENS,
    NONE,
    RecallTask,
    Scorer,
    attention_mass,
    best_chunks,
    best_tokens,
    evaluate_recall,
    first_slots,
    groups_per_token,
    make_scorers,
    selected_mass,
    selected_slots,
)
from svdq_bench.quality.summary import summarize_recall

TASK = RecallTask(0, 600, 100, 35, 8, 64)
SETTINGS = {"keys": "paper-1.25", "query_weighted": True}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "sdpa")


@pytest.fixture(scope="module")
def prefix(model):
    """A context whose queries are said to have far more energy in some channels than in others."""
    prefix = read_prefix(model, make_tokens(1, TASK.context_tokens), TASK.positions)
    spread = 2.0 ** torch.linspace(-6, 6, 64)
    return dataclasses.replace(prefix, query_energy=[x * spread for x in prefix.query_energy])


@pytest.mark.parametrize(
    "text, budget, written",
    [
        ("1/32", 1 / 32, "1/32"),
        ("0.03125", 1 / 32, "1/32"),
        ("1/3", 1 / 3, "1/3"),
        ("0.1234", 0.1234, "0.1234"),
        ("2048", 2048, "2,048 tokens"),
        ("4/2", 2, "2 tokens"),
    ],
)
def test_budgets_are_shares_or_numbers(text, budget, written):
    assert parse_budget(text) == budget
    assert type(parse_budget(text)) is type(budget)
    assert budget_text(budget) == written


@pytest.mark.parametrize("text", ["0", "1.5", "3/2", "1/0", "-1", "1/", "x", "", "1e3", "0/4"])
def test_other_words_are_no_budget(text):
    with pytest.raises(ValueError, match=f"a budget must be .*, got '{text}'"):
        parse_budget(text)


def test_prefix_keeps_the_queries_asked_for(model, prefix):
    everything = read_prefix(model, make_tokens(1, 600), range(600))
    for layer in (0, 1):
        queries = everything.queries[layer]
        assert torch.equal(prefix.queries[layer], queries[:, TASK.positions])
        energy = queries.square().mean(dim=1).view(2, 2, 64).mean(dim=1)
        torch.testing.assert_close(everything.query_energy[layer], energy)
    assert read_prefix(model, make_tokens(1, 30)).queries == {}


def test_mass_is_causal_softmax(prefix):
    queries, keys = prefix.queries[0], prefix.cache.layers[0].keys[0]
    mass = attention_mass(queries, keys, TASK.positions)
    assert mass.shape == (3, 2, 600)
    for n, position in enumerate(TASK.positions):
        for h in range(2):
            own = queries[2 * h : 2 * h + 2, n].double() @ keys[h, : position + 1].double().T
            # Sums of 64 products of float64 in another order.
            torch.testing.assert_close(
                mass[n, h, : position + 1], own.softmax(1).mean(0), rtol=1e-11, atol=0
            )
            assert not mass[n, h, position + 1 :].any()


def test_best_choices_are_best():
    mass = torch.tensor([[0.1, 0.0, 0.3, 0.05, 0.2, 0.25, 0.1]])
    assert best_tokens(mass, 2).item() == pytest.approx(0.55)
    assert best_tokens(mass, 100).item() == pytest.approx(1)
    assert best_chunks(mass, 2, 2).item() == pytest.approx(0.45)  # 0.2 and 0.25
    assert best_chunks(mass, 5, 2).item() == pytest.approx(0.8)  # and 0.3, 0.05
    assert best_chunks(mass, 1, 2).item() == pytest.approx(0.45)  # one chunk at least


@pytest.mark.parametrize("scorer", ["latent", "landmarks"])
@pytest.mark.parametrize("rope", ["pre", "hybrid"])
def test_scorers_choose_among_tokens_before_the_window(prefix, scorer, rope):
    (one,) = make_scorers([scorer], [8], [rope], **SETTINGS)
    cache = one.settings.compress(prefix)
    layer = cache.layers[1]
    assert layer.tokens.packed.slots == [576]  # all whole pages
    place, ends = torch.arange(600), torch.tensor(TASK.positions)[:, None] + 1 - 64
    free = ((place >= 8) & (place < ends)).double()[:, None].expand(-1, 2, -1)
    chosen = selected_slots(prefix.queries[1], layer, one, 40, TASK)
    found = selected_mass(free, chosen)
    if scorer == "latent":
        assert torch.equal(found, torch.full((3, 2), 40.0, dtype=torch.float64))
    else:  # a last chunk may be part full
        assert (found > 40 - 8).all()
    other = selected_mass(1 - free, chosen)
    assert not other.any()


@pytest.mark.parametrize("rope", ["pre", "post", "hybrid"])
def test_selection_is_that_of_the_formula(prefix, rope):
    (one,) = make_scorers(["latent"], [8], [rope], **SETTINGS)
    layer = one.settings.compress(prefix).layers[0]
    assert layer.tokens.fit.gain.unique().numel() > 1  # weighted, or it would prove nothing
    store = layer.tokens.packed
    generator = torch.Generator().manual_seed(3)
    mass = torch.rand((3, 2, 600), generator=generator, dtype=torch.float64)
    chosen = selected_slots(prefix.queries[0], layer, one, 30, TASK)
    found = selected_mass(mass, chosen)
    for n, position in enumerate(TASK.positions):
        query = prefix.queries[0][:, n].unflatten(0, (2, 2)) / layer.tokens.fit.gain[0][:, None]
        query = query.reshape(1, 4, 1, 64)
        packed = first_slots(store, position + 1 - 64).packed_keys(8)
        slots, _ = reference.select(query, packed, 30, 1.0, channels=8)
        at = packed.layout, packed.page_table[0], 0, int(packed.cache_seqlens[0])
        weights = reference.token_masses(
            query[0],
            reference.unpack_codes(packed.k_pages, *at),
            packed.codec.sequence(0),
            packed.layout,
            1.0,
            channels=8,
            sink_tokens=8,
        )
        for h in range(2):
            expected = mass[n, h, slots[0, h].long()].sum().item()
            differ = set(chosen[n][h].tolist()) ^ set(slots[0, h].tolist())
            # The operator rounds queries (tests/ops/test_select.py bounds that): of tokens whose
            # weights are within some per cent it may choose another, and no other ones.
            least = weights[h, slots[0, h].long()].min()
            for slot in differ:
                assert weights[h, slot].item() == pytest.approx(least.item(), rel=0.05)
            assert abs(found[n, h].item() - expected) <= len(differ) / 2


def test_groups_that_chosen_tokens_lie_in():
    apart, together = [0, 8, 16, 24], [8, 9, 14, 15]
    slots = torch.tensor([apart, together, [7, 8, NO_SLOT, NO_SLOT]], dtype=torch.int32)
    assert groups_per_token([slots]) == (4 + 1 + 2) / (4 + 4 + 2)


def test_views_leave_the_store_alone(prefix):
    store = CacheSettings("paper-1.25", residual_length=0).compress(prefix).layers[0].tokens.packed
    view = first_slots(store, 100)
    assert (view.slots, view.pool.cache_seqlens.tolist()) == ([100], [100])
    assert (store.slots, store.pool.cache_seqlens.tolist()) == ([576], [576])
    query = torch.randn(1, 4, 1, 64)
    slots, _ = select_tokens(query, view, Sparsity(92, "latent", 8), 92, 1.0, 8)
    assert slots[0, 0].tolist() == list(range(8, 100))


@pytest.fixture(scope="module")
def rows(model):
    steps = []
    scorers = make_scorers(["latent", "landmarks"], [4, 32], ["pre", "post"], **SETTINGS)
    assert [one.label for one in scorers] == [
        "4 leading channels, pre-RoPE",
        "32 leading channels, pre-RoPE",
        "4 leading channels, post-RoPE",
        "32 leading channels, post-RoPE",
        "landmarks of 8 tokens",
    ]
    found = evaluate_recall(model, make_tokens(1, 700)[0], scorers, [1 / 4, 24], TASK, steps.append)
    assert steps == ["prefill", "best choices", *(one.label for one in scorers)]
    return found


def test_recall_is_between_nothing_and_the_best(rows):
    found = {(row["method"], row["budget"]): row for row in rows}
    assert len(found) == len(rows) == 8 * 2
    for budget, tokens in ((1 / 4, 150), (24, 24)):
        best, none = found[BEST_TOKENS, budget]["recall"], found[NONE, budget]["recall"]
        assert none < found[BEST_CHUNKS, budget]["recall"] < best < 1
        for (method, own), row in found.items():
            if own == budget and method != NONE:
                assert row["tokens"] == tokens
                assert none < row["recall"] <= best
        for rope in ("pre", "post"):
            four, many = (
                found[f"{n} leading channels, {rope}-RoPE", budget]["recall"] for n in (4, 32)
            )
            assert four < many
    assert found[BEST_TOKENS, 24]["recall"] < found[BEST_TOKENS, 1 / 4]["recall"]


def test_sinks_and_window_are_always_read(rows, prefix):
    shares = []
    for layer in (0, 1):
        keys = prefix.cache.layers[layer].keys[0]
        mass = attention_mass(prefix.queries[layer], keys, TASK.positions)
        shares += [
            float(own[:, :8].sum() + own[:, position - 63 : position + 1].sum()) / 2
            for own, position in zip(mass, TASK.positions, strict=True)
        ]
    for row in rows:
        if row["method"] == NONE:
            assert row["recall"] == pytest.approx(sum(shares) / len(shares), rel=1e-9)


def test_rows_say_what_was_run(rows):
    for row in rows:
        assert row["benchmark"] == "sparsity"
        assert (row["context_tokens"], row["queries"]) == (600, 3)
        assert (row["sink_tokens"], row["residual_length"]) == (8, 64)
    scan = {row["method"]: row["scan_bytes"] for row in rows if "scan_bytes" in row}
    assert scan["4 leading channels, pre-RoPE"] == 4 * 4 / 8  # of 4 bits
    assert scan["32 leading channels, pre-RoPE"] == (16 * 4 + 8 * 2) / 8  # there are 24
    assert scan["landmarks of 8 tokens"] == (32 + 6) / 8  # 64 numbers of 4 bits, 3 of 16


def test_scan_bytes_are_those_of_reads(prefix):
    settings = CacheSettings("paper-1.25", residual_length=0, sparse_budget=1)
    store = settings.compress(prefix).layers[0].tokens.packed
    assert Scorer(settings).scan_bytes(store) == store.layout.proxy_page_bytes(16) / 64 / 2


def test_table_has_a_column_a_budget(rows):
    headings, body = cells(rows)
    assert headings == ["tokens chosen by", "bytes to score a token", "1/4", "24 tokens"]
    assert len(body) == 8
    best = next(row for row in summarize_recall(rows) if row["method"] == BEST_TOKENS)
    assert body[0] == [
        BEST_TOKENS,
        "",
        f"{best['budget: 1/4']:.3f}",
        f"{best['budget: 24 tokens']:.3f}",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every": 0}, "a query at least every token"),
        ({"context_tokens": 601, "residual_length": 24}, "the 25 tokens that fill no page, got 24"),
        ({"context_tokens": 640, "residual_length": 0}, "must cover the query itself"),
        ({"last": 530}, "a query at token 70 has nothing to choose beyond 8 sinks"),
    ],
)
def test_tasks_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        RecallTask(**TASK.__dict__ | options)


def test_contexts_must_fit_into_the_text():
    with pytest.raises(ValueError, match="600 tokens at token 0 does not fit .* 599 tokens"):
        TASK.context(torch.zeros(599, dtype=torch.long))


def test_command_writes_rows_and_plots(tmp_path):
    save_model(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(make_text(700))
    arguments = [
        "eval", "sparsity", "--model", tmp_path / "tiny", "--text-file", tmp_path / "text.txt",
        "--context-tokens", 600, "--start", 10, "--last", 60, "--every", 30, "--budget", "1/8",
        "--budget", 40, "--channels", 8, "--rope", "hybrid", "--json", tmp_path / "rows.json",
        "--html", tmp_path / "page.html",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 5 * 2
    assert {row["budget"] for row in rows} == {0.125, 40}
    assert "8 leading channels, hybrid-RoPE" in result.output
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert "landmarks of 8 tokens" in page[page.index("<svg") : page.index("</svg>")]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--budget", "2/1/3"), "a budget must be"),
        (("--channels", "6"), "sparse_channels must be a multiple of 4"),
        (("--preset", "exact"), "'exact' are not packed"),
        (("--residual-length", "64", "--last", "6100"), "has nothing to choose"),
    ],
)
def test_wrong_usage_is_said(options, message):
    result = CliRunner().invoke(app, ["eval", "sparsity", *options])
    assert result.exit_code == 2
    assert message in result.output
