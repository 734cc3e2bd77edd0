"""Peers at the true bits of another method, and peers by name."""

from __future__ import annotations

from dataclasses import dataclass, field

from svdq_bench.quality.peers import Kivi, Peer, PerChannel, ThinK
from svdq_bench.quality.prefix import Method, Prefix
from svdq_bench.quality.quantized import BITS, TransformersQuantized, is_installed

FAMILIES = ("per-channel", "kivi", "think", "quantized")
KIVI_BITS = (1, 2, 4)
KIVI_GROUPS = (32, 64, 128, 256, 512)
PER_CHANNEL_BITS = (1, 2, 3, 4, 8)
QUANTIZED_GROUPS = (32, 64, 128)


def candidates(family: str, prefix: Prefix, sink_tokens: int = 8) -> list[Method]:
    """The settings of a family that a budget may choose from, least bits first."""
    _check_family(family)
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
    family : one of :data:`FAMILIES`.
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
    family : one of :data:`FAMILIES`.
    reference : the method whose all-in bits are matched.
    sink_tokens : as for :func:`matched`.
    """

    family: str
    reference: Method
    sink_tokens: int = 8
    _chosen: dict[int, Method] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_family(self.family)
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
    text : a family alone, to be matched to ``reference``; or with its settings after colons:
        ``per-channel:BITS``, ``kivi:BITS[:GROUP_SIZE]``, ``think:SHARE_KEPT``,
        ``quantized:BACKEND[:BITS[:GROUP_SIZE]]``.
    reference : what a family alone is matched to.
    sink_tokens : exact leading tokens.
    """
    family, *words = text.split(":")
    _check_family(family)
    if not words:
        if reference is None:
            raise ValueError(f"{family} alone is matched to an svdq preset, and there is none")
        return Matched(family, reference, sink_tokens)
    try:
        if family == "per-channel" and len(words) == 1:
            return PerChannel(int(words[0]), sink_tokens)
        if family == "kivi" and len(words) <= 2:
            return Kivi(*map(int, words), sink_tokens=sink_tokens)
        if family == "think" and len(words) == 1:
            return ThinK(float(words[0]), sink_tokens)
        if family == "quantized" and words[0] == "fp8" and len(words) == 1:
            return TransformersQuantized("fp8", 8)
        if family == "quantized" and len(words) <= 3:
            return TransformersQuantized(words[0], *map(int, words[1:]))
    except ValueError as error:
        raise ValueError(f"peer {text!r}: {error}") from error
    raise ValueError(
        f"peer {text!r}: expected per-channel:BITS, kivi:BITS[:GROUP_SIZE], think:SHARE_KEPT or "
        "quantized:BACKEND[:BITS[:GROUP_SIZE]]"
    )


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"peers are {', '.join(FAMILIES)}, got {family!r}")
