"""Files that are not what a save wrote: one ValueError that names them, or a cache that works."""

import json
import random
import struct
from types import SimpleNamespace

import pytest
import torch

from cache_support import CONFIGS, make_model, make_tokens
from calibration_support import calibration
from svdq import SVDqCache, cache_argument

SETTINGS = {
    "llama": {"k_bits": 1.25, "outlier_fraction": 0.05},
    "gemma3": {"kv_bits": 2.5, "rope": "hybrid"},
    "calibrated": {},
    "own ranges": {"prompt_ranges": True},
}
WRONG = (0, -1, 2**31, 1.5, "", "x", [], {}, None, True, [[]], 10**30)
DELETED = object()


@pytest.fixture(scope="module", params=SETTINGS)
def saved(request, tmp_path_factory):
    """Model and calibration, path, header and body of a file."""
    is_family = request.param in CONFIGS
    shared = None if is_family else calibration()
    model = make_model(request.param if is_family else "llama")
    case = SimpleNamespace(model=model, calibration=shared)
    cache = SVDqCache(model.config, calibration=case.calibration, **SETTINGS[request.param])
    with torch.inference_mode():
        model(make_tokens(2, 300), **cache_argument(cache))
    path = tmp_path_factory.mktemp("files") / "cache"
    cache.save(path)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return case, path, json.loads(raw[8 : 8 + size]), raw[8 + size :]


def opened(node):
    """A value, or what its text says where it is JSON in JSON."""
    if isinstance(node, str) and node[:1] in "{[":
        return json.loads(node)
    return node


def trails(node, trail=()):
    """The way to everything in a header."""
    node = opened(node)
    if isinstance(node, (dict, list)):
        keys = node if isinstance(node, dict) else range(len(node))
        return [x for key in keys for x in [(*trail, key), *trails(node[key], (*trail, key))]]
    return []


def changed(node, trail, value):
    """The same with one thing changed."""
    inner = opened(node)
    inner = dict(inner) if isinstance(inner, dict) else list(inner)
    if len(trail) > 1:
        inner[trail[0]] = changed(inner[trail[0]], trail[1:], value)
    elif value is DELETED:
        del inner[trail[0]]
    else:
        inner[trail[0]] = value
    return json.dumps(inner) if isinstance(node, str) else inner


def check_load(case, path):
    """Load, and use what was loaded; whether the file was refused."""
    model = case.model
    try:
        cache = SVDqCache.load(path, model.config, calibration=case.calibration)
    except ValueError as error:
        assert str(path) in str(error)
        return True
    assert cache.memory_report().total_bytes == cache.allocated_bytes()
    with torch.inference_mode():
        out = model(make_tokens(2, 1), **cache_argument(cache)).logits
    assert out.isfinite().all()
    if model.config.model_type == "llama":
        cache.crop(-100)
    return False


@pytest.mark.parametrize("checksum", [True, False], ids=["checksum", "earlier version"])
def test_headers_with_something_changed(saved, checksum):
    case, path, header, body = saved
    header = json.loads(json.dumps(header))
    if not checksum:
        del header["__metadata__"]["checksum"]
    choices, rng, refused = trails(header), random.Random(0), 0
    for _ in range(150):
        wrong = changed(header, rng.choice(choices), rng.choice((*WRONG, DELETED)))
        text = json.dumps(wrong).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        refused += check_load(case, path)
    assert refused > 100


def test_bodies_with_something_changed(saved):
    case, path, header, body = saved
    text, rng = json.dumps(header).encode(), random.Random(0)
    start = struct.pack("<Q", len(text)) + text
    for _ in range(40):
        wrong = bytearray(body)
        wrong[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        path.write_bytes(start + wrong)
        assert check_load(case, path)
    for end in (0, 7, 8, 100, len(start), len(start) + 1, len(start) + len(body) - 1):
        path.write_bytes((start + body)[:end])
        assert check_load(case, path)
    path.write_bytes(start + body)
    assert not check_load(case, path)


def test_numbers_that_are_not_finite(saved):
    """In a file without a checksum they are looked for."""
    case, path, header, body = saved
    header = json.loads(json.dumps(header))
    del header["__metadata__"]["checksum"]
    text = json.dumps(header).encode()
    names = [name for name, x in header.items() if x.get("dtype") in ("F32", "BF16")]
    names = [name for name in names if name.split(".")[-1] in ("basis", "scale", "mean", "keys")]
    assert len(names) >= (2 if case.calibration is not None else 4)
    for name in names:
        wrong = bytearray(body)
        first, size = header[name]["data_offsets"][0], {"F32": 4, "BF16": 2}[header[name]["dtype"]]
        wrong[first : first + size] = {4: b"\0\0\xc0\x7f", 2: b"\xc0\x7f"}[size]
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(wrong))
        assert check_load(case, path), name


def test_no_file():
    with pytest.raises(FileNotFoundError):
        SVDqCache.load("/no/such/file", CONFIGS["llama"])
