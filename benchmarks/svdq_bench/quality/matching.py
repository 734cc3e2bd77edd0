"""Peers at the true bits of another method, and peers by name."""

from __future__ import annotations

from dataclasses import dataclass, field

from svdq_bench.quality.peers import Kivi, KVQuant, Peer, PerChannel, ThinK, TurboQuant
from svdq_bench.quality.prefix import Method, Prefix
from svdq_bench.quality.quantized import BITS, TransformersQuantized, is_installed

# Families whose keys can be matched to a number of bits, and all.
MATCHED_FAMILIES = ("per-channel", "kivi", "think", "quantized")
FAMILIES = (*MATCHED_FAMILIES, "kvquant", "turboquant")
KIVI_BITS = (1, 2, 4)
KIVI_GROUPS = (32, 64, 128, 256, 512)
PER_CHANNEL_BITS = (1, 2, 3, 4, 8)
QUANTIZED_GROUPS = (32, 64, 128)
SYNTAX = (
    "per-channel:BITS, kivi:BITS[:GROUP_SIZE[:RESIDUAL]], think:SHARE_KEPT or "
    "kvquant:BITS[:pre|post], each with :vBITS for its values, "
    "turboquant:PRESET[:SKIPPED_LAYERS[:SINKS]] or quantized:BACKEND[:BITS[:GROUP_SIZE]]"
)


def candidates(family: str, prefix: Prefix, sink_tokens: int = 8) -> list[Method]:
    """The settings of a family that a budget may choose from, least bits first."""
    _check_matched(family)
    if family == "per-channel":
        return [PerChannel(bits, sink_tokens) for bits in PER_CHANNEL_BITS]
    if family == "kivi":
        fitting = [g for g in KIVI_GROUPS if sink_tokens + g <= prefix.num_tokens]
        return [Kivi(b, g, 0, sink_tokens) for b in KIVI_BITS for g in reversed(fitting)]
    if family == "think":
        dim = prefix.key_shapes[0][2]
        return [ThinK(channels / dim, sink_tokens) for channels in range(1, dim + 1)]
    backends = [name for name in ("quanto", "hqq") if is_installed(name)]
    if not backends:
        TransformersQuantized()  # says what to install
    return [
        TransformersQuantized(backends[0], bits, group)
        for bits in BITS[backends[0]]
        for group in reversed(QUANTIZED_GROUPS)
    ]


def matched(family: str, all_in_bits: float, prefix: Prefix, sink_tokens: int = 8) -> Method:
    """The setting of a family whose true bits are nearest to a number; of two, the larger one.

    Parameters
    ----------
    family : one of :data:`MATCHED_FAMILIES`.
    all_in_bits : everything stored for keys per key number.
    prefix : the context that bits are counted on; scales weigh less in a long one.
    sink_tokens : exact leading tokens of the peer, where its family can have any.
    """

    def distance(method: Method) -> tuple[float, float]:
        bits = true_bits(method, prefix)
        return abs(bits - all_in_bits), -bits

    return min(candidates(family, prefix, sink_tokens), key=distance)


def true_bits(method: Method, prefix: Prefix) -> float:
    """All-in bits of a method on a context; peers know them without coding anything."""
    if isinstance(method, Peer):
        return method.memory(prefix).all_in_bits
    return method.memory_columns(method.compress(prefix))["all_in_bits"]


@dataclass
class Matched:
    """A family whose setting is chosen on each context's length, at the bits of another method.

    Parameters
    ----------
    family : one of :data:`MATCHED_FAMILIES`.
    reference : the method whose all-in bits are matched.
    sink_tokens : as for :func:`matched`.
    """

    family: str
    reference: Method
    sink_tokens: int = 8
    _chosen: dict[int, Method] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_matched(self.family)
        if self.family == "quantized" and not (is_installed("quanto") or is_installed("hqq")):
            TransformersQuantized()  # says what to install

    @property
    def label(self) -> str:
        """Family and what it is matched to."""
        return f"{self.family}, matched to {self.reference.label}"

    def choose(self, prefix: Prefix) -> Method:
        """The setting for a context; the same one for all contexts of its length."""
        if prefix.num_tokens not in self._chosen:
            bits = true_bits(self.reference, prefix)
            found = matched(self.family, bits, prefix, self.sink_tokens)
            self._chosen[prefix.num_tokens] = found
        return self._chosen[prefix.num_tokens]


def choose(method: Method | Matched, prefix: Prefix) -> Method:
    """The method itself, or what a :class:`Matched` becomes on a context."""
    return method.choose(prefix) if isinstance(method, Matched) else method


def describe(method: Method | Matched, chosen: Method) -> dict:
    """Columns of a row: the chosen method's; ``matched`` is the label of a :class:`Matched`."""
    columns = chosen.columns()
    return columns | {"matched": method.label} if isinstance(method, Matched) else columns


def parse_peer(text: str, reference: Method | None, sink_tokens: int = 8) -> Method | Matched:
    """A peer from the words of a user.

    Parameters
    ----------
    text : a family alone, to be matched to ``reference``; or with its settings after colons, see
        ``SYNTAX``. A last word like ``v4`` says the bits of values, which are exact without it.
    reference : what a family alone is matched to.
    sink_tokens : exact leading tokens.
    """
    family, *words = text.split(":")
    if family not in FAMILIES:
        raise ValueError(f"peers are {', '.join(FAMILIES)}, got {family!r}")
    if not words:
        if reference is None:
            raise ValueError(f"{family} alone is matched to an svdq preset, and there is none")
        return Matched(family, reference, sink_tokens)
    try:
        found = _parse_settings(family, words, sink_tokens)
    except ValueError as error:
        raise ValueError(f"peer {text!r}: {error}") from error
    if found is None:
        raise ValueError(f"peer {text!r}: expected {SYNTAX}")
    return found


def _parse_settings(family: str, words: list[str], sink_tokens: int) -> Method | None:
    """A peer from the words after its family; None for too many or too few of them."""
    v_bits = None
    if words[-1].startswith("v") and family not in ("quantized", "turboquant"):
        *words, last = words
        v_bits = int(last.removeprefix("v"))
    count = len(words)
    if family == "per-channel" and count == 1:
        return PerChannel(int(words[0]), sink_tokens, v_bits)
    if family == "kivi" and 1 <= count <= 3:
        return Kivi(*map(int, words), sink_tokens=sink_tokens, v_bits=v_bits)
    if family == "think" and count == 1:
        return ThinK(float(words[0]), sink_tokens, v_bits)
    if family == "kvquant" and 1 <= count <= 2:
        return KVQuant(int(words[0]), *words[1:], sink_tokens=sink_tokens, v_bits=v_bits)
    if family == "turboquant" and count <= 3:
        return TurboQuant(words[0], *map(int, words[1:]))
    if family == "quantized" and words == ["fp8"]:
        return TransformersQuantized("fp8", 8)
    if family == "quantized" and count <= 3:
        return TransformersQuantized(words[0], *map(int, words[1:]))
    return None


def _check_matched(family: str) -> None:
    if family not in MATCHED_FAMILIES:
        raise ValueError(
            f"only {', '.join(MATCHED_FAMILIES)} can be matched to bits, {family!r} needs settings"
        )
