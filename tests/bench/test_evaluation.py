"""Scores, the reference task, and byte formulas."""

import math
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from cache_support import make_model, make_tokens
from model_support import make_text, make_tokenizer
from svdq_bench.quality import models, texts
from svdq_bench.quality.demo import make_prompt
from svdq_bench.quality.footprint import PARTS, evaluate_memory
from svdq_bench.quality.implementation import attention
from svdq_bench.quality.memory import full_cache_bytes, svdq_cache_bytes
from svdq_bench.quality.methods import CacheSettings, key_argument, parse_schedule
from svdq_bench.quality.metrics import CHUNK_POSITIONS, Scores, compare_logits
from svdq_bench.quality.perplexity import Task, evaluate_perplexity, prefill
from svdq_bench.quality.prefix import read_prefix


def direct_scores(reference, candidate, targets):
    """Mean negative log-likelihood and KL, position by position from the definition."""
    nll, kl = 0.0, 0.0
    for p, q, target in zip(reference.double(), candidate.double(), targets.tolist(), strict=True):
        p, q = p.exp() / p.exp().sum(), q.exp() / q.exp().sum()
        nll -= math.log(q[target])
        kl += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    return nll / len(targets), kl / len(targets)


@pytest.mark.parametrize("num_tokens", [1, CHUNK_POSITIONS, 2 * CHUNK_POSITIONS + 3])
def test_compare_logits_matches_definition(num_tokens):
    reference = 3 * torch.randn(num_tokens, 97)
    candidate = reference + torch.randn(num_tokens, 97)
    targets = torch.randint(97, (num_tokens,))
    scores = compare_logits(reference, candidate, targets)
    nll, kl = direct_scores(reference, candidate, targets)
    # Every term is at most about 20 and carries a few float64 roundings; averages keep that.
    assert math.log(scores.perplexity) == pytest.approx(nll, abs=1e-13 * 20)
    assert scores.mean_kl == pytest.approx(kl, abs=1e-13 * 20)
    same = (reference.argmax(-1) == candidate.argmax(-1)).double().mean().item()
    assert scores.top1_agreement == pytest.approx(same)


def test_compare_logits_of_a_model_with_itself():
    logits = torch.randn(70, 50)
    scores = compare_logits(logits, logits, torch.zeros(70, dtype=torch.long))
    assert scores.kl == 0.0
    assert scores.top1_agreement == 1.0


def test_compare_logits_leaves_out_tokens_that_cannot_come():
    reference, candidate = torch.randn(3, 40), torch.randn(3, 40)
    expected = compare_logits(reference[:, :30], candidate[:, :30], torch.arange(3))
    reference[:, 30:] = candidate[:, 30:] = -math.inf
    scores = compare_logits(reference, candidate, torch.arange(3))
    assert scores.nll == pytest.approx(expected.nll, rel=1e-14)  # the same sums in another order
    assert scores.kl == pytest.approx(expected.kl, rel=1e-14)


def test_compare_logits_refuses_broken_logits():
    logits = torch.randn(5, 7)
    broken = logits.clone()
    broken[4, 2] = math.nan
    with pytest.raises(ValueError, match="not all numbers"):
        compare_logits(logits, broken, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(5, 7\), \(5, 6\)"):
        compare_logits(logits, logits[:, :6], torch.zeros(5, dtype=torch.long))


def test_scores_pool_windows():
    pooled = Scores(3, 6.0, 0.3, 2) + Scores(1, 2.0, 0.5, 1)
    assert pooled.perplexity == pytest.approx(math.exp(2))
    assert pooled.mean_kl == pytest.approx(0.2)
    assert pooled.top1_agreement == 0.75


@pytest.fixture(scope="module")
def task_rows():
    """Rows of the reference task on a random model, and what they were made from."""
    model = make_model("llama", "sdpa")
    token_ids = make_tokens(1, 900)[0]
    task = Task(window_starts=(10, 300), prefill_tokens=384, predict_tokens=70)
    settings = [
        CacheSettings(keys, v_bits="exact", residual_length=0)
        for keys in ("exact", "8,8", "2.25", "paper-1.25")
    ]
    steps = []
    with torch.inference_mode():
        rows = evaluate_perplexity(model, token_ids, settings, task, steps.append)
    return model, token_ids, task, rows, steps


def test_full_cache_row_is_the_model_without_a_cache(task_rows):
    model, token_ids, task, rows, _ = task_rows
    nll = []
    for window in task.windows(token_ids):
        with torch.inference_mode():
            log_q = model(window).logits[0].double().log_softmax(-1)
        first = task.prefill_tokens
        targets = window[0, first:]
        assert len(targets) == task.predict_tokens
        nll += [-log_q[first - 1 + i, t].item() for i, t in enumerate(targets.tolist())]
    # A forward pass in float32 over some hundred tokens in another order: 1e-4 is 1000 roundings.
    assert rows[0]["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert (rows[0]["kl"], rows[0]["k_bits"], rows[0]["method"]) == (0.0, 32, "full cache")


def test_exact_settings_score_like_the_full_cache(task_rows):
    *_, rows, _ = task_rows
    assert rows[1]["k_bits"] == rows[1]["all_in_bits"] == 32
    assert rows[1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4)
    # KL is quadratic in the difference of the logits, which float32 keeps below 1e-4.
    assert 0 <= rows[1]["kl"] < 1e-8


def test_fewer_bits_are_further_from_the_full_cache(task_rows):
    *_, rows, _ = task_rows
    eight, more, fewer = (row["kl"] for row in rows[2:])
    assert 0 < eight < more < fewer
    # Steps of 2^-8 of a range instead of 2^-4, and nothing dropped: KL is quadratic in them.
    assert eight < more / 10


def test_bits_count_codes_and_everything(task_rows):
    model, _, task, rows, _ = task_rows
    assert [row["k_bits"] for row in rows[2:]] == [8, 2.25, 1.25]
    config = model.config
    numbers = task.prefill_tokens * config.num_key_value_heads * config.head_dim
    rank = config.head_dim * 3 // 8  # channels that paper-1.25 codes
    overhead = config.num_key_value_heads * (rank * (2 * config.head_dim + 4) + 4 * config.head_dim)
    overhead += 8 * config.num_key_value_heads * config.head_dim * 4  # sinks, float32
    overhead += 4 * task.prefill_tokens // 64  # page table
    assert rows[4]["all_in_bits"] == pytest.approx(1.25 + 8 * overhead / numbers)


def test_rows_say_what_was_run(task_rows):
    *_, rows, steps = task_rows
    assert steps == ["full cache", *[row["method"] for row in rows[1:]]] * 2
    for row in rows[1:]:
        assert row["sink_tokens"] == 8
        assert row["window_starts"] == [10, 300]
    assert all(row["benchmark"] == "perplexity" for row in rows)


def test_model_keeps_its_attention(task_rows):
    model = task_rows[0]
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), attention(model, "svdq"):
        assert model.config._attn_implementation == "svdq"
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_prefill_too_short_to_pack_is_no_result():
    task = Task(window_starts=(0,), prefill_tokens=100, predict_tokens=4)
    with torch.inference_mode(), pytest.raises(ValueError, match="nothing was packed"):
        evaluate_perplexity(
            make_model("llama", "sdpa"), make_tokens(1, 200)[0], [CacheSettings("2.25")], task
        )


@pytest.mark.parametrize(
    "task, message",
    [
        (Task((0, 900), 100, 10), "at token 900 does not fit into the text of 1000 tokens"),
        (Task((-1,), 100, 10), "at token -1 does not fit"),
        (Task((), 100, 10), "at least one window"),
        (Task((0,), 100, 0), "at least one window"),
    ],
)
def test_windows_must_fit(task, message):
    with pytest.raises(ValueError, match=message):
        task.windows(torch.zeros(1000, dtype=torch.long))


def test_contexts_beyond_the_model_are_refused():
    model = make_model("llama", "sdpa")
    longest = model.config.max_position_embeddings
    models.check_length(model, longest)
    task = Task((0,), longest - 2, 3)
    with pytest.raises(ValueError, match=f"takes up to {longest} tokens, {longest + 1} are asked"):
        evaluate_perplexity(model, make_tokens(1, longest + 1)[0], [], task)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"residual_length": 0, "v_bits": "exact", "rope": "post"}])
def test_byte_formula_is_what_caches_report(family, options):
    model = make_model(family, "svdq", torch.bfloat16)
    settings = CacheSettings("paper-1.25", **options)
    caches = {}
    for num_tokens in (300, 512, 577, 1100):
        caches[num_tokens] = settings.make_cache(model.config)
        with torch.inference_mode():
            prefill(model, make_tokens(1, num_tokens), caches[num_tokens])
        for layer in caches[num_tokens].layers:
            if layer.is_sliding:  # a window is a view of the whole prefill until the next token
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    for num_tokens, cache in caches.items():
        expected = cache.memory_report().total_bytes
        assert expected == cache.allocated_bytes()
        assert svdq_cache_bytes(caches[1100], num_tokens) == expected


def test_memory_rows_add_up_and_go_beyond_what_the_model_reads():
    model = make_model("llama", "sdpa", torch.bfloat16)
    limit = models.max_tokens(model.config)
    lengths = [2 * limit, 300]
    methods = [CacheSettings("kv=2.5"), CacheSettings("paper-1.25")]
    steps = []
    ids = make_tokens(1, limit + 7)[0]
    rows = evaluate_memory(model, ids, methods, lengths, start=7, begin=steps.append)
    assert len(steps) == 4
    assert [row["tokens"] for row in rows] == [300, 2 * limit] * 2
    assert [row["preset"] for row in rows] == ["kv=2.5"] * 2 + ["paper-1.25"] * 2
    for row in rows[::2]:
        parts = sum(row[name] for name in PARTS if name.startswith("key"))
        assert parts < row["key_bits"] < parts + 0.2  # and page tables
        parts = sum(row[name] for name in PARTS if name.startswith("value"))
        assert parts <= row["value_bits"] < parts + 0.1  # and the loss that bits follow
    for row in rows[1::2]:
        assert "key_bits" not in row
        assert row["times_smaller_bf16"] > 1
    cache = methods[1].compress(read_prefix(model, ids[None, 7 : 7 + limit]))
    assert rows[3]["cache_bytes"] == svdq_cache_bytes(cache, 2 * limit)


def test_memory_of_contexts_that_the_text_lacks():
    model = make_model("llama", "sdpa")
    with pytest.raises(ValueError, match="300 tokens at token 7 does not fit .* 306 tokens"):
        evaluate_memory(model, make_tokens(1, 306)[0], [CacheSettings("kv=2")], [300], start=7)


def test_full_cache_bytes_count_keys_and_values():
    model = make_model("llama", "sdpa")
    config = model.config
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        prefill(model, make_tokens(1, 50), cache)
    token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    assert full_cache_bytes(cache) == 50 * token
    assert full_cache_bytes(cache, 1234) == 1234 * token


def test_settings_understand_presets_bits_and_schedules():
    assert parse_schedule("paper-2.25") == (8, 4, 4, 2, 0, 0, 0, 0)
    assert key_argument("0.7") == {"k_bits": 0.7}
    assert key_argument("lambda=2e-3") == {"lambda_": 0.002}
    assert parse_schedule("4, 2,1,0") == (4, 2, 1, 0)
    assert parse_schedule("exact") is parse_schedule("16") is None
    for bad in ("paper-3", "1.3", "lambda=1", "2,4", "", "4;2", "0,0"):
        with pytest.raises(ValueError, match="bits|schedule"):
            parse_schedule(bad)
    with pytest.raises(ValueError, match="value bits .* got 'four'"):
        CacheSettings("2.25", v_bits="four")
    with pytest.raises(ValueError, match="sink_tokens must be"):
        CacheSettings("2.25", sink_tokens=65)


@pytest.mark.parametrize("chat", [True, False])
def test_prompt_is_text_in_a_chat_and_what_follows(chat):
    tokenizer = make_tokenizer(chat)
    text_ids = models.tokenize(tokenizer, make_text(90))
    prompt = make_prompt(tokenizer, text_ids, 60, 20, question="w5 w6")
    context = prompt.context[0].tolist()
    assert context[-60:] == text_ids[:60].tolist()
    assert len(context) == (62 if chat else 60)  # the template's head: w1 user
    assert prompt.held_back[0].tolist() == text_ids[60:80].tolist()
    tail = prompt.tail[0].tolist()
    assert tail[:2] == [5, 6]
    assert len(tail) == (5 if chat else 2)  # the template's tail: w2 w1 assistant
    assert prompt.num_tokens == len(context) + len(tail)
    with pytest.raises(ValueError, match="the text has 90 tokens"):
        make_prompt(tokenizer, text_ids, 80, 20)


def test_default_text_is_pythons_own():
    text = texts.load_text()
    assert len(text) > 400_000
    assert text.startswith('The "assert" statement')


@pytest.mark.parametrize("name, start", [("docstrings", "Record of phased-in"), ("code", '"""')])
def test_other_texts_are_pythons_too(name, start):
    text = texts.load_text(name)
    assert len(text) > 400_000
    assert text.startswith(start)
    assert text != texts.load_text("topics")[: len(text)]


def test_missing_models_and_texts_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"cannot read .*none.txt: .*docstrings"):
        texts.load_text(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        texts.load_text(tmp_path / "binary.txt")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        models.find_model(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no file a.gguf in"):
        models.find_model(str(tmp_path), "a.gguf")
    with pytest.raises(FileNotFoundError, match="no model file"):
        models.find_model(str(tmp_path / "a.gguf"))
    with pytest.raises(ValueError, match="needs --model"):
        models.find_model(None, "a.gguf")
    assert models.find_model("owner/name", "a.gguf") == models.ModelSource("owner/name", "a.gguf")
