"""Every wrong argument: one exception that names operator and argument, and nothing is changed."""

import pytest
import torch

from refusals import Bits, call, check_refusal, spoiled, strided, with_int
from support import make_cache, make_inv_freq, make_k_pages, make_keys, make_layout, make_v_pages
from svdq import reference

NAN, INF = float("nan"), float("inf")
INT = torch.int32


POST, PRE = make_layout(64, [4, 2], 2, "post"), make_layout(64, [4, 2], 2, "pre")
HYBRID = make_layout(64, [4, 2], 2, "hybrid")
FULL = make_layout(64, [4, 2], 2, "post", v_bits=16)
KEYS = make_keys(2, 70, 64)
ANGLES = make_inv_freq(64)
TABLE = torch.tensor([1, 0], dtype=INT)
BASED = dict(zip(("mean", "components"), reference.fit_basis(KEYS), strict=False))
FITTED = reference.fit_quantizer(KEYS, *BASED.values(), POST).flat()
HYBRID_FITTED = reference.fit_keys(KEYS, HYBRID, ANGLES).flat()
del HYBRID_FITTED["post_mean"]  # residual_keys takes none


def cache_args():
    cache, _, _ = make_cache(POST, [130, 70], [5, 9])
    return {"query": torch.randn(2, 4, 2, 64), **cache.flat(), "layout": POST}


# Operator -> arguments that are right.
RIGHT = {
    "fit_basis": lambda: {"keys": KEYS, "inv_freq": None, "position": 0},
    "allocate_bits": lambda: {"variance": torch.rand(2, 64), "schedule": [4, 2]},
    "fit_quantizer": lambda: {"keys": KEYS, **BASED, "layout": POST, "inv_freq": None},
    "pack_keys_": lambda: {
        "k_pages": make_k_pages(POST, 2), "keys": KEYS, **FITTED, "layout": POST,
        "page_table": TABLE, "slot": 3,
    },
    "residual_keys": lambda: {
        "keys": KEYS, **HYBRID_FITTED, "layout": HYBRID, "position": 0,
    },
    "pack_values_": lambda: {
        "v_pages": make_v_pages(POST, 2), "values": KEYS, "layout": POST, "page_table": TABLE,
        "slot": 3,
    },
    "unpack_codes": lambda: {
        "k_pages": make_k_pages(POST, 2), "layout": POST, "page_table": TABLE, "slot": 3,
        "num_tokens": 70,
    },
    "unpack_keys": lambda: {
        "k_pages": make_k_pages(POST, 2), **FITTED, "layout": POST, "page_table": TABLE, "slot": 3,
        "num_tokens": 70,
    },
    "unpack_values": lambda: {
        "v_pages": make_v_pages(POST, 2), "layout": POST, "page_table": TABLE, "slot": 3,
        "num_tokens": 70,
    },
    "append_window_": lambda: {
        "window_keys": torch.randn(2, 80, 64), "window_values": torch.randn(2, 80, 64),
        "keys": KEYS, "values": KEYS + 1, "start": 3,
    },
    "attend": cache_args,
    "merge": lambda: {
        "out_a": torch.randn(1, 4, 2, 64), "lse_a": torch.randn(1, 4, 2),
        "out_b": torch.randn(1, 4, 2, 64), "lse_b": torch.randn(1, 4, 2),
    },
}  # fmt: skip

# Name of the fault, the wrong value or a function from the right one, and words of the message in
# addition to the names of operator and argument.
WRONG_KEYS = [
    ("one-head-more", lambda x: torch.cat([x, x[:1]]), r"\[3, 70, 64\]"),
    ("one-dimension-less", lambda x: x[0], r"\[70, 64\]"),
    ("double", lambda x: x.double(), "Double"),
    ("integers", lambda x: x.to(torch.int8), "Char"),
    ("strided", strided, "contiguous"),
    ("nan", lambda x: spoiled(x, NAN), "finite"),
    ("infinite", lambda x: spoiled(x, -INF), "finite"),
]
WRONG_TABLES = [
    ("page-past-the-pool", spoiled(TABLE, 2), "2"),
    ("negative-page", spoiled(TABLE, -1), "-1"),
    ("too-short", TABLE[:1], "64"),
    ("long-integers", TABLE.long(), "Long"),
    ("two-dimensions", TABLE[None], r"\[1, 2\]"),
    ("strided", torch.stack([TABLE, TABLE], 1)[:, 0], "contiguous"),
]
WRONG_SLOTS = [
    ("negative", -1, "-1"),
    ("past-the-table", 60, "page_table"),
    ("past-all-integers", 2**63 - 1, ""),
]
WRONG_LAYOUTS = [
    ("other-version", with_int(POST, 0, 1), "version 1"),
    ("other-heads", make_layout(64, [4, 2], 3, "post"), ""),
    ("other-head-dim", make_layout(128, [4, 2], 2, "post"), ""),
    ("no-layout", Bits([]), "integers"),
]
WRONG_MATRICES = [
    ("other-shape", lambda x: x[1:], r"\["),
    ("other-dtype", lambda x: x.half(), "Half"),
    ("strided", strided, "contiguous"),
]
WRONG_K_POOLS = [
    ("other-page-size", lambda x: x[:, :-64].contiguous(), str(POST.k_page_bytes)),
    ("signed", lambda x: x.to(torch.int8), "Char"),
    ("strided", strided, "contiguous"),
]
WRONG_V_POOLS = [
    ("other-page-size", lambda x: x[:, :-64].contiguous(), str(POST.v_page_bytes)),
    ("floats", lambda x: x.float(), "Float"),
    ("strided", strided, "contiguous"),
]
WRONG_ROPES = [("not-needed", ANGLES, "None")]
WRONG_POST_MEANS = [("not-needed", torch.zeros(2, 64), "None")]

WRONG = {
    ("fit_basis", "keys"): WRONG_KEYS[1:]
    + [
        ("no-tokens", torch.empty(2, 0, 64), "token"),
        ("no-heads", torch.empty(0, 5, 64), "head"),
        ("head-dim-72", torch.randn(2, 70, 72), "72"),
        ("head-dim-528", torch.randn(2, 70, 528), "528"),
    ],
    ("fit_basis", "inv_freq"): [
        ("too-many", make_inv_freq(80), "40"),
        ("double", ANGLES.double(), "Double"),
        ("a-row", ANGLES[None], r"\[1, 32\]"),
        ("strided", make_inv_freq(128)[::2], "contiguous"),
    ],
    ("allocate_bits", "variance"): [
        ("one-dimension", torch.rand(64), r"\[64\]"),
        ("half", torch.rand(2, 64).half(), "Half"),
    ],
    ("allocate_bits", "schedule"): [
        ("too-long", [1] * 65, "65"),
        ("increasing", [2, 4], "increase"),
        ("no-width", [5, 0], "5"),
    ],
    ("fit_quantizer", "keys"): [*WRONG_KEYS, ("no-tokens", torch.empty(2, 0, 64), "token")],
    ("fit_quantizer", "mean"): WRONG_MATRICES,
    ("fit_quantizer", "components"): WRONG_MATRICES,
    ("fit_quantizer", "inv_freq"): WRONG_ROPES,
    ("fit_quantizer", "layout"): [("hybrid", HYBRID, "one space"), *WRONG_LAYOUTS],
    ("pack_keys_", "k_pages"): WRONG_K_POOLS,
    ("pack_keys_", "keys"): WRONG_KEYS,
    ("pack_keys_", "basis"): WRONG_MATRICES,
    ("pack_keys_", "scale"): WRONG_MATRICES,
    ("pack_keys_", "mean"): WRONG_MATRICES,
    ("pack_keys_", "layout"): WRONG_LAYOUTS,
    ("pack_keys_", "page_table"): WRONG_TABLES,
    ("pack_keys_", "slot"): WRONG_SLOTS,
    ("pack_keys_", "inv_freq"): WRONG_ROPES,
    ("pack_keys_", "post_mean"): WRONG_POST_MEANS,
    ("residual_keys", "keys"): WRONG_KEYS,
    ("residual_keys", "basis"): WRONG_MATRICES,
    ("residual_keys", "scale"): WRONG_MATRICES,
    ("residual_keys", "mean"): WRONG_MATRICES,
    ("residual_keys", "layout"): [("post", POST, "hybrid"), *WRONG_LAYOUTS],
    ("pack_values_", "v_pages"): WRONG_V_POOLS,
    ("pack_values_", "values"): [*WRONG_KEYS, ("too-large", lambda x: spoiled(x, 7e4), "65504")],
    ("pack_values_", "layout"): WRONG_LAYOUTS,
    ("pack_values_", "page_table"): WRONG_TABLES,
    ("pack_values_", "slot"): WRONG_SLOTS,
    ("unpack_codes", "k_pages"): WRONG_K_POOLS,
    ("unpack_codes", "layout"): WRONG_LAYOUTS[:1] + WRONG_LAYOUTS[3:],
    ("unpack_codes", "page_table"): WRONG_TABLES,
    ("unpack_codes", "slot"): WRONG_SLOTS,
    ("unpack_codes", "num_tokens"): [("negative", -1, "-1"), ("past-all-integers", 2**63 - 1, "")],
    ("unpack_keys", "k_pages"): WRONG_K_POOLS,
    ("unpack_keys", "basis"): WRONG_MATRICES,
    ("unpack_keys", "scale"): WRONG_MATRICES,
    ("unpack_keys", "mean"): WRONG_MATRICES,
    ("unpack_keys", "page_table"): WRONG_TABLES,
    ("unpack_keys", "num_tokens"): [("negative", -1, "-1")],
    ("unpack_keys", "inv_freq"): WRONG_ROPES,
    ("unpack_keys", "post_mean"): WRONG_POST_MEANS,
    ("unpack_values", "v_pages"): WRONG_V_POOLS,
    ("unpack_values", "page_table"): WRONG_TABLES,
    ("unpack_values", "num_tokens"): [("negative", -1, "-1")],
    ("append_window_", "keys"): WRONG_KEYS,
    ("append_window_", "values"): WRONG_KEYS
    + [("half", lambda x: x.half(), "Half"), ("fewer-tokens", lambda x: x[:, 1:], "69")],
    ("append_window_", "window_values"): [
        ("fewer-rows", lambda x: x[:, 1:], "79"),
        ("strided", strided, "contiguous"),
    ],
    ("append_window_", "start"): [
        ("negative", -1, "-1"),
        ("too-late", 11, "11"),
        ("past-all-integers", 2**63 - 1, ""),
    ],
    ("attend", "query"): [
        ("heads-that-do-not-divide", lambda x: x[:, :3], "3"),
        ("no-heads", lambda x: x[:, :0], "0"),
        ("other-head-dim", lambda x: x[..., :32], r"\["),
        ("one-dimension-less", lambda x: x[0], r"\["),
        ("double", lambda x: x.double(), "Double"),
    ],
    ("attend", "k_pages"): WRONG_K_POOLS,
    ("attend", "v_pages"): WRONG_V_POOLS,
    ("attend", "page_table"): [
        ("one-sequence", lambda x: x[:1].contiguous(), r"\[1, 3\]"),
        ("page-past-the-pool", lambda x: x + 100, "10"),
        ("negative-page", lambda x: x - 100, "-"),
        ("long-integers", lambda x: x.long(), "Long"),
        ("strided", strided, "contiguous"),
    ],
    ("attend", "cache_seqlens"): [
        ("past-the-table", torch.tensor([193, 70], dtype=INT), "193"),
        ("negative", torch.tensor([130, -1], dtype=INT), "-1"),
        ("long-integers", lambda x: x.long(), "Long"),
        ("one-sequence", lambda x: x[:1], r"\[1\]"),
    ],
    ("attend", "basis"): WRONG_MATRICES,
    ("attend", "scale"): WRONG_MATRICES,
    ("attend", "mean"): WRONG_MATRICES,
    ("attend", "layout"): WRONG_LAYOUTS,
    ("attend", "window_keys"): [
        ("one-head", lambda x: x[:, :1], r"\["),
        ("strided", strided, "contiguous"),
        ("rows-apart", lambda x: x.repeat_interleave(2, 2)[:, :, ::2], "contiguous"),
    ],
    ("attend", "window_values"): [
        ("half", lambda x: x.half(), "Half"),
        ("fewer-rows", lambda x: x[:, :, 1:], ""),
    ],
    ("attend", "window_lens"): [
        ("past-the-rows", torch.tensor([5, 13], dtype=INT), "13"),
        ("negative", torch.tensor([5, -1], dtype=INT), "-1"),
        ("floats", torch.tensor([5.0, 9.0]), "Float"),
    ],
    ("attend", "first_position"): [
        ("long-integers", torch.zeros(2, dtype=torch.int64), "Long"),
        ("one-sequence", torch.zeros(1, dtype=INT), r"\[1\]"),
    ],
    ("attend", "sink_tokens"): [("negative", -1, "-1"), ("huge", 2**40, "")],
    ("attend", "sm_scale"): [("nan", NAN, "finite"), ("infinite", INF, "finite")],
    ("attend", "inv_freq"): WRONG_ROPES,
    ("attend", "post_mean"): WRONG_POST_MEANS,
    ("merge", "out_a"): [
        ("three-dimensions", lambda x: x[0], r"\["),
        ("double", lambda x: x.double(), "Double"),
    ],
    ("merge", "out_b"): [
        ("other-shape", lambda x: x[:, 1:], r"\["),
        ("half", lambda x: x.half(), "Half"),
    ],
    ("merge", "lse_a"): [
        ("other-shape", lambda x: x[:, 1:], r"\["),
        ("half", lambda x: x.half(), "Half"),
    ],
    ("merge", "lse_b"): [
        ("a-dimension-more", lambda x: x[..., None], r"\["),
        ("half", lambda x: x.half(), "Half"),
    ],
}

CASES = {
    f"{op}-{name}-{what}": (op, name, wrong, message)
    for (op, name), cases in WRONG.items()
    for what, wrong, message in cases
}


@pytest.mark.parametrize("op", RIGHT)
def test_right_arguments_are_taken(op):
    call(op, RIGHT[op]())


@pytest.mark.parametrize(("op", "name", "wrong", "message"), CASES.values(), ids=CASES)
def test_wrong_argument(op, name, wrong, message):
    args = RIGHT[op]()
    args[name] = wrong(args[name]) if callable(wrong) else wrong
    # Where the layout is of another size, it is a tensor that does not fit.
    named = [name] if name != "layout" or message else []
    check_refusal(op, args, *named, message)


@pytest.mark.parametrize("op", ["fit_quantizer", "pack_keys_", "unpack_keys", "attend"])
def test_frequencies_that_rope_needs(op):
    args = {**RIGHT[op](), "layout": PRE}
    check_refusal(op, args, "inv_freq", "needed")
    check_refusal(op, {**args, "inv_freq": make_inv_freq(66)}, "inv_freq", "33")


def tensor_names(op):
    return [name for name, x in RIGHT[op]().items() if isinstance(x, torch.Tensor)]


ARGUMENTS = [(op, name) for op in RIGHT for name in tensor_names(op)]


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_tensors_that_are_not_dense(op, name):
    args = RIGHT[op]()
    check_refusal(op, {**args, name: args[name].to_sparse()}, "[Ss]parse")


# Operators with one tensor and the page table, which lies on the CPU whatever the device.
ALONE = [("unpack_codes", "k_pages"), ("unpack_values", "v_pages")]


@pytest.mark.parametrize(
    ("op", "name"),
    [at for at in ARGUMENTS if at[0] not in ("fit_basis", "allocate_bits") and at not in ALONE],
)
def test_tensors_on_different_devices(op, name):
    args = RIGHT[op]()
    check_refusal(op, {**args, name: args[name].to("meta")}, "meta")


def test_full_values_of_another_dtype():
    args = {"values": KEYS, "layout": FULL, "page_table": TABLE, "slot": 3}
    v_pages = make_v_pages(FULL, 2, torch.float16)
    check_refusal("pack_values_", {"v_pages": v_pages, **args}, "values", "Half", "Float")
    check_refusal("pack_values_", {"v_pages": v_pages.float(), **args}, "v_pages", "16 bits")
    in_bytes = make_v_pages(POST, 2)
    check_refusal("pack_values_", {"v_pages": in_bytes, **args}, "v_pages", "Byte")


def test_pools_with_too_few_pages():
    args = RIGHT["attend"]()
    for pool in ("k_pages", "v_pages"):
        check_refusal("attend", {**args, pool: args[pool][:1]}, "page_table", "1 pages")
