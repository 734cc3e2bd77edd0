"""lm-evaluation-harness over compressed contexts: a local task, no download."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from cache_support import make_model, make_tokens
from model_support import make_text, make_tokenizer
from svdq_bench.cli import app
from svdq_bench.quality.harness import import_harness, metric_rows, score_continuation
from svdq_bench.quality.methods import CacheSettings
from svdq_bench.quality.peers import FullCache, Kivi, PerChannel

TASK = """
task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
metadata: {{version: 1}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: ["w3 w4 w7", "w5"]
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """
output_type: generate_until
doc_to_target: "w3"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


def tokenizer_with_ends():
    tokenizer = make_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "w1", "w0"
    return tokenizer


def make_lm(method, **options):
    from svdq_bench.quality.harness import harness_model

    return harness_model(make_model("llama", "sdpa"), tokenizer_with_ends(), method, **options)


def test_continuations_are_scored_token_by_token():
    logits, tokens = torch.randn(4, 9), torch.tensor([3, 0, 8, 8])
    total, greedy = score_continuation(logits, tokens)
    probabilities = logits.double().softmax(-1)
    expected = sum(probabilities[i, t].log().item() for i, t in enumerate(tokens.tolist()))
    assert total == pytest.approx(expected, rel=1e-12)
    assert not greedy
    assert score_continuation(logits, logits.argmax(-1))[1]


def test_metrics_become_rows():
    found = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1}
    found |= {"f1_stderr,strict": "N/A", "list,none": [1]}
    assert metric_rows(found) == [
        {"metric": "acc", "value": 0.5, "stderr": 0.1},
        {"metric": "f1, strict", "value": 1.0, "stderr": None},
    ]


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"not installed .* 'pip install svdq\[harness\]'"):
        import_harness()
    result = CliRunner().invoke(app, ["eval", "harness", "--tasks", "x"])
    assert result.exit_code == 2
    assert "svdq[harness]" in result.output


def requests(lengths, choices=((3, 4, 7), (5,), (9, 9, 9, 9))):
    """Contexts of some lengths, each with every continuation, as the harness encodes them."""
    contexts = [make_tokens(1, length, seed=length)[0].tolist() for length in lengths]
    return [(None, context, list(choice)) for choice in choices for context in contexts]


@torch.inference_mode()
def test_full_cache_scores_like_the_harness_itself(lm_eval):
    from lm_eval.models.huggingface import HFLM

    model, asked = make_model("llama", "sdpa"), requests([2, 20, 33])
    plain = HFLM(pretrained=model, tokenizer=tokenizer_with_ends(), batch_size=1)
    expected = plain._loglikelihood_tokens(asked, disable_tqdm=True)
    found = make_lm(FullCache())._loglikelihood_tokens(asked)
    for (total, greedy), (other, other_greedy) in zip(found, expected, strict=True):
        # Up to four log-probabilities of about 6, whose logits passed through two float32 layers in
        # another order.
        assert total == pytest.approx(other, abs=1e-3)
        assert greedy == other_greedy


@torch.inference_mode()
def test_contexts_are_compressed_and_shared(lm_eval, monkeypatch):
    from svdq_bench.quality import harness

    read, prefills = harness.read_prefix, []
    monkeypatch.setattr(harness, "read_prefix", lambda m, c: prefills.append(c) or read(m, c))
    asked = requests([200, 230])
    exact = make_lm(FullCache())._loglikelihood_tokens(asked)
    assert len(prefills) == 2  # one a context, however many continuations
    errors = []
    for bits in (8, 2):
        lm = make_lm(PerChannel(bits))
        found = lm._loglikelihood_tokens(asked)
        errors.append(sum(abs(a[0] - b[0]) for a, b in zip(found, exact, strict=True)))
        assert (lm.compressed, lm.too_short) == (6, 0)
    assert 0 < errors[0] < errors[1] / 10  # steps are 85 times as large


@torch.inference_mode()
def test_short_contexts_are_an_error_or_counted(lm_eval):
    asked = requests([1, 20, 200])
    lm = make_lm(FullCache())
    with pytest.raises(ValueError, match="full cache, a context of 1 token leaves nothing"):
        lm._loglikelihood_tokens(asked)
    lm = make_lm(Kivi(2, 64))
    with pytest.raises(ValueError, match="KIVI 2-bit.* context of 19 tokens: .*nothing is coded"):
        lm._loglikelihood_tokens(requests([20, 200]))
    lm = make_lm(Kivi(2, 64), allow_short=True)
    found = lm._loglikelihood_tokens(asked)
    assert (lm.compressed, lm.too_short) == (3, 6)
    exact = make_lm(FullCache(), allow_short=True)._loglikelihood_tokens(asked)
    for index, (_, context, _) in enumerate(asked):
        assert (found[index][0] == exact[index][0]) == (len(context) <= 20)


@torch.inference_mode()
def test_contexts_are_cut_to_what_the_model_takes(lm_eval):
    lm = make_lm(FullCache())
    longest = lm.max_length
    context = list(range(longest + 10))
    assert lm._context(context, [1, 2, 3]) == context[-(longest - 2) :]
    with pytest.raises(ValueError, match="does not fit"):
        lm._context(context, [1] * (longest + 1))
    with pytest.raises(NotImplementedError, match="svdq eval perplexity"):
        lm.loglikelihood_rolling([])


def write_tasks(folder):
    documents = [{"text": make_text(420)[i:], "gold": i % 2} for i in (0, 3, 6)]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, rest in (("choice", CHOICE), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)


def test_command_runs_tasks(lm_eval, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_model("llama", "sdpa").save_pretrained(tmp_path / "tiny")
    tokenizer_with_ends().save_pretrained(tmp_path / "tiny")
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    arguments = [
        "eval", "harness", "--tasks", "tiny_choice,tiny_generate", "--include-path",
        tmp_path / "tasks", "--model", tmp_path / "tiny", "--preset", "2.25", "--peer",
        "per-channel:8", "--json", tmp_path / "rows.json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    label = CacheSettings("2.25", v_bits="exact", residual_length=0).label
    methods = ["full cache", label, "per-channel 8-bit"]
    assert [row["method"] for row in rows] == [m for m in methods for _ in range(2)]
    assert [(row["task"], row["metric"]) for row in rows[:2]] == [
        ("tiny_choice", "acc"),
        ("tiny_generate", "exact_match"),
    ]
    for row in rows:
        assert (row["compressed"], row["too_short"]) == (3 * 2 + 3, 0)
        assert 0 <= row["value"] <= 1
    assert [row["k_bits"] for row in rows[::2]] == [32, 2.25, 8]


@torch.inference_mode()
def test_generation_goes_on_from_the_compressed_context(lm_eval):
    context = make_tokens(1, 200)
    plain = make_model("llama", "sdpa").generate(
        context, attention_mask=torch.ones_like(context), do_sample=False, max_new_tokens=8
    )
    settings = {"attention_mask": torch.ones_like(context)}
    exact = make_lm(FullCache())._model_generate(context, 208, ["zzz"], **settings)
    assert torch.equal(exact, plain)
    lm = make_lm(PerChannel(1))
    coarse = lm._model_generate(context, 208, ["zzz"], **settings)
    assert torch.equal(coarse[:, :200], context)
    assert not torch.equal(coarse, plain)
    assert lm.compressed == 1
    assert lm.memory[0]["k_bits"] == 1
