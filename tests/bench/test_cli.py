"""The ``svdq`` command: what it prints and writes, and how it says no."""

import json
import re

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from model_support import make_text, save_model
from svdq import _C
from svdq_bench.cli import app
from svdq_bench.quality.figure import runs


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model_options(tmp_path_factory):
    """Options that name a tiny model and a text for it."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "tiny")
    (folder / "text.txt").write_text(make_text(900))
    return {"model": ("--model", folder / "tiny"), "text": folder / "text.txt"}


TINY_TASK = ("--prefill-tokens", 320, "--predict-tokens", 40, "--window-start", 100)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["demo", "eval", "bench", "table", "info"]),
        (["demo"], ["--prompt-tokens", "--gguf-file", "--output-dir", "--k-bits"]),
        (["eval", "perplexity"], ["--preset", "--no-clip", "--window-start", "--json"]),
        (["eval", "retrieval"], ["--k-bits", "--lambda", "--allocate-across", "--no-weighted"]),
        (["eval", "harness"], ["--k-bits", "--lambda", "--allocate-across", "--no-weighted"]),
        (["eval", "perplexity"], ["--sparse-budget", "--sparse-scorer", "--dense-layers"]),
        (["eval", "sparsity"], ["--budget", "--channels", "--rope", "--html"]),
        (["bench", "sparse"], ["--budget", "--kv-len", "--rope", "--sparse-channels"]),
        (["eval", "memory"], ["--kv-bits", "--tokens", "--residual-length", "--json"]),
        (["eval", "keys"], ["--preset", "--k-bits", "--rope", "--weighted", "--html"]),
        (["bench", "attend"], ["--kv-len", "--rope", "--head-dim", "--json"]),
        (["bench", "prefill"], ["--tokens", "--json"]),
        (["bench", "fit"], ["--model-shape", "--kv-len", "--schedule", "--v-bits", "--json"]),
    ],
)
def test_help_names_options(arguments, words):
    result = invoke(*arguments, "--help")
    assert result.exit_code == 0
    for word in words:
        assert word in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval", "perplexity", "--preset", "paper-9"], "must be a preset .* got 'paper-9'"),
        (
            ["eval", "perplexity", "--preset", "9.5"],
            "k_bits must be above 0 and at most 8, or 16, got 9.5",
        ),
        (["eval", "retrieval", "--k-bits", "-1"], "key bits must be .* got '-1'"),
        (["eval", "perplexity", "--device", "tpu"], "device must be one of .* got 'tpu'"),
        (["eval", "retrieval", "--device", "tpu"], "device must be one of .* got 'tpu'"),
        (["eval", "perplexity", "--lambda", "0"], "lambda_ must be above 0, got 0.0"),
        (
            ["eval", "perplexity", "--allocate-across", "head"],
            "--allocate-across head needs bits to allocate",
        ),
        (
            ["eval", "perplexity", "--lambda", "1e-3", "--allocate-across", "layer"],
            "--allocate-across layer needs bits to allocate",
        ),
        (
            ["eval", "perplexity", "--preset", "exact", "--weighted"],
            "'exact' are not packed, so they cannot be weighted",
        ),
        (["eval", "keys", "--preset", "exact"], "'exact' codes nothing"),
        (["eval", "perplexity", "--v-bits", "5.5"], "value bits must be .* got '5.5'"),
        (["eval", "perplexity", "--text-file", "none.txt"], "cannot read none.txt"),
        (["eval", "perplexity", "--model", "./none"], "no model folder none"),
        (["eval", "perplexity", "--gguf-file", "a.gguf"], "needs --model"),
        (["demo", "--prompt-file", "none.txt"], "cannot read none.txt"),
        (["demo", "--k-bits", "exact"], "'exact' packs nothing"),
        (["demo", "--new-tokens", "3"], "at least 10 new tokens"),
        (["bench", "attend", "--num-qo-heads", "7"], "num_qo_heads must be a multiple"),
        (["bench", "attend", "--head-dim", "100"], "head_dim .* multiple of 16 .*100"),
        (["bench", "attend", "--v-bits", "5"], "v_bits must be 4, 3 or 2, got 5"),
        (["bench", "attend", "--preset", "16"], "packs nothing"),
        (["bench", "prefill", "--preset", "0,0"], "not all zero"),
        (["bench", "fit", "--model-shape", "gpt"], "model shape must be one of .* got 'gpt'"),
        (["bench", "fit", "--schedule", "16"], "packs nothing"),
        (["bench", "fit", "--v-bits", "5"], "v_bits must be 4, 3 or 2, got 5"),
        (["bench", "fit", "--head-dim", "100"], "head_dim .* multiple of 16 .*100"),
        (["table", "none.json"], "none.json"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    assert lines[0].startswith("svdq: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not any(tmp_path.iterdir())


def test_traceback_on_request():
    result = invoke("--traceback", "eval", "perplexity", "--preset", "paper-9")
    assert result.exit_code == 2
    assert "Traceback" in result.output
    assert "Traceback" not in invoke("eval", "perplexity", "--preset", "paper-9").output


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr("svdq_bench.speed.machine.describe_machine", broken)
    assert isinstance(invoke("info").exception, ZeroDivisionError)


def test_info_names_backends_and_versions():
    result = invoke("info")
    assert result.exit_code == 0
    for fact in (_C.backend(), f"version {_C.format.VERSION}", torch.__version__):
        assert fact in result.output


def test_perplexity_writes_rows(model_options, tmp_path):
    path = tmp_path / "new" / "rows.json"
    result = invoke(
        "eval", "perplexity", *model_options["model"], "--text-file", model_options["text"],
        *TINY_TASK, "--preset", "8,8", "--preset", "paper-1.25", "--no-clip", "--rope", "post",
        "--sink-tokens", 4, "--json", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert [row["k_bits"] for row in rows] == [32, 8, 1.25]
    assert rows[0]["kl"] == 0 < rows[1]["kl"] < rows[2]["kl"]
    for row in rows[1:]:
        assert (row["rope"], row["clip"], row["sink_tokens"]) == ("post", False, 4)
        assert row["all_in_bits"] > row["k_bits"]
        assert row["v_bits"] == "exact"
        assert 0 <= row["top1_agreement"] <= 1
        assert row["machine"]["backend"] == _C.backend()
        assert f"{row['perplexity']:.3f}" in result.output
        assert row["method"] in result.output


@pytest.mark.parametrize(
    "options, expected",
    [
        ((), {"svdq paper-1.25, pre-RoPE, clipped": ("model", None)}),
        (("--k-bits", 0.7), {"svdq 0.7, pre-RoPE, clipped": ("model", None)}),
        (("--lambda", 1e-4), {"svdq lambda=0.0001, pre-RoPE, clipped": ("model", None)}),
        (
            ("--preset", "2.25", "--k-bits", 1, "--k-bits", 2, "--allocate-across", "head"),
            {
                "svdq 2.25, pre-RoPE, clipped, per head": ("head", None),
                "svdq 1, pre-RoPE, clipped, per head": ("head", None),
                "svdq 2, pre-RoPE, clipped, per head": ("head", None),
            },
        ),
        (
            ("--preset", "paper-1.25", "--k-bits", 1, "--allocate-across", "layer", "--weighted"),
            {
                "svdq paper-1.25, pre-RoPE, clipped, weighted": ("model", True),
                "svdq 1, pre-RoPE, clipped, per layer, weighted": ("layer", True),
            },
        ),
        (
            ("--k-bits", 1, "--no-weighted"),
            {"svdq 1, pre-RoPE, clipped, unweighted": ("model", False)},
        ),
    ],
)
def test_options_say_how_bits_are_allocated(model_options, tmp_path, options, expected):
    path = tmp_path / "rows.json"
    result = invoke(
        "eval", "perplexity", *model_options["model"], "--text-file", model_options["text"],
        *TINY_TASK, *options, "--json", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    _, *rows = json.loads(path.read_text())
    assert {r["method"]: (r["allocate_across"], r["query_weighted"]) for r in rows} == expected
    for row in rows:
        if re.fullmatch(r"[0-9.]+", row["preset"]):  # a whole number of granules, at most
            assert float(row["preset"]) - 0.25 < row["k_bits"] <= float(row["preset"])


def test_tables_come_from_json_alone(model_options, tmp_path):
    path, document = tmp_path / "quality.json", tmp_path / "page.md"
    result = invoke(
        "eval", "perplexity", *model_options["model"], "--text-file", model_options["text"],
        *TINY_TASK, "--json", path, "--markdown",
    )  # fmt: skip
    rows = json.loads(path.read_text())
    printed = [line for line in result.output.splitlines() if line.startswith("|")]
    assert printed[0].startswith("| keys | bits |")
    assert len(printed) == 2 + len(rows)
    table = invoke("table", path)
    assert [line for line in table.output.splitlines() if line.startswith("|")] == printed

    document.write_text("a\n<!-- table: quality -->\nold\n<!-- end -->\nb\n")
    for _ in range(2):  # a second time changes nothing
        assert invoke("table", path, "--into", document).exit_code == 0
        text = document.read_text()
        assert text.startswith("a\n<!-- table: quality -->\n| keys")
        assert text.endswith("\n<!-- end -->\nb\n")
        assert "old" not in text
        assert text.count(printed[-1]) == 1


def test_table_refuses_what_are_no_rows(tmp_path):
    path = tmp_path / "rows.json"
    for content, message in (
        ("{", "is no JSON"),
        ("{}", "no list of rows"),
        ("[]", "expected rows"),
        ('[{"benchmark": "x"}]', "expected rows"),
    ):
        path.write_text(content)
        result = invoke("table", path)
        assert result.exit_code == 2
        assert message in result.output
    path.write_text('[{"benchmark": "demo", "method": "x"}]')
    (tmp_path / "page.md").write_text("<!-- table: other -->\n<!-- end -->")
    result = invoke("table", path, "--into", tmp_path / "page.md")
    assert result.exit_code == 2
    assert "no block '<!-- table: rows -->'" in result.output


def test_table_draws(tmp_path):
    rows = [{"benchmark": "bits", "layer": 0, "head": 0, "bits": 1}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    result = invoke("table", tmp_path / "rows.json", "--plot", tmp_path / "new" / "bits.svg")
    assert result.exit_code == 0, result.output
    assert "<svg" in (tmp_path / "new" / "bits.svg").read_text()


def test_bench_attend_writes_rows(tmp_path):
    path = tmp_path / "rows.json"
    result = invoke(
        "bench", "attend", "--rope", "post", "--kv-len", 200, "--kv-len", 300, "--num-qo-heads", 4,
        "--num-kv-heads", 2, "--head-dim", 64, "--repeats", 1, "--working-set", 1, "--json", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 6
    assert {row["kv_len"] for row in rows} == {200, 300}
    keys = {"case", "ms", "speedup_vs_torch_best", "speedup_vs_enable_gqa", "bandwidth_fraction"}
    assert all(keys <= row.keys() for row in rows)
    assert not any("pre" in row["case"] for row in rows)


def test_bench_fit_writes_rows(tmp_path):
    path = tmp_path / "rows.json"
    result = invoke(
        "bench", "fit", "--model-shape", "smollm2-135m", "--num-kv-heads", 2, "--head-dim", 32,
        "--kv-len", 200, "--rope", "post", "--schedule", "4,2", "--v-bits", 2, "--dtype", "float32",
        "--repeats", 1, "--json", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert {row["model"] for row in rows} == {"smollm2-135m"}
    assert {(row["num_kv_heads"], row["head_dim"], row["v_bits"]) for row in rows} == {(2, 32, 2)}
    assert {(row["kv_len"], row["dtype"]) for row in rows} == {(200, "float32")}
    assert "append 64 tokens, post" in [row["case"] for row in rows]
    assert not any("pre" in row["case"] for row in rows)


def test_bench_prefill_writes_rows(model_options, tmp_path):
    path = tmp_path / "rows.json"
    result = invoke(
        "bench", "prefill", *model_options["model"], "--text-file", model_options["text"],
        "--tokens", 300, "--repeats", 1, "--json", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert rows[0]["case"] == "prefill"
    assert rows[-1]["fraction_of_prefill"] > 0
    too_long = invoke("bench", "prefill", *model_options["model"], "--tokens", 901,
                      "--text-file", model_options["text"])  # fmt: skip
    assert too_long.exit_code == 2
    assert "the text has 900 tokens, 901 are asked for" in too_long.output


def test_demo_writes_picture_and_numbers(model_options, tmp_path):
    result = invoke(
        "demo", *model_options["model"], "--prompt-file", model_options["text"],
        "--prompt-tokens", 500, "--held-back-tokens", 30, "--new-tokens", 12,
        "--dtype", "float32", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    picture = imread(tmp_path / "out" / "demo.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.05  # something is drawn
    full, compressed = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert full["cached_tokens"] == compressed["cached_tokens"] == 502
    assert full["attention"] == "sdpa"
    assert compressed["attention"] == "svdq"
    assert full["cache_bytes"] == 502 * 2 * 2 * 2 * 64 * 4  # layers, K and V, heads, D, bytes
    assert compressed["cache_bytes"] == sum(compressed["cache_parts"].values())
    assert compressed["cache_ratio"] == full["cache_bytes"] / compressed["cache_bytes"] > 1
    assert full["kl"] == 0 < compressed["kl"]
    for row in (full, compressed):
        assert row["text"].startswith("w")
        assert len(row["text"].split()) == row["new_tokens"] == 12
        assert row["tokens_per_second"] == pytest.approx(1000 / row["decode_ms"])


def test_runs_of_widths():
    assert runs([4, 4, 2, 0, 0, 0]) == [(0, 2, 4), (2, 3, 2), (3, 6, 0)]
    assert runs([8]) == [(0, 1, 8)]
