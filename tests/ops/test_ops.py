"""The operators as torch sees them: schemas, fake kernels, tracing and compilation."""

import os
import subprocess
import sys

import pytest
import torch

from support import make_cache, make_inv_freq, make_k_pages, make_keys, make_layout, make_v_pages
from svdq import _C, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROPES = ["pre", "post", "hybrid"]


def check(op, *args):
    """torch.library.opcheck: schema, fake kernel, autograd registration and AOT dispatch."""
    torch.library.opcheck(getattr(torch.ops.svdq, op).default, args)


def setting(rope, dtype=torch.float32, v_bits=4):
    """Layout, frequencies, keys, what fits them, and a page table."""
    layout = make_layout(64, [8, 4, 2, 1], 2, rope, v_bits=v_bits)
    inv_freq = make_inv_freq(64) if rope != "post" else None
    keys = make_keys(2, 70, 64, inv_freq=inv_freq).to(dtype)
    mean, components, _ = reference.fit_basis(keys, inv_freq)
    *fitted, post_mean = reference.fit_keys(keys, layout, inv_freq)
    based = (mean, components)
    return layout, inv_freq, keys, based, fitted, torch.tensor([1, 0]).int(), post_mean


def attend_args(rope, dtype, v_bits=4):
    """Arguments of torch.ops.svdq.attend, in its order."""
    layout = make_layout(64, [4, 2], 2, rope, v_bits=v_bits)
    cache, _, _ = make_cache(layout, [70, 10], [3, 5], first_positions=[0, 2], exact_dtype=dtype)
    c = cache
    query = torch.randn(2, 4, 2, 64).to(dtype)
    packed = (c.k_pages, c.v_pages, c.page_table, c.cache_seqlens, c.basis, c.scale, c.mean)
    exact = (c.window_keys.nan_to_num(), c.window_values.nan_to_num(), c.window_lens)
    positions = (layout.ints, c.inv_freq, c.first_position)
    return (query, *packed, *positions, *exact, 1, c.sm_scale, True, c.post_mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES)
def test_fit_and_pack_keys(rope, dtype):
    layout, inv_freq, keys, based, fitted, table, post_mean = setting(rope, dtype)
    check("fit_basis", keys, inv_freq, 3)
    if rope == "hybrid":
        check("residual_keys", keys, inv_freq, 3, *fitted, layout.ints)
    else:
        check("fit_quantizer", keys, inv_freq, 3, *based, layout.ints, True)
    k_pages = make_k_pages(layout, 2)
    check("pack_keys_", k_pages, keys, inv_freq, 3, *fitted, layout.ints, table, 1, post_mean)


@pytest.mark.parametrize("rope", ROPES)
def test_unpack(rope):
    layout, inv_freq, _, _, fitted, table, post_mean = setting(rope)
    k_pages = make_k_pages(layout, 2)
    check("unpack_codes", k_pages, layout.ints, table, 5, 70)
    check("unpack_keys", k_pages, inv_freq, 3, *fitted, layout.ints, table, 5, 70, post_mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v_bits", [2, 4, "exact"])
def test_values(dtype, v_bits):
    bits = 8 * dtype.itemsize if v_bits == "exact" else v_bits
    layout = make_layout(64, [4], 2, v_bits=bits)
    v_pages = make_v_pages(layout, 2, dtype).nan_to_num().fill_(0)
    table = torch.tensor([1, 0]).int()
    check("pack_values_", v_pages, torch.randn(2, 70, 64).to(dtype), layout.ints, table, 1)
    check("unpack_values", v_pages, layout.ints, table, 5, 70)


def test_allocate_bits():
    check("allocate_bits", torch.rand(3, 64), [8, 4, 2, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_exact(dtype):
    rows = torch.randn(2, 3, 9, 64).to(dtype)
    new = torch.randn(2, 3, 2, 64).to(dtype)
    check("append_window_", rows[0], rows[1], new[0], new[1], 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES)
def test_attend(rope, dtype):
    check("attend", *attend_args(rope, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_with_exact_values(dtype):
    check("attend", *attend_args("post", dtype, v_bits=32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES)
def test_select_and_gather(rope, dtype):
    query, k_pages, v_pages, table, seqlens, *coded = attend_args(rope, dtype)[:11]
    post_mean = attend_args(rope, dtype)[-1]
    basis, scale, mean, *positions = coded
    outliers = torch.tensor([[[5, 2**31 - 1]] * 2] * 2, dtype=torch.int32)
    args = (query, k_pages, table, seqlens, basis, scale, mean, *positions, 1, 0.125, 9, 8)
    check("select", *args, post_mean, outliers)
    check("select", *args, post_mean, None)
    slots, _ = torch.ops.svdq.select(*args, post_mean, outliers)
    check("gather", k_pages, v_pages.nan_to_num(), table, slots, positions[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_to_gathered(dtype):
    args = attend_args("pre", dtype)
    slots = torch.arange(128, dtype=torch.int32).expand(2, 2, -1).contiguous()
    check("attend", *args[:14], 0, *args[15:], None, None, slots)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype):
    parts = [torch.randn(2, 4, 3, 64).to(dtype), torch.randn(2, 4, 3)]
    check("merge", *parts, *parts)


def test_compiled_graphs_hold_the_operators():
    """One graph without a break, and the same results as without compilation."""
    layout, _, keys, _, fitted, table, _ = setting("post")
    cache, _, _ = make_cache(layout, [70], [4])
    nothing = torch.zeros(1, dtype=torch.int32)

    def step(query, k_pages, keys):
        ops.pack_keys_(k_pages, keys, *fitted, layout, table, 0)
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
    basis, scale, _ = ops.fit_quantizer(keys, mean, components, layout)
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
