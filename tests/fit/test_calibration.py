"""Calibrations: fitted to several texts as the formulas say, and their files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from cache_support import CONFIGS, GQA, SIZES, make_model, make_tokens
from calibration_support import SETTINGS, WINDOW, calibration, windows
from svdq import Calibration, PageLayout, SVDqCache, ops
from svdq.fit.ranges import coding_errors, fit_ranges
from svdq.reference.calibration import fit_ranges as reference_ranges
from svdq.reference.calibration import join_windows
from svdq.reference.keys import code_keys, decode_keys, fit_basis, rotate
from svdq_bench.quality.calibration import calibrate_bases, cut_windows, shifted
from svdq_bench.quality.prefix import read_prefix

SINKS = 8


def inverse_frequencies(dim=64, theta=10000.0):
    return theta ** (-torch.arange(0, dim, 2).float() / dim)


def test_shifted_keys_are_those_further_on():
    keys, inv_freq = torch.randn(2, 50, 40), inverse_frequencies(32)
    rows = rotate(keys, torch.arange(50), inv_freq)
    expected = rotate(keys, 3000 + torch.arange(50), inv_freq)
    # Angles in float64, products in float32: some units of rounding of numbers up to 5.
    torch.testing.assert_close(
        shifted(rows.float(), inv_freq, 3000), expected.float(), atol=5e-6, rtol=0
    )
    assert torch.equal(shifted(keys, None, 3000), keys)


def joined_keys(layer):
    """Keys of a layer of the model from all windows, as one sequence, without sinks."""
    model, inv_freq = make_model("llama", "sdpa"), inverse_frequencies()
    own = []
    for window in windows():
        keys = read_prefix(model, window).cache.layers[layer].keys[0]
        rows = rotate(keys, torch.arange(WINDOW), inv_freq, inverse=True)[:, SINKS:]
        own.append(rotate(rows, torch.arange(WINDOW - SINKS), inv_freq))
    return join_windows(own, inv_freq)


def test_bases_are_those_of_the_keys_of_all_texts():
    found = calibration("schedule")
    for index, layer in found.layers.items():
        keys = joined_keys(index)
        _, components, variance = fit_basis(keys, inverse_frequencies())
        rows = layer.codec.basis[0].double().unflatten(0, (2, -1))
        rank = rows.shape[1]
        rows = rows / rows.norm(dim=2, keepdim=True)
        # The span holds as much variance as the best of its rank, up to bfloat16's rounding of its
        # rows: 2^-9 of an amplitude, squared, of all the variance.
        covariance = components.mT @ (variance[..., None] * components)
        held = torch.einsum("hrd,hde,hre->h", rows, covariance, rows)
        best = variance[:, :rank].sum(1)
        assert (held >= best - 2**-9 * variance.sum(1)).all()
        assert (held <= best * (1 + 2**-7)).all()
        # The error is that of the formulas' codes.
        codec = replace(layer.codec.sequence(0), inv_freq=inverse_frequencies())
        decoded = decode_keys(code_keys(keys, codec, layer.layout), codec, layer.layout)
        error = (decoded - keys).square().sum(2).mean(1)
        torch.testing.assert_close(layer.error.double(), error, rtol=1e-3, atol=0)
    assert found.num_tokens == 2 * (WINDOW - SINKS) and found.texts == ("a", "b")


def test_widths_are_allocated_once_for_the_model():
    for name, bits in (("pre", 2.0), ("both", None)):
        found = calibration(name)
        numbers = sum(x.layout.num_kv_heads for x in found.layers.values())
        k_bits = sum(x.layout.k_bits * x.layout.num_kv_heads for x in found.layers.values())
        v_bits = sum(sum(x.layout.v_bits) for x in found.layers.values())
        if bits is not None:
            assert 0.9 * bits < k_bits / numbers <= bits
        else:
            assert 0.9 * 3 < (k_bits + v_bits) / numbers / 2 <= 3


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("clip", [True, False])
def test_ranges_in_a_given_basis(rope, clip):
    spectrum = 8.0 ** -torch.linspace(0, 1, 64)
    inv_freq = inverse_frequencies() if rope == "pre" else None
    first, second = (torch.randn(2, 600, 64) * spectrum + shift for shift in (0.5, 1.0))
    layout = PageLayout(64, ((8, 16, 8, 8),) * 2, rope)
    mean, components, _ = ops.fit_basis(first, inv_freq)
    codec = ops.fit_quantizer(first, mean, components, layout, inv_freq=inv_freq, clip=clip)
    options = {"inv_freq": inv_freq, "clip": clip}
    found = fit_ranges(second * 2, codec, layout, **options)
    expected = reference_ranges(second * 2, codec, layout, **options)
    # The search for clipped ranges is coarser than the reference's; those from min to max differ
    # by the rounding of rows to bfloat16 alone.
    off = 0.15 if clip else 0.01
    torch.testing.assert_close(found.scale, expected.scale, rtol=off, atol=0)
    assert found.basis is codec.basis
    errors = [coding_errors(second * 2, x, layout).mean() for x in (codec, found, expected)]
    assert errors[1] < 0.7 * errors[0]
    torch.testing.assert_close(errors[1], errors[2], rtol=0.03, atol=0)
    again = fit_ranges(first, codec, layout, **options)  # its own keys have its own ranges
    torch.testing.assert_close(again.scale, codec.scale, rtol=off, atol=0)


def test_errors_are_those_of_the_formulas_codes():
    keys, layout = torch.randn(2, 100, 64), PageLayout(64, ((0, 16, 8, 0),) * 2, "post")
    mean, components, _ = ops.fit_basis(keys)
    codec = ops.fit_quantizer(keys, mean, components, layout)
    decoded = decode_keys(code_keys(keys, codec, layout), codec, layout)
    expected = (decoded.double() - keys.double()).square().sum(2)
    # A latent within rounding of the middle of two codes may take either.
    torch.testing.assert_close(
        coding_errors(keys, codec, layout).double(), expected, rtol=1e-3, atol=1e-3
    )


def test_windows_of_a_text():
    found = cut_windows("x", torch.arange(3000), 2, 400, 100)
    assert [x[0, 0].item() for x in found.fitted] == [300, 1300]
    assert [x.shape[1] for x in found.fitted] == [400, 400]
    assert found.held_out[0][0, [0, -1]].tolist() == [2250, 2749]
    short = cut_windows("x", torch.arange(600), 2, 400, 100)
    assert [x.shape[1] for x in (*short.fitted, *short.held_out)] == [200, 200, 200]
    with pytest.raises(ValueError, match="text 'x' has 300 tokens, too few for 2 windows"):
        cut_windows("x", torch.arange(300), 2, 400, 100)


def test_what_cannot_be_calibrated():
    model = make_model("llama", "sdpa")
    with pytest.raises(ValueError, match="expected windows of more than 8 tokens"):
        calibrate_bases(model, [], SETTINGS["pre"])
    texts = [cut_windows("x", make_tokens(1, 900)[0], 2, 200, 100)]
    with pytest.raises(ValueError, match="exact keys need no calibration"):
        calibrate_bases(model, texts, {"preset": "exact"})


# Files


@pytest.fixture
def path(tmp_path):
    calibration().save(tmp_path / "file")
    return tmp_path / "file"


@pytest.mark.parametrize("name", SETTINGS)
def test_files(tmp_path, name):
    found = replace(calibration(name), drift_bound=1.25, held_out=({"text": "a", "kl": 0.5},))
    found.save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    for index, layer in found.layers.items():
        assert loaded.layers[index].layout == layer.layout
        for key, x in layer.tensors().items():
            assert torch.equal(loaded.layers[index].tensors()[key], x)
    for key in ("model", "texts", "num_tokens", "drift_bound", "held_out", "digest"):
        assert getattr(loaded, key) == getattr(found, key)
    assert SVDqCache(CONFIGS["llama"], calibration=loaded).settings == (
        SVDqCache(CONFIGS["llama"], calibration=found).settings
    )


def rewrite(path, drop=(), change=None, **metadata):
    """The same file without some tensors, with others changed, or with other metadata."""
    with safe_open(path, "pt") as file:
        tensors = {x: file.get_tensor(x) for x in file.keys() if x not in drop}  # noqa: SIM118
        metadata = file.metadata() | metadata
    save_file(tensors | (change or {}), path, metadata)


def facts_of(path, **change):
    with safe_open(path, "pt") as file:
        return json.dumps(json.loads(file.metadata()["facts"]) | change)


DAMAGES = {
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged or cut short"),
    "cut in its header": (lambda p: p.write_bytes(p.read_bytes()[:50]), "damaged or cut short"),
    "empty": (lambda p: p.write_bytes(b""), "damaged or cut short"),
    "no calibration": (lambda p: save_file({"x": torch.zeros(1)}, p), "is no svdq calibration"),
    "newer": (lambda p: rewrite(p, version="2"), "has calibration version 2, this svdq reads 1"),
    "no facts": (lambda p: rewrite(p, facts="{"), "is damaged"),
    "no texts": (lambda p: rewrite(p, facts="{}"), "is damaged: 'layouts'"),
    "a tensor is missing": (lambda p: rewrite(p, drop=("1.scale",)), "layer 1 has no tensor"),
    "a tensor of another shape": (
        lambda p: rewrite(p, change={"0.mean": torch.zeros(1, 3, 64)}),
        "layer 0: mean is torch.float32",
    ),
    "a number that is none": (
        lambda p: rewrite(p, change={"0.error": torch.tensor([torch.nan, 1.0])}),
        "layer 0: error is torch.float32",
    ),
    "no layout": (
        lambda p: rewrite(p, facts=facts_of(p, layouts={"0": [1, 2, 3]})),
        "is damaged",
    ),
    "settings out of range": (
        lambda p: rewrite(p, facts=facts_of(p, settings={"k_bits": 100})),
        "is damaged: k_bits must be",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(path, damage):
    change, message = DAMAGES[damage]
    change(path)
    with pytest.raises(ValueError, match=message) as caught:
        SVDqCache(CONFIGS["llama"], calibration=path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "with num_hidden_layers=2, this one has 3"),
        ({"num_key_value_heads": 4}, "with num_key_value_heads=2, this one has 4"),
        ({"head_dim": 32}, "with head_dim=64, this one has 32"),
        ({"vocab_size": 300}, "with vocab_size=256, this one has 300"),
        ({"theta": 5e5}, "for another rotary embedding than that of layer 0"),
    ],
    ids=str,
)
def test_another_model(path, change, message):
    change = dict(change)
    theta = change.pop("theta", None)
    config = LlamaConfig(**(SIZES | GQA | change))
    if theta is not None and hasattr(config, "rope_parameters"):
        config.rope_parameters["rope_theta"] = theta
    elif theta is not None:
        config.rope_theta = theta
    with pytest.raises(ValueError, match=message) as caught:
        SVDqCache(config, calibration=path)
    assert str(path) in str(caught.value)


def test_layers_that_another_configuration_compresses(path):
    config = replace_layers(CONFIGS["llama"])
    with pytest.raises(ValueError, match="model_type='llama', this one has 'gemma3_text'"):
        SVDqCache(CONFIGS["gemma3"], calibration=path)
    with pytest.raises(ValueError, match=r"layers \[0\], this model compresses \[0, 1\]"):
        found = calibration()
        SVDqCache(config, calibration=replace(found, layers={0: found.layers[0]}))


def replace_layers(config):
    return LlamaConfig(**config.to_diff_dict())
