"""The caches that a command's options ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svdq.cli.options import Rope

if TYPE_CHECKING:
    from svdq.evaluation.matching import Matched
    from svdq.evaluation.prefix import Method


def make_methods(
    presets: list[str],
    peers: list[str],
    v_bits: str,
    rope: Rope,
    clip: bool,
    sink_tokens: int,
    residual_length: int = 0,
) -> list[Method | Matched]:
    """svdq with every preset, then the peers, which have the same sinks.

    Raises
    ------
    ValueError, ImportError
        For words that mean nothing, or a peer whose package is not installed.
    """
    from svdq.evaluation.matching import parse_peer
    from svdq.evaluation.methods import CacheSettings

    settings = [
        CacheSettings(
            keys,
            v_bits=v_bits,
            rope=rope.value,
            clip=clip,
            sink_tokens=sink_tokens,
            residual_length=residual_length,
        )
        for keys in presets
    ]
    reference = settings[0] if settings else None
    return [*settings, *(parse_peer(peer, reference, sink_tokens) for peer in peers)]
