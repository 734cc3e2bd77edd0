"""The table of model families: a sample of every kind of answer."""

import pytest
import transformers
from typer.testing import CliRunner

from svdq_bench.cli.app import app
from svdq_bench.quality.families import LARGEST_ERROR, evaluate_families, families

EXPECTED = {
    "llama": ("before RoPE", ""),
    "gemma3_text": ("before RoPE", ""),
    "smollm3": ("before RoPE", ""),
    "gpt_oss": ("before RoPE", ""),
    "cohere": ("as they come", "interleaved"),
    "opt": ("as they come", "no rope_theta"),
    "deepseek_v3": ("refused", "multi-head latent attention"),
    "falcon": ("refused", "outside of the attention function"),
    "bloom": ("refused", "head_dim 8"),
    "mistral": ("refused", "no full-attention layer"),
    "rwkv": ("not tried", "num_attention_heads"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_families(name):
    (row,) = evaluate_families([name], lambda _: None)
    works, why = EXPECTED[name]
    assert row["works"] == works and why in row["why"]
    if works in ("before RoPE", "as they come"):
        assert 0 < row["compressed"] <= row["layers"] and row["key_error"] <= LARGEST_ERROR


def test_unknown_family():
    with pytest.raises(ValueError, match="no causal language model 'no-such'"):
        evaluate_families(["no-such"], lambda _: None)


def test_every_family_is_in_the_table():
    assert len(families()) > 100 and "llama" in families()


def test_command(tmp_path):
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(
        app, ["eval", "families", "--family", "llama", "--family", "bloom", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    assert path.exists() and transformers.__version__ in path.read_text()
