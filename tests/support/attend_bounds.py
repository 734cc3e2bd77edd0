"""Reference results of attend and bounds on a backend's errors, derived from its arithmetic.

The CPU backends multiply integer codes with integer weights of the folded query, q'_j ~ scale *
int8, one scale a query row: its largest weight / 127, and 1 / 254 of that for 8-bit bands, which
have a second term. A weight is a channel of the absorbed query times the channel's scale (post-RoPE
channels), or an element of the scaled basis, one row per key channel (pre-RoPE channels). Rounding
weights moves the score of token t by ``sum_j (code_tj - mid_j) * delta_j`` with every delta_j
spread evenly over +-scale_j / 2, so of variance scale_j^2 / 12. All other arithmetic except that on
probabilities is float32, with unit roundoff 2^-24, whose rounding errors add up like a random walk.
The bounds take SIGMAS deviations of both: about one score in 10^9 lies outside.

Where a KV head has few query rows, slow RoPE pairs of pre-RoPE channels are absorbed page by page
(csrc/core/absorb.h): a page has three rows of such weights, whose products are multiplied by
Chebyshev's T_0, T_1, T_2 at the token's offset in the page. Before they are rounded, weights are
sums over pairs of numbers rounded to 16 bits; the part of a pair that the three degrees leave out
is bounded by its frequency.

With scores off by e_t, a probability changes by a factor within exp(+-(e_t + m)), where
m = log(sum_t p_t exp(e_t)) bounds how far the log-sum-exp moves. As probabilities still add up to
1, outputs move by at most ``sum_t p_t (exp(e_t + m) - 1) |v_t - out|``.

Probabilities times the scales of packed values are cut to 1/255 of the largest on a page, after a
number spread evenly over such a step is added, and multiply codes less the middle one: a variance
of at most step^2 / 4 each.

The CUDA kernels, and so the backend that emulates them, give tensor cores halves: weights, rounded
to 11 bits where a row's largest is 256; with pre-RoPE channels also the reconstructed keys and the
queries; and probabilities times scales, where a page's largest is at least 2^13. Where a KV head
has up to 8 query rows, the probabilities themselves are halves before that, relative to their
page's largest. A half's error is spread evenly over +-2^-11 of the number, or +-2^-25 below the
smallest normal half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cuda_support import runs_on_cuda
from support import FLOAT_ERROR, ROUNDING, Cache
from svdq import _C, reference
from svdq.layout import PAGE_TOKENS

SIGMAS = 6
EXP2_ERROR = 1e-6  # relative error of the backends' 2^x
TANH_ERROR = 2e-6  # relative, with the roundings of its argument and its result
PROBABILITY_STEPS = 255
HALF_TURN = (PAGE_TOKENS - 1) / 2  # from a page's middle to its ends
HALF_VARIANCE = 2.0**-20 / 12  # of a rounded half, as a share of its square
TINY_HALF_VARIANCE = 2.0**-48 / 12


def uses_halves() -> bool:
    """True if the backend in use computes like the CUDA kernels."""
    return runs_on_cuda() or _C.backend() == "emulated"


@dataclass
class Expected:
    """Reference results in float64 and the bounds on a backend's errors, all [B, Hq, L(, D)]."""

    out: Tensor
    lse: Tensor
    out_error: Tensor
    lse_error: Tensor


def weight_variances(weights: Tensor, widths: Tensor) -> Tensor:
    """Variance of the rounding error of weights [..., r]: integers with one scale per width."""
    if uses_halves() and weights.shape[-1]:
        tiny = (weights.abs().amax(-1, keepdim=True) / 256).square() * TINY_HALF_VARIANCE
        return weights.square() * HALF_VARIANCE + tiny
    if weights.shape[-1] == 0:
        return torch.zeros_like(weights)
    step = weights.abs().amax(-1, keepdim=True) / 127
    return (step / torch.where(widths == 8, 254.0, 1.0)).square() / 12


def absorbs(cache: Cache, query: Tensor) -> bool:
    """True if slow pairs of pre-RoPE channels are absorbed into query [g, L, D]."""
    rows = query.shape[0] * query.shape[1]
    return not uses_halves() and cache.token_slots is None and rows <= _C.ABSORB_ROWS


def slow_pairs(cache: Cache) -> Tensor:
    """Mask [half] of the slow pairs."""
    if cache.inv_freq is None:
        return torch.zeros(0, dtype=torch.bool)
    return cache.inv_freq <= _C.ABSORBED_FASTEST


def slow_channels(cache: Cache) -> Tensor:
    """Mask [D] of the channels of slow pairs and of those that do not rotate."""
    slow = slow_pairs(cache)
    rest = torch.ones(cache.layout.head_dim - 2 * len(slow), dtype=torch.bool)
    return torch.cat([slow, slow, rest])


def absorbed_errors(
    cache: Cache,
    query: Tensor,
    mean: Tensor,
    rows: Tensor,
    widths: Tensor,
    latent: Tensor,
    position: int,
) -> tuple[Tensor, Tensor]:
    """Variance and bound [g, L, n] of the score errors of one head from absorbing slow pairs.

    ``query`` [g, L, D], ``mean`` [D] before RoPE, ``rows`` [r, D] the scaled basis of channels of
    ``widths`` [r], ``latent`` [n, r] codes less the middle ones, ``position`` that of the first
    token, which lies in the slot after the sinks.
    """
    slow = slow_pairs(cache)
    half, slot = len(slow), cache.sink_tokens
    frequency = cache.inv_freq.double()[slow]

    def pairs(x: Tensor) -> Tensor:
        return torch.complex(x[..., :half][..., slow], x[..., half : 2 * half][..., slow])

    shares = torch.tensor([_C.absorbed_error(f) for f in frequency.tolist()])
    mean_shares = torch.tensor([_C.absorbed_mean_error(f) for f in frequency.tolist()])
    left_out = pairs(query).abs() @ (shares * pairs(latent @ rows).abs()).T
    left_out += pairs(query).abs() @ (mean_shares * pairs(mean).abs())[:, None]
    # Weights of the pages, by degree: [pages, g, L, r].
    a = HALF_TURN * frequency
    slots = slot + torch.arange(len(latent))
    pages = torch.arange(int(slots[-1]) // PAGE_TOKENS + 1)
    middles = position - slot + PAGE_TOKENS * pages + HALF_TURN
    rotations = torch.polar(torch.ones(1).double(), middles[:, None] * frequency)
    products = pairs(query).conj()[..., None, :] * pairs(rows)  # [g, L, r, slow]
    fixed = query[..., 2 * half :] @ rows[:, 2 * half :].T
    bessel = (torch.ones_like(a), a, a.square() / 4)
    offsets = (slots % PAGE_TOKENS - HALF_TURN) / HALF_TURN
    chebyshev = (torch.ones_like(offsets), offsets, 2 * offsets.square() - 1)
    largest = products.abs().sum(-1) + fixed.abs()
    rounding = ((len(a) / 12) ** 0.5 / 2**16 + 2.0**-15) * largest  # of 16-bit numbers
    variance = torch.zeros_like(left_out)
    for degree in range(3):
        rotated = torch.einsum("glri,pi->pglr", products, rotations * bessel[degree])
        weights = torch.view_as_real(rotated)[..., degree % 2] + (fixed if degree == 0 else 0)
        each = weight_variances(weights, widths) + rounding.square()  # [pages, g, L, r]
        each = each[slots // PAGE_TOKENS]  # [n, g, L, r]
        moved = torch.einsum("nglr,nr->gln", each, latent.square())
        variance += moved * chebyshev[degree].square()
    return variance, left_out


def product_variance(cache: Cache, query: Tensor, keys: Tensor) -> Tensor:
    """Variance [g, L, n] of query . keys, [g, L, D] and [n, D], from rounding both to halves.

    They are rounded in a frame that is rotated, pair by pair, which keeps the lengths of pairs.
    """
    half = 0 if cache.inv_freq is None else len(cache.inv_freq)

    def squares(x: Tensor) -> Tensor:
        pairs = x[..., :half].square() + x[..., half : 2 * half].square()
        return torch.cat([pairs, x[..., 2 * half :].square()], dim=-1)

    variance = 2 * HALF_VARIANCE * squares(query) @ squares(keys).T
    scaled = (cache.sm_scale * 1.4427) ** -2  # queries are rounded in units of log2
    return variance + TINY_HALF_VARIANCE * (
        query.square().sum(-1)[..., None] + scaled * keys.square().sum(-1)
    )


def score_errors(cache: Cache, b: int, h: int, query: Tensor, codes: Tensor) -> Tensor:
    """Bound on the errors of packed scores [g, L, n] for query [g, L, D] and codes [n, R]."""
    layout = cache.layout
    pre, post = (slices[h] for slices in reference.part_slices(layout))
    every_width = reference.channel_widths(layout)
    variance = torch.zeros(*query.shape[:-1], len(codes), dtype=torch.float64)
    magnitude = torch.zeros(layout.head_dim, dtype=torch.float64)
    left_out = torch.zeros_like(variance)
    for part in (pre, post):
        is_post = part is post
        if layout.rope == ("pre" if is_post else "post"):
            continue
        widths, scale = every_width[part], cache.scale[b, part].double()
        basis, top = cache.basis[b, part].double(), 2.0**widths - 1
        latent = codes[:, part] - top / 2
        mean = cache.post_mean if is_post and layout.rope == "hybrid" else cache.mean
        mean = mean[b, h].double()
        # Terms of sums in float32 are no larger than these.
        magnitude += mean.abs() + (scale * top) @ basis.abs()
        if is_post:
            weights = (query @ basis.T) * scale
            variance += weight_variances(weights, widths) @ latent.square().T
            continue
        key_variance = latent.square() @ weight_variances(basis.T * scale, widths).T  # [n, D]
        keys = mean + (latent * scale) @ basis
        first = int(cache.first_position[b]) if cache.first_position is not None else 0
        positions = first + cache.sink_tokens + torch.arange(len(codes))
        if cache.token_slots is not None:
            positions = first + cache.token_slots[b, h, : len(codes)].long()
        every = query[..., None, :].expand(*query.shape[:-1], len(codes), -1)
        unrotated = reference.rotate(every, positions, cache.inv_freq, inverse=True)
        if absorbs(cache, query) and len(codes):
            key_variance[:, slow_channels(cache)] = 0
            rows = basis * scale[:, None]
            moved, left_out = absorbed_errors(
                cache, query, mean, rows, widths, latent, int(positions[0])
            )
            variance += moved
        variance += torch.einsum("gltd,td->glt", unrotated.square(), key_variance)
        if uses_halves():
            keys = reference.rotate(keys, positions, cache.inv_freq)
            variance += product_variance(cache, query, keys)
    # Sums over D and over the channels, and some twenty more roundings for scales, offsets and
    # rotations.
    channels = pre.stop - pre.start + post.stop - post.start
    parts = 2 if layout.rope == "hybrid" else 1
    roundings = (parts * (2 * layout.head_dim + 20) + channels) ** 0.5
    rounding = roundings * FLOAT_ERROR * query.norm(dim=-1) * magnitude.norm()
    return (left_out + SIGMAS * (variance.sqrt() + rounding[..., None])) * cache.sm_scale


def value_errors(cache: Cache, b: int, h: int, p: Tensor) -> Tensor:
    """Bound on the errors of outputs from rounding probabilities p [g, L, n] of packed slots."""
    layout = cache.layout
    skip = reference.skipped_slots(cache.packed)
    slots = skip + p.shape[-1]
    total = torch.zeros(*p.shape[:2], layout.head_dim, dtype=torch.float64)
    if not layout.packs_values or p.shape[-1] == 0:
        return total
    parts = reference.value_parts(cache.v_pages, layout, cache.page_table[b], 0, slots)
    scale, codes = reference.scales_of(parts[0][h]), parts[1][h].double()
    # What rounding a probability times its scale moves the output by: multiples of these rows.
    rows = (codes - (2.0 ** layout.v_bits[h] - 1) / 2) @ reference.rotation(layout.head_dim)
    padded = torch.cat([torch.zeros(*p.shape[:2], skip).double(), p], dim=-1)
    for start in range(0, slots, PAGE_TOKENS):
        page = slice(max(start, skip), start + PAGE_TOKENS)
        if page.start >= min(page.stop, slots):
            continue
        if uses_halves():
            values = rows[page] * scale[page, None]
            variance = (padded[..., page, None] * values).square().sum(-2) * HALF_VARIANCE
            if p.shape[0] * p.shape[1] <= 8:  # decoding: probabilities alone are halves, too
                variance *= 2
                total += 2.0**-25 * values.abs().sum(0)
            total += SIGMAS * variance.sqrt()
            largest = padded[..., page].amax(-1)[..., None] * scale[page].amax()
            total += 2.0**-37 * largest * codes[page].sum(0).norm()
            continue
        step = padded[..., page].amax(-1, keepdim=True) * scale[page].amax() / PROBABILITY_STEPS
        total += SIGMAS * step / 2 * rows[page].square().sum(0).sqrt()
    return total


def capped(scores: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores after a softcap, its slope at them, and the error of computing it."""
    if not softcap:
        return scores, torch.ones_like(scores), torch.zeros_like(scores)
    share = (scores / softcap).tanh()
    # The share's argument is rounded a few times, and moves it by no more than it is.
    return softcap * share, 1 - share.square(), TANH_ERROR * softcap * share.abs()


def expect(cache: Cache, query: Tensor) -> Expected:
    """Reference attention of ``query`` [B, Hq, L, D], exact in float64, with bounds."""
    out, lse = reference.attend(query.double(), **cache.kwargs())
    out_error, lse_error = torch.zeros_like(out), torch.zeros_like(lse)
    q_len, group = query.shape[2], query.shape[1] // cache.layout.num_kv_heads
    for b in range(query.shape[0]):
        skip = reference.skipped_slots(cache.packed)
        packed = max(int(cache.cache_seqlens[b]) - skip, 0)
        length = int(cache.window_lens[b])
        at = (cache.layout, cache.page_table[b], skip, packed)
        codes = reference.unpack_codes(cache.k_pages, *at).double()
        keys = reference.packed_keys(cache.packed, b)
        is_outlier = torch.zeros(cache.layout.num_kv_heads, packed, dtype=torch.bool)
        if cache.outlier_slots is not None:
            tokens = cache.outlier_slots[b] - skip
            for h, own in enumerate(tokens):
                is_outlier[h, own[(own >= 0) & (own < packed)].long()] = True
        values = reference.unpack_values(cache.v_pages, *at)
        every = reference.visible_tokens(
            q_len,
            cache.packed,
            b,
            length,
            causal=cache.causal,
            window_size=cache.rules.window_size,
            query_position=cache.query_position,
        )
        for h, seen in enumerate(every):
            heads = slice(h * group, (h + 1) * group)
            q = query[b, heads].double()
            k = torch.cat([keys[h], cache.window_keys[b, h, :length].double()])
            v = torch.cat([values[h], cache.window_values[b, h, :length]]).double()
            scores, slope, capping = capped(q @ k.T * cache.sm_scale, cache.rules.softcap)
            scores = scores.masked_fill(~seen, -torch.inf)
            o, total = out[b, heads], lse[b, heads]
            if cache.rules.sinks is not None:  # one more token, without a value
                sink = cache.rules.sinks[heads].double()[:, None, None].expand(-1, q_len, 1)
                scores = torch.cat([scores, sink], dim=-1)
                k, v = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
                slope, capping = (nn.functional.pad(x, (0, 1)) for x in (slope, capping))
            p = (scores - total[..., None]).exp().nan_to_num(nan=0.0)
            lengths = q.norm(dim=-1)[..., None] * k.norm(dim=-1)
            error = SIGMAS * cache.layout.head_dim**0.5 * FLOAT_ERROR * lengths * cache.sm_scale
            codes_error = score_errors(cache, b, h, q, codes)
            error[..., :packed] += codes_error.masked_fill(is_outlier[h], 0.0)
            if (
                cache.rules.softcap
            ):  # a slope of 1 at most, which an error changes by less than this
                error *= (slope + 0.8 * error / cache.rules.softcap).clamp(max=1)
                error += capping
            error += EXP2_ERROR + 4 * FLOAT_ERROR * scores.abs().nan_to_num(posinf=0.0)
            shift = torch.log1p((p * error.expm1()).sum(-1))
            spread = (v - o[..., None, :]).abs()  # [g, L, n, D]
            change = torch.einsum("glt,gltd->gld", p * (error + shift[..., None]).expm1(), spread)
            # Sums over the tokens, and a rescaling for every page.
            sums = SIGMAS * (len(k) + 32) ** 0.5 * FLOAT_ERROR
            e = change + value_errors(cache, b, h, p[..., :packed]) + sums * (p @ v.abs())
            out_error[b, heads] = e + ROUNDING[query.dtype] * (o.abs() + e) + 2.0**-25
            lse_error[b, heads] = (
                shift + sums + 4 * FLOAT_ERROR * total.abs().nan_to_num(posinf=0.0)
            )
    return Expected(out, lse, out_error, lse_error)
