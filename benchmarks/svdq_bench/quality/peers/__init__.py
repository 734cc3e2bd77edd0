"""Other ways to shrink a cache, on the same exact keys and values, with the bytes they would take.

Every peer codes the rotated keys of the full-attention layers, and their values if it is asked to,
and puts the decoded numbers into a ``DynamicCache``: what the model computes from it is what a
kernel would compute from the codes. Sliding-window layers stay exact. Bytes are those of an
implementation that packs codes without gaps, holds scale and minimum of a range as two 16-bit
numbers (to which they are rounded here, too) and exact tokens in the model's dtype; tests build
such arrays and count them. ``times_smaller_bf16`` counts exact tokens, and the full cache that it
compares with, at two bytes a number whatever the model's dtype.
"""

from svdq_bench.quality.peers.base import FullCache, Peer
from svdq_bench.quality.peers.kvquant import KVQuant
from svdq_bench.quality.peers.rounding import round_to_range
from svdq_bench.quality.peers.think import ThinK
from svdq_bench.quality.peers.turboquant import TurboQuant
from svdq_bench.quality.peers.uniform import Kivi, PerChannel
from svdq_bench.quality.peers.values import TokenRanges

__all__ = [
    "FullCache",
    "KVQuant",
    "Kivi",
    "Peer",
    "PerChannel",
    "ThinK",
    "TokenRanges",
    "TurboQuant",
    "round_to_range",
]
