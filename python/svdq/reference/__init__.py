"""The definition of every operator of :mod:`svdq.ops` in plain PyTorch, to test backends by.

Signatures, shapes and dtypes are those of :mod:`svdq.ops`. Arithmetic is float64 and follows the
formulas of SVDq (arXiv 2502.15304) and kernels/format.h alone. Given float64 queries, keys or
means, results stay float64 too. Only the operators check their arguments.
"""

from svdq.reference.attention import (
    append_window_,
    attend,
    attend_keys,
    exact_codec,
    merge,
    pack_keys_,
    packed_keys,
    replace_keys,
    skipped_slots,
    unpack_keys,
    visible_tokens,
)
from svdq.reference.keys import (
    allocate_bits,
    channel_widths,
    code_keys,
    decode_keys,
    fit_basis,
    fit_keys,
    fit_quantizer,
    latents,
    part_slices,
    quantize,
    residual_keys,
    rotate,
)
from svdq.reference.pages import (
    key_code_addresses,
    unpack_codes,
    value_code_addresses,
    write_codes_,
)
from svdq.reference.selection import gather, proxy_slices, select, token_masses
from svdq.reference.values import (
    decode_values,
    pack_values_,
    quantize_values,
    rotation,
    scale_bytes,
    scales_of,
    unpack_values,
    value_parts,
)

__all__ = [
    "allocate_bits",
    "append_window_",
    "attend",
    "attend_keys",
    "channel_widths",
    "code_keys",
    "decode_keys",
    "decode_values",
    "exact_codec",
    "fit_basis",
    "fit_keys",
    "fit_quantizer",
    "gather",
    "packed_keys",
    "key_code_addresses",
    "latents",
    "merge",
    "pack_keys_",
    "pack_values_",
    "part_slices",
    "proxy_slices",
    "quantize",
    "quantize_values",
    "replace_keys",
    "residual_keys",
    "rotate",
    "rotation",
    "scale_bytes",
    "scales_of",
    "select",
    "skipped_slots",
    "token_masses",
    "unpack_codes",
    "unpack_keys",
    "unpack_values",
    "value_parts",
    "value_code_addresses",
    "visible_tokens",
    "write_codes_",
]
