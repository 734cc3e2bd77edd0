"""The definition of every operator of :mod:`svdq.ops` in plain PyTorch, to test backends by.

Signatures, shapes and dtypes are those of :mod:`svdq.ops`. Arithmetic is float64 and follows the
formulas of SVDq (arXiv 2502.15304) and kernels/format.h alone. Given float64 queries, keys or
means, results stay float64 too. Arguments are taken as valid: only the operators check them.
"""

from svdq.reference.attention import (
    attend,
    attend_keys,
    gathered_keys,
    merge,
    pack_keys_,
    replace_keys,
    unpack_keys,
    visible_tokens,
)
from svdq.reference.keys import (
    allocate_bits,
    channel_widths,
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
    key_places,
    pack_values_,
    quantize_values,
    unpack_codes,
    unpack_values,
    value_parts,
    value_places,
    write_codes_,
)
from svdq.reference.selection import gather, select, select_weights

__all__ = [
    "allocate_bits",
    "attend",
    "attend_keys",
    "channel_widths",
    "decode_keys",
    "fit_basis",
    "fit_keys",
    "fit_quantizer",
    "gather",
    "gathered_keys",
    "key_places",
    "latents",
    "merge",
    "pack_keys_",
    "pack_values_",
    "part_slices",
    "quantize",
    "quantize_values",
    "replace_keys",
    "residual_keys",
    "rotate",
    "select",
    "select_weights",
    "unpack_codes",
    "unpack_keys",
    "unpack_values",
    "value_parts",
    "value_places",
    "visible_tokens",
    "write_codes_",
]
