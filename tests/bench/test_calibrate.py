"""``svdq calibrate --bases``, ``svdq eval calibration``, ``svdq bench first-token``."""

import json

import pytest
from typer.testing import CliRunner

from cache_support import CONFIGS
from model_support import make_text, save_model
from svdq import Calibration, SVDqCache
from svdq_bench.cli import app
from svdq_bench.quality import texts
from svdq_bench.quality.calibrated_loss import DRIFT_MARGIN, cut_contexts
from svdq_bench.quality.calibration import cut_windows

BITS = 2.0


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, two texts, and bases that the command has calibrated on them."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "tiny")
    (folder / "one.txt").write_text(make_text(1600))
    (folder / "two.txt").write_text(" ".join(reversed(make_text(1500).split())))
    result = invoke(
        "calibrate", "--bases", folder / "bases", "--model", folder / "tiny",
        "--text", folder / "one.txt", "--text", folder / "two.txt", "--k-bits", BITS,
        "--prompt-tokens", 300, "--predict-tokens", 40, "--json", folder / "rows.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.output)
    return folder


def test_calibrate_writes_bases_and_says_what_they_lose(folder):
    rows = json.loads((folder / "rows.json").read_text())
    output = (folder / "output.txt").read_text()
    assert [row["text"] for row in rows] == ["one.txt", "two.txt"]
    found = Calibration.load(folder / "bases")
    assert found.texts == ("one.txt", "two.txt") and found.num_tokens == 4 * (300 - 8)
    assert found.drift_bound == pytest.approx(DRIFT_MARGIN * max(row["drift"] for row in rows))
    assert [row["kl"] for row in found.held_out] == [row["kl"] for row in rows]
    for row in rows:
        assert row["tokens"] == 300 and 0.9 * BITS < row["k_bits"] <= BITS
        assert row["kl"] > 0 and row["perplexity"] > 1
        assert f"{row['kl']:.4f}" in output
    assert f"2 layers of {folder / 'tiny'}, 1,168 keys of 2 texts" in output.replace("\n", " ")
    assert SVDqCache(CONFIGS["llama"], calibration=folder / "bases").settings.k_bits == BITS


def test_calibrated_and_fitted_bases_at_as_many_bits(folder):
    result = invoke(
        "eval", "calibration", folder / "bases", "--model", folder / "tiny",
        "--text", folder / "one.txt", "--tokens", 600, "--predict-tokens", 30,
        "--window-start", 0, "--window-start", 400, "--json", folder / "loss.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (row,) = json.loads((folder / "loss.json").read_text())
    assert (row["text"], row["tokens"], row["windows"]) == ("one.txt", 600, 2)
    assert row["own_all_in_bits"] == pytest.approx(row["all_in_bits"], rel=0.05)
    assert row["own_k_bits"] < row["k_bits"] <= BITS
    assert row["all_in_bits"] < row["own_ranges_all_in_bits"]
    assert row["ratio"] == pytest.approx(row["kl"] / row["kl_own_basis"])
    assert row["drift"] > 0 and row["calibrated_on"] == ["one.txt", "two.txt"]
    assert f"{row['kl']:.4f}" in result.output


def test_perplexity_of_a_calibration(folder):
    result = invoke(
        "eval", "perplexity", "--calibration", folder / "bases", "--model", folder / "tiny",
        "--text", folder / "one.txt", "--prefill-tokens", 400, "--predict-tokens", 20,
        "--window-start", 0, "--sparse-budget", "1/2", "--json", folder / "perplexity.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    full, dense, sparse = json.loads((folder / "perplexity.json").read_text())
    assert dense["method"] == "svdq 2, pre-RoPE, clipped, calibrated"
    assert full["kl"] == 0 < dense["kl"] < sparse["kl"]
    assert dense["all_in_bits"] < 32 and dense["cache_parts"]["calibration"] > 0


def test_first_token(folder):
    result = invoke(
        "bench", "first-token", folder / "bases", "--model", folder / "tiny", "--tokens", 200,
        "--text", folder / "one.txt", "--tokens", 600, "--repeats", 1, "--dtype", "float32",
        "--json", folder / "first.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((folder / "first.json").read_text())
    assert [row["tokens"] for row in rows] == [200] * 3 + [600] * 3
    assert [row["case"] for row in rows[:3]] == [
        "DynamicCache", "svdq, a basis for each prompt", "svdq, calibrated",
    ]  # fmt: skip
    bits = [[row["key_bits"] for row in rows[i : i + 2]] for i in (1, 4)]
    assert bits[0][1] < bits[0][0] and bits[1][1] < bits[1][0]
    assert rows[1]["calibration_bytes"] == 0 < rows[2]["calibration_bytes"]
    assert all(row["ttft_ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a profile to write, or bases to write with --bases FILE"),
        (["a", "--bases", "b"], "give a profile to write, or bases to write with --bases FILE"),
        (["a", "--k-bits", "2"], "--k-bits is for --bases"),
        (["a", "--text", "topics", "--text", "code"], "a profile is of one text, got 2"),
        (["--bases", "b", "--v-bits", "3"], "--v-bits goes with --k-bits"),
        (["--bases", "b", "--k-bits", "2", "--kv-bits", "3"], "give one of --k-bits and --kv-bits"),
        (["--bases", "b", "--k-bits", "2", "--v-bits", "x"], "value bits must be"),
        (["--bases", "b", "--text", "none.txt"], "cannot read none.txt"),
    ],
)
def test_wrong_usage(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("calibrate", *arguments)
    assert result.exit_code == 2 and message in result.output
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_no_calibration(folder):
    result = invoke("eval", "calibration", folder / "one.txt", "--model", folder / "tiny")
    assert result.exit_code == 2 and "one.txt cannot be read" in result.output.replace("\n", " ")


def test_contexts_that_do_not_fit():
    import torch

    with pytest.raises(ValueError, match="text 'x' has 100 tokens: a context of 50 at 40"):
        cut_contexts("x", torch.arange(100), [0, 40], 50, 20)


def test_the_mixture_has_several_domains():
    assert texts.MIXTURE == ("topics", "docstrings", "code", "fiction", "history")
    for name in ("fiction", "history"):
        text = texts.load_text(name)
        assert 40_000 < len(text) < 50_000 and text.isascii()
    import torch

    assert len(cut_windows("fiction", torch.arange(11_000), 2, 3072, 512).fitted) == 2
