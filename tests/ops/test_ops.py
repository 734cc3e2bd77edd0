"""The operators as torch sees them: schemas, fake kernels, tracing and compilation."""

import os
import subprocess
import sys

import pytest
import torch

from support import make_cache, make_inv_freq, make_k_pages, make_keys, make_layout, make_v_pages
from svdq import _C, ops, reference
from svdq.layout import NO_SLOT
from svdq.ops.registered import ARGUMENTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROPES = ["pre", "post", "hybrid"]


def check(op, **given):
    """torch.library.opcheck: schema, fake kernel, autograd registration and AOT dispatch."""
    args = {name: given[name] for name in ARGUMENTS[op] if name in given}
    torch.library.opcheck(getattr(torch.ops.svdq, op).default, (), args)


def setting(rope, dtype=torch.float32, v_bits=4):
    """Layout, keys, their codec and a page table."""
    layout = make_layout(64, [8, 4, 2, 1], 2, rope, v_bits=v_bits)
    inv_freq = make_inv_freq(64) if rope != "post" else None
    keys = make_keys(2, 70, 64, inv_freq=inv_freq).to(dtype)
    return layout, keys, reference.fit_keys(keys, layout, inv_freq), torch.tensor([1, 0]).int()


def attend_args(rope, dtype, v_bits=4):
    """Arguments of torch.ops.svdq.attend."""
    layout = make_layout(64, [4, 2], 2, rope, v_bits=v_bits)
    cache, _, _ = make_cache(layout, [70, 10], [3, 5], first_positions=[0, 2], window_dtype=dtype)
    window = {name: getattr(cache, name).nan_to_num() for name in ("window_keys", "window_values")}
    query = torch.randn(2, 4, 2, 64).to(dtype)
    return {"query": query, **cache.but(**window, sink_tokens=1).flat()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES)
def test_fit_and_pack_keys(rope, dtype):
    layout, keys, codec, table = setting(rope, dtype)
    given = {**codec.flat(), "keys": keys, "position": 3, "layout": layout.ints, "clip": True}
    check("fit_basis", **given)
    if rope == "hybrid":
        check("residual_keys", **given)
    else:
        mean, components, _ = reference.fit_basis(keys, codec.inv_freq)
        check("fit_quantizer", **{**given, "mean": mean, "components": components})
    check("pack_keys_", **given, k_pages=make_k_pages(layout, 2), page_table=table, slot=1)


@pytest.mark.parametrize("rope", ROPES)
def test_unpack(rope):
    layout, _, codec, table = setting(rope)
    given = {"k_pages": make_k_pages(layout, 2), "layout": layout.ints, "page_table": table}
    given |= {"slot": 5, "num_tokens": 70}
    check("unpack_codes", **given)
    check("unpack_keys", **given, **codec.flat(), position=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v_bits", [2, 4, "exact"])
def test_values(dtype, v_bits):
    bits = 8 * dtype.itemsize if v_bits == "exact" else v_bits
    layout = make_layout(64, [4], 2, v_bits=bits)
    v_pages = make_v_pages(layout, 2, dtype).nan_to_num().fill_(0)
    table = torch.tensor([1, 0]).int()
    given = {"v_pages": v_pages, "layout": layout.ints, "page_table": table}
    check("pack_values_", **given, values=torch.randn(2, 70, 64).to(dtype), slot=1)
    check("unpack_values", **given, slot=5, num_tokens=70)


def test_allocate_bits():
    check("allocate_bits", variance=torch.rand(3, 64), schedule=[8, 4, 2, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_window(dtype):
    window = torch.randn(2, 3, 9, 64).to(dtype)
    new = torch.randn(2, 3, 2, 64).to(dtype)
    given = {"window_keys": window[0], "window_values": window[1]}
    check("append_window_", **given, keys=new[0], values=new[1], start=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES)
def test_attend(rope, dtype):
    check("attend", **attend_args(rope, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_with_full_values(dtype):
    check("attend", **attend_args("post", dtype, v_bits=32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES)
def test_select_and_gather(rope, dtype):
    given = attend_args(rope, dtype)
    outliers = torch.tensor([[[5, NO_SLOT]] * 2] * 2, dtype=torch.int32)
    given |= {"sm_scale": 0.125, "budget": 9, "channels": 8, "outlier_slots": outliers}
    check("select", **given)
    check("select", **{**given, "outlier_slots": None})
    chosen = {name: given[name] for name in ARGUMENTS["select"]}
    slots, _ = torch.ops.svdq.select(**chosen)
    check("gather", **{**given, "v_pages": given["v_pages"].nan_to_num()}, slots=slots)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_to_gathered(dtype):
    slots = torch.arange(128, dtype=torch.int32).expand(2, 2, -1).contiguous()
    check("attend", **{**attend_args("pre", dtype), "sink_tokens": 0, "token_slots": slots})


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype):
    out, lse = torch.randn(2, 4, 3, 64).to(dtype), torch.randn(2, 4, 3)
    check("merge", out_a=out, lse_a=lse, out_b=out, lse_b=lse)


def test_compiled_graphs_hold_the_operators():
    """One graph without a break, and the same results as without compilation."""
    layout, keys, codec, table = setting("post")
    cache, _, _ = make_cache(layout, [70], [4])
    nothing = torch.zeros(1, dtype=torch.int32)

    def step(query, k_pages, keys):
        ops.pack_keys_(k_pages, keys, codec, layout, table, 0)
        packed = ops.attend(query, **cache.but(k_pages=k_pages, window_lens=nothing).kwargs())
        exact = ops.attend(query, **cache.but(cache_seqlens=nothing).kwargs())
        return ops.merge(*packed, *exact)

    query = torch.randn(1, 4, 1, 64)
    for compiler in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        pages = [cache.k_pages.clone() for _ in range(2)]
        for got, expected in zip(
            compiled(query, pages[0], keys), step(query, pages[1], keys), strict=True
        ):
            assert torch.equal(got, expected)
        assert torch.equal(pages[0], pages[1])
        assert not torch.equal(pages[0], cache.k_pages)


def test_fake_kernels_run_on_meta_tensors():
    layout = make_layout(64, [4], 2)
    meta = torch.device("meta")
    shapes = [tuple(x.shape) for x in ops.fit_basis(torch.empty(2, 70, 64, device=meta))]
    assert shapes == [(2, 64), (2, 64, 64), (2, 64)]
    keys = torch.empty(2, 70, 64, dtype=torch.bfloat16, device=meta)
    mean, components, _ = ops.fit_basis(keys)
    codec = ops.fit_quantizer(keys, mean, components, layout)
    basis, scale = codec.basis, codec.scale
    assert (basis.shape, basis.dtype) == ((layout.rank, 64), torch.bfloat16)
    assert (scale.shape, scale.dtype, scale.device) == ((layout.rank,), torch.float32, meta)


def test_backends_can_be_chosen():
    before = _C.backend()
    assert before in _C.backends()
    assert "portable" in _C.backends()
    for name in _C.backends():
        _C.set_backend(name)
        assert _C.backend() == name
    with pytest.raises(ValueError, match="'cray' is not available.*portable"):
        _C.set_backend("cray")
    assert _C.backend() == _C.backends()[-1]
    _C.set_backend(before)


@pytest.mark.parametrize("name", ["portable", "cray"])
def test_the_environment_forces_a_backend(name):
    """SVDQ_BACKEND names the one to use; one that does not run here fails at import."""
    # The extension alone: the package would import transformers.
    code = (
        "import importlib.util as u, torch\n"
        f"spec = u.spec_from_file_location('svdq._C', {_C.__file__!r})\n"
        "extension = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(extension)\n"
        "print(extension.backend())"
    )
    environment = {**os.environ, "SVDQ_BACKEND": name}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if name == "portable":
        assert run.stdout.strip() == "portable"
    else:
        assert run.returncode != 0
        assert "backend 'cray' is not available" in run.stderr
