"""The packed bytes: pinned, the same wherever they are defined, and read as they were written."""

import pytest
import torch

from support import assert_same, make_k_pages, make_layout
from svdq import _C, ops, reference
from svdq.layout import (
    FORMAT_VERSION,
    NO_SLOT,
    PAGE_TOKENS,
    ROPE_MODES,
    WIDTHS,
    PageLayout,
    pages_of,
)
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
VALUE_PAGES = {  # scales, first and last line of codes
    4: (
        "8180818181818181818181818181818181818180818182818181818181818181"
        "8181808181818181818181808181818081828181818182818181818081818181",
        "d53763c45859a45b4a67979c856969b7bb9a834874946c6a981556cc37534a7f"
        "aa97676697c405a48587a9793995996b897a876ac86835b7ca964839d40e79a3",
        "0b53b47f1774caab3563be9d4869815ac4671bb2b9a776862855a83d4486a759"
        "a3983b858767a55875955e965c47933b9cbd7448a87e9a74778648b75a55b99b",
    ),
    3: (
        "888888898889898989888888898988898989898889888a898989888889888889"
        "898989898988898989898988898889888a89898989898a898889898889898888",
        "0a371df928682609790f932262ac5ce765112118ee322e1de0d2ebeac719093f"
        "a5b3ffcff3eac2262283c42c84d240fdc0adc31d98ccf6c7490218d41d433c35",
        "4708a56a3a0fe1de171feaf54d759c47972f5088f48239a5573ff47427a0b85d"
        "82e877bd863bb06e239176ae7a3e9348fbd52043f478e904068c73a07f12c3f9",
    ),
    2: (
        "908f8f8f8f908f8f908e8e8e8e9090908f8e908f8f909190908f908f8f908f90"
        "91908e8d8f908d919090908d8e919090909190909090928f908e908d90908f8e",
        "ad91b45cb6f6882716a5f99b1946a67ddfaa98a2749997364a61557f61842297"
        "1ad97565f95c618989e96a0662e92a576af669862e46516deea902c28c239698",
        "3545c9791a45e9b61642f9bf246e8764d75836c5ef955b99265aaa3a19999a66"
        "81a93b9a945a9a6958967b9c7a5e8235bab74824aa7fa94151952bd96a56e5ba",
    ),
}


def golden_key_codes(width: int, num_channels: int) -> torch.Tensor:
    """[64, num_channels] codes behind KEY_LINES."""
    token, channel = torch.arange(PAGE_TOKENS)[:, None], torch.arange(num_channels)
    if width == 8:
        return (37 * channel + 5 * token + 3 * channel * token) % 256
    return (5 * channel + 3 * token + channel * token // 4) % 2**width


def golden_values() -> torch.Tensor:
    """[64, 32] values behind VALUE_PAGES: whole numbers with an odd sum in every token.

    Their sums with signs are odd too, so no rotated number is 0, which lies between codes.
    """
    token, channel = torch.arange(PAGE_TOKENS)[:, None], torch.arange(32)
    values = (3 * channel + 5 * token + channel * token // 7) % 23 - 11
    values[:, 0] += 1 - values.sum(1) % 2
    return values.float()


def one_band(width: int, num_channels: int, head_dim: int) -> PageLayout:
    bands = tuple(num_channels if w == width else 0 for w in WIDTHS)
    return PageLayout(head_dim, (bands,), rope="post")


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
    assert (FORMAT_VERSION, PAGE_TOKENS, WIDTHS) == (3, 64, (8, 4, 2, 1))
    assert (_C.format.LINE_BYTES, _C.format.MAX_HEAD_DIM) == (64, 512)
    assert (ROPE_MODES, NO_SLOT) == (("pre", "post", "hybrid"), 2**31 - 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_band_bytes(width):
    assert _C.format.band_bytes(width, 24) == 24 * PAGE_TOKENS * width // 8
    with pytest.raises(ValueError, match="no code has width 3"):
        _C.format.band_bytes(3, 8)


@pytest.mark.parametrize(
    ("channels", "bits"),
    [(4, 32 + 32 + 8), (8, 48 + 48 + 8 + 8), (16, 48 + 32 + 48 + 8 + 8 + 8)],
)
def test_proxy_channels_are_read_by_whole_lines(channels, bits):
    """Heads with pre-RoPE and post-RoPE channels, and one of 4 channels of 2 and 8 of 1 bit."""
    pre, none = (4, 4, 0, 0), (0, 0, 0, 0)
    bands = ((0, 8, 0, 0), (0, 0, 0, 16), (0, 0, 4, 8))
    layout = PageLayout(64, bands, "hybrid", pre_bands=(pre, pre, none))
    assert layout.proxy_page_bytes(channels) == bits * PAGE_TOKENS // 8


@pytest.mark.parametrize("width", WIDTHS)
def test_golden_key_bytes(backend, width):
    num_channels = 4 if width == 8 else 8
    layout = one_band(width, num_channels, 16)
    codes = golden_key_codes(width, num_channels)
    page = pack_exact_codes(layout, codes, torch.zeros(1, dtype=torch.int32), 0)[0]
    lines = page.numpy().tobytes()
    assert (lines[:64].hex(), lines[-64:].hex()) == KEY_LINES[width]


@pytest.mark.parametrize("v_bits", [4, 3, 2])
def test_golden_value_bytes(backend, v_bits):
    """No code of these values is near a tie, so that the order of sums does not matter."""
    layout = make_layout(32, [1], v_bits=v_bits)
    v_pages = torch.zeros(1, layout.v_page_bytes, dtype=torch.uint8)
    table = torch.zeros(1, dtype=torch.int32)
    ops.pack_values_(v_pages, golden_values()[None], layout, table, 0)
    page = v_pages[0].numpy().tobytes()
    assert len(page) == 64 + 32 * 64 * v_bits // 8
    assert (page[:64].hex(), page[64:128].hex(), page[-64:].hex()) == VALUE_PAGES[v_bits]


@pytest.mark.parametrize("width", WIDTHS)
def test_key_code_addresses(width):
    byte, shift = reference.key_code_addresses(width, 64)
    for token in range(PAGE_TOKENS):
        for channel in range(64):
            expected = int(byte[token, channel]), int(shift[token, channel])
            assert _C.key_code_address(width, channel, token) == expected


@pytest.mark.parametrize("width", [4, 2, 1])
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
    layout = PageLayout(32, ((4, 8, 4, 8), (0, 4, 0, 8)), rope="pre")
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
    layout = PageLayout(32, bands, "hybrid", pre_bands=pre_bands)
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
    ("v_bits", "expected"),
    [
        (4, 3 * (64 + 128 * 64 // 2)),
        (3, 3 * (64 + 128 * 64 * 3 // 8)),
        (2, 3 * (64 + 128 * 64 // 4)),
        ((4, 3, 2), 3 * 64 + 128 * 64 * 9 // 8),
        (16, 3 * 128 * 64 * 2),
        (32, 3 * 128 * 64 * 4),
    ],
)
def test_value_page_bytes(v_bits, expected):
    layout = make_layout(128, [1], num_heads=3, v_bits=v_bits)
    assert layout.v_page_bytes == expected
