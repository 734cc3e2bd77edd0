"""The operators as torch knows them, called by the argument names of their schemas."""

from __future__ import annotations

from typing import Any

import torch

from svdq import _C  # noqa: F401  (registers the operators)
from svdq.ops.nouns import KeyCodec, LogitRules, PackedKeys, Window

NAMES = (
    "fit_basis",
    "allocate_bits",
    "fit_quantizer",
    "pack_keys_",
    "residual_keys",
    "pack_values_",
    "append_window_",
    "unpack_codes",
    "unpack_keys",
    "unpack_values",
    "select",
    "gather",
    "attend",
    "merge",
    "decode_step_",
)
# Arguments of every operator, in the order of its schema, and the values of those not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    name: {x.name: x.default_value for x in getattr(torch.ops.svdq, name).default._schema.arguments}
    for name in NAMES
}
ARGUMENTS: dict[str, tuple[str, ...]] = {name: tuple(found) for name, found in DEFAULTS.items()}
OPERATORS: Any = torch.ops.svdq  # tests replace it to run operators on a device


def call(name: str, *nouns: KeyCodec | PackedKeys | Window | LogitRules, **arguments: Any) -> Any:
    """Call an operator with the fields of nouns and with further arguments.

    This is the one place that flattens nouns. The order of a schema is known to C++ alone; a field
    that the operator does not take is left out, an argument that nobody gives has its default.
    """
    for noun in nouns:
        arguments |= noun.flat()
    given = [arguments.get(field, default) for field, default in DEFAULTS[name].items()]
    return getattr(OPERATORS, name)(*given)
