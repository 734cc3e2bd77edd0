"""The operators ``torch.ops.svdq.*`` with types, shapes and units.

Dimensions have the same names everywhere: B sequences, H KV heads, Hq query heads, T tokens, L
query length, D head_dim, R coded channels of all heads together (``layout.rank``), P pages of a
pool, E tokens of a window. Operators that fit or pack work on one sequence (ragged batches are
loops over sequences, heads are batched); ``attend`` works on a batch. Errors are ``RuntimeError``
or ``ValueError`` that name the operator, the argument, the expected and the given value; an
operator that mutates a tensor checks everything before it writes.

Tensors of one call lie on one device, the CPU or a CUDA device, except that ``page_table`` of the
pack and unpack operators lies on the CPU always. On CUDA devices work is queued on the current
stream. Nothing waits for the device except ``fit_basis`` and the check that numbers are finite,
which is made of more than 64 tokens alone: while decoding, a key that is not finite gets codes 0, a
value makes its own scale NaN. ``attend`` cannot look at lengths, page ids and learned sinks there;
lengths and ids out of range make the outputs of their sequence NaN and nothing is read, a sink that
is not finite those of its query head. A layer may have up to 128 KV
heads.

``keys`` are always rotated keys, as a Hugging Face model hands them to its cache. ``inv_freq`` is
the model's inverse frequencies, ``[rotary_dim / 2]`` float32, for layouts with ``rope="pre"`` and
``"hybrid"``, else ``None``: channels ``i`` and ``i + rotary_dim / 2`` form a pair that position
``p`` rotates by ``p * inv_freq[i]`` (the "rotate half" convention); channels from ``rotary_dim`` on
are not rotated. ``position`` is the position of the first token of ``keys``.
"""

from svdq.ops import fakes  # noqa: F401  (registers itself)
from svdq.ops.attend import attend, gather, merge, select
from svdq.ops.fit import allocate_bits, fit_basis, fit_quantizer, residual_keys
from svdq.ops.nouns import NO_RULES, KeyCodec, LogitRules, PackedKeys, Window
from svdq.ops.pack import (
    append_window_,
    pack_keys_,
    pack_values_,
    unpack_codes,
    unpack_keys,
    unpack_values,
)
from svdq.ops.step import decode_step_

__all__ = [
    "NO_RULES",
    "KeyCodec",
    "LogitRules",
    "PackedKeys",
    "Window",
    "allocate_bits",
    "append_window_",
    "attend",
    "decode_step_",
    "fit_basis",
    "fit_quantizer",
    "gather",
    "merge",
    "pack_keys_",
    "pack_values_",
    "residual_keys",
    "select",
    "unpack_codes",
    "unpack_keys",
    "unpack_values",
]
