"""The packed bytes: pinned, the same wherever they are defined, and read as they were written."""

import pytest
import torch

from support import assert_same, make_k_pages, make_layout, make_v_pages
from svdq import _C, ops, reference
from svdq.layout import FORMAT_VERSION, PAGE_TOKENS, WIDTHS, PageLayout, pages_of
from svdq.ops import KeyCodec

# The first and the last line of a page whose codes follow the formulas below. If they change, pages
# that were saved can no longer be read: then kFormatVersion must change too.
KEY_LINES = {
    8: (
        "00254a6f052d557d0a35608b0f3d6b99144576a7194d81b51e558cc3235d97d1"
        "2865a2df2d6daded3275b8fb377dc3093c85ce17418dd9254695e4334b9def41",
        "f0a55a0ff5ad651dfab5702bffbd7b3904c5864709cd91550ed59c6313dda771"
        "18e5b27f1dedbd8d22f5c89b27fdd3a92c05deb7310de9c53615f4d33b1dffe1",
    ),
    4: (
        "00952abf33c85de266fb9126992ec46acc6208aeff953bd122c87f1555fba259"
        "883fe69dbb6219c0ee955d0411c88048440cc48c773ff7bfaa623bf3dd956e37",
        "44516e7b8895a2bfccd9f704001d3b59446280ae88a6c4e2ccea1937002e5d8c"
        "4473a2d188b7e615ccfb3b6a003f7fbf4484c40488c80848cc0c5d9d004091e2",
    ),
    2: (
        "0055aaffff0055aaaaff55aa55aa00aa00aa00aaff55ff55aa00ff5555ffaa55"
        "00ffaa55ffaa5500aa5555005500000000000000ffffffffaaaaffff5555aaff",
        "0055aaff0055aaff0055ff000055ff5500aa00aa00aa00aa00aa55ff00aa5500"
        "00ffaa5500ffaa5500ffffaa00ffffff000000000000000000005555000055aa",
    ),
    1: (
        "00ff00ff0ff00ff000ffff000ff0f0f0000000000f0f0f0f0000ffff0f0ff00f"
        "00ff00ff0ff00ff000ffff000ff0f0f0000000000f0f0f0f0000ffff0f0ff00f",
    )
    * 2,
}
VALUE_LINES = {
    4: (
        "4095ea4f73c81d72a6fb40a5d92e73d80c51a60b3f84d93e62b70c6195ea3f94"
        "c81d62c7fb4095fa2e73c82d51a6fb5084d92e83b70c51b6ea3f84e91d62b71c",
    )
    * 2,
    2: (
        "50a53a430f50e53efa0f90e9a5fa4f9450a53a430f50e53efa0f90e9a5fa4f94"
        "50a53a430f50e53efa0f90e9a5fa4f9450a53a430f50e53efa0f90e9a5fa4f94",
        "0e50a53af90f50e5a4fa0f9053a5fa4f0e50a53af90f50e5a4fa0f9053a5fa4f"
        "0e50a53af90f50e5a4fa0f9053a5fa4f0e50a53af90f50e5a4fa0f9053a5fa4f",
    ),
}


def golden_key_codes(width: int, num_channels: int) -> torch.Tensor:
    """[64, num_channels] codes behind KEY_LINES."""
    token, channel = torch.arange(PAGE_TOKENS)[:, None], torch.arange(num_channels)
    if width == 8:
        return (37 * channel + 5 * token + 3 * channel * token) % 256
    return (5 * channel + 3 * token + channel * token // 4) % 2**width


def golden_value_codes(width: int, head_dim: int) -> torch.Tensor:
    """[64, head_dim] codes behind VALUE_LINES; a token has every code in a group."""
    token, channel = torch.arange(PAGE_TOKENS)[:, None], torch.arange(head_dim)
    return (3 * channel + 5 * token + token // 7) % 2**width


def one_band(width: int, num_channels: int, head_dim: int) -> PageLayout:
    bands = tuple(num_channels if w == width else 0 for w in WIDTHS)
    return PageLayout(head_dim, (bands,), rope="post", v_group_size=16)


def pack_exact_codes(layout: PageLayout, codes: torch.Tensor, table, slot: int) -> torch.Tensor:
    """Pages with these codes [T, R]: the basis is the identity, keys are codes less the middle."""
    mid = (2.0 ** reference.channel_widths(layout) - 1) / 2
    keys = torch.zeros(1, len(codes), layout.head_dim)
    keys[0, :, : layout.rank] = codes - mid
    basis = torch.eye(layout.head_dim)[: layout.rank].bfloat16()
    k_pages = make_k_pages(layout, int(table.max()) + 1)
    codec = KeyCodec(basis, torch.ones(layout.rank), torch.zeros(1, layout.head_dim))
    ops.pack_keys_(k_pages, keys, codec, layout, table, slot)
    return k_pages


def test_constants():
    assert (FORMAT_VERSION, PAGE_TOKENS, WIDTHS) == (2, 64, (8, 4, 2, 1))
    assert (_C.format.LINE_BYTES, _C.format.MAX_HEAD_DIM) == (64, 512)


@pytest.mark.parametrize("width", WIDTHS)
def test_golden_key_bytes(backend, width):
    num_channels = 4 if width == 8 else 8
    layout = one_band(width, num_channels, 16)
    codes = golden_key_codes(width, num_channels)
    page = pack_exact_codes(layout, codes, torch.zeros(1, dtype=torch.int32), 0)[0]
    lines = page.numpy().tobytes()
    assert (lines[:64].hex(), lines[-64:].hex()) == KEY_LINES[width]


@pytest.mark.parametrize("width", [4, 2])
def test_golden_value_bytes(backend, width):
    layout = make_layout(32, [1], v_bits=width, v_group_size=16)
    values = golden_value_codes(width, 32)[None].float()
    v_pages = make_v_pages(layout, 1)
    ops.pack_values_(v_pages, values, layout, torch.zeros(1, dtype=torch.int32), 0)
    page = v_pages[0].numpy().tobytes()
    groups = 2
    # Codes are the values, so every scale is 1.0 (0x3c00) and every zero point 0.0.
    assert page[: groups * 128] == bytes.fromhex("003c") * 64 * groups
    assert page[groups * 128 : groups * 256] == bytes(groups * 128)
    lines = page[groups * 256 :]
    assert (lines[:64].hex(), lines[-64:].hex()) == VALUE_LINES[width]


@pytest.mark.parametrize("width", WIDTHS)
def test_key_code_addresses(width):
    byte, shift = reference.key_code_addresses(width, 64)
    for token in range(PAGE_TOKENS):
        for channel in range(64):
            expected = int(byte[token, channel]), int(shift[token, channel])
            assert _C.key_code_address(width, channel, token) == expected


@pytest.mark.parametrize("width", [4, 2])
def test_value_code_addresses(width):
    byte, shift = reference.value_code_addresses(width, 80)
    for token in range(PAGE_TOKENS):
        for channel in range(80):
            expected = int(byte[token, channel]), int(shift[token, channel])
            assert _C.value_code_address(width, channel, token) == expected


@pytest.mark.parametrize("width", WIDTHS)
def test_addresses_fill_a_band_without_overlap(width):
    byte, shift = reference.key_code_addresses(width, 24)
    addresses = set(zip(byte.flatten().tolist(), shift.flatten().tolist(), strict=True))
    size = 24 * PAGE_TOKENS * width // 8
    assert addresses == {(b, s) for b in range(size) for s in range(0, 8, width)}


@pytest.mark.parametrize("code", [(3, 0, 0), (8, -1, 0), (8, 0, 64), (8, 512, 0)])
def test_codes_that_do_not_exist(code):
    for find in (_C.key_code_address, _C.value_code_address):
        with pytest.raises(ValueError, match="no code"):
            find(*code)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_code_survives_a_round_trip(backend, width):
    layout = one_band(width, 32, 64)
    num_tokens, slot = 256, 37
    # Every code in every channel; its neighbours differ, so that a leak shows.
    codes = (torch.arange(num_tokens)[:, None] * 7 + torch.arange(32) * 3) % 2**width
    table = torch.randperm(pages_of(slot + num_tokens), dtype=torch.int32)
    k_pages = pack_exact_codes(layout, codes, table, slot)
    assert_same(ops.unpack_codes(k_pages, layout, table, slot, num_tokens), codes.byte())
    assert_same(reference.unpack_codes(k_pages, layout, table, slot, num_tokens), codes.byte())


def test_mixed_bands_lie_widest_first():
    layout = PageLayout(32, ((4, 8, 4, 8), (0, 4, 0, 8)), rope="pre", v_group_size=32)
    assert layout.k_page_bytes == 8 * (4 * 8 + 8 * 4 + 4 * 2 + 8) + 8 * (4 * 4 + 8)
    k_pages = torch.zeros(1, layout.k_page_bytes, dtype=torch.uint8)
    k_pages[0, :256] = 1  # the 8-bit band
    k_pages[0, 256:512] = 0x22  # the 4-bit band
    k_pages[0, 640:768] = 0x33  # the second head's 4-bit band, behind 64 bytes each of 2 and 1 bits
    codes = ops.unpack_codes(k_pages, layout, torch.zeros(1, dtype=torch.int32), 0, PAGE_TOKENS)
    expected = torch.tensor([1] * 4 + [2] * 8 + [0] * 12 + [3] * 4 + [0] * 8, dtype=torch.uint8)
    assert_same(codes, expected.expand(PAGE_TOKENS, -1))


def test_a_heads_pre_channels_lie_before_its_post_channels():
    bands, pre_bands = ((0, 4, 0, 0), (0, 0, 0, 8)), ((4, 0, 0, 8), (0, 0, 0, 0))
    layout = PageLayout(32, bands, "hybrid", v_group_size=32, pre_bands=pre_bands)
    assert layout.k_page_bytes == 8 * (4 * 8 + 8) + 8 * 4 * 4 + 8 * 8
    k_pages = torch.zeros(1, layout.k_page_bytes, dtype=torch.uint8)
    k_pages[0, :256] = 1  # the first head's 8-bit pre-RoPE band
    k_pages[0, 320:448] = 0x22  # its 4-bit post-RoPE band, behind 64 bytes of 1 bit
    k_pages[0, 448:] = 0xFF  # the second head has post-RoPE channels alone
    codes = ops.unpack_codes(k_pages, layout, torch.zeros(1, dtype=torch.int32), 0, PAGE_TOKENS)
    expected = torch.tensor([1] * 4 + [0] * 8 + [2] * 4 + [1] * 8, dtype=torch.uint8)
    assert_same(codes, expected.expand(PAGE_TOKENS, -1))
    assert_same(
        reference.unpack_codes(k_pages, layout, torch.zeros(1, dtype=torch.int32), 0, PAGE_TOKENS),
        codes,
    )


@pytest.mark.parametrize(
    ("v_bits", "group", "expected"),
    [
        (4, 64, 3 * (2 * 64 * 4 + 128 * 64 // 2)),
        (2, 128, 3 * (64 * 4 + 128 * 64 // 4)),
        (16, 64, 3 * 128 * 64 * 2),
        (32, 16, 3 * 128 * 64 * 4),
    ],
)
def test_value_page_bytes(v_bits, group, expected):
    layout = make_layout(128, [1], num_heads=3, v_bits=v_bits, v_group_size=group)
    assert layout.v_page_bytes == expected
