"""Other ways to shrink a key cache, on the same exact keys, with the bytes they would take.

Every peer quantizes the rotated keys of the full-attention layers and puts the dequantized numbers
into a ``DynamicCache``: what the model computes from it is what a kernel would compute from the
codes. Sliding-window layers and values stay exact. Bytes are those of an implementation that packs
codes without gaps, holds scale and minimum of a group as two 16-bit numbers (to which they are
rounded here, too) and exact tokens in the model's dtype; tests build such arrays and count them.
"""

from svdq_bench.quality.peers.base import FullCache, Peer
from svdq_bench.quality.peers.rounding import round_to_range
from svdq_bench.quality.peers.think import ThinK
from svdq_bench.quality.peers.uniform import Kivi, PerChannel

__all__ = ["FullCache", "Kivi", "Peer", "PerChannel", "ThinK", "round_to_range"]
