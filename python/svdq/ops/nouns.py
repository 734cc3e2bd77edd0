"""The nouns that operators share.

The schemas of ``torch.ops.svdq.*`` are flat. Every noun names its fields as those schemas do
(``flat``), and :func:`svdq.ops.registered.call` passes them by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from svdq.layout import PageLayout


@dataclass(frozen=True)
class KeyCodec:
    """Parameters that code and decode keys; a leading dimension B where they are of a batch.

    A key is ``mean + (codes - mid) * scale @ basis``, rotated or not as the layout says; a hybrid
    layout adds ``post_mean`` and its post-RoPE channels to the rotated result (kernels/format.h).

    Parameters
    ----------
    basis : [R, D] bfloat16, a head's pre-RoPE channels before its post-RoPE channels.
    scale : [R] float32, distance between neighbouring codes of a channel.
    mean : [H, D] float32; of a hybrid layout the mean of the un-rotated keys.
    post_mean : [H, D] float32 of a hybrid layout, else None.
    inv_freq : [rotary_dim / 2] float32, shared by all sequences; None for ``rope="post"``.
    """

    basis: Tensor
    scale: Tensor
    mean: Tensor
    post_mean: Tensor | None = None
    inv_freq: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that every sequence has its own of, by name."""
        found = {"basis": self.basis, "scale": self.scale, "mean": self.mean}
        return found if self.post_mean is None else {**found, "post_mean": self.post_mean}

    def sequence(self, b: int) -> KeyCodec:
        """The codec of sequence b of a batch."""
        return replace(self, **{name: x[b] for name, x in self.tensors().items()})

    def batched(self) -> KeyCodec:
        """The codec of one sequence as that of a batch of one."""
        return replace(self, **{name: x[None] for name, x in self.tensors().items()})

    def select(self, indices: Tensor) -> KeyCodec:
        """A batch whose sequence i is a copy of sequence ``indices[i]`` of this one."""
        return replace(self, **{name: x[indices] for name, x in self.tensors().items()})

    def copy_sequence(self, b: int, source: KeyCodec) -> None:
        """Overwrite sequence b with the codec ``source`` of one sequence."""
        for name, own in self.tensors().items():
            own[b] = getattr(source, name)

    def flat(self) -> dict[str, Any]:
        """The fields by their names in the operators' schemas."""
        return {
            "basis": self.basis,
            "scale": self.scale,
            "mean": self.mean,
            "post_mean": self.post_mean,
            "inv_freq": self.inv_freq,
        }

    @staticmethod
    def empty(layout: PageLayout, batch: int, device: torch.device) -> KeyCodec:
        """The zeros that the codecs of a batch are written into."""
        heads, dim = layout.num_kv_heads, layout.head_dim
        mean = torch.zeros((batch, heads, dim), dtype=torch.float32, device=device)
        return KeyCodec(
            torch.zeros((batch, layout.rank, dim), dtype=torch.bfloat16, device=device),
            torch.zeros((batch, layout.rank), dtype=torch.float32, device=device),
            mean,
            mean.clone() if layout.rope == "hybrid" else None,
        )


@dataclass(frozen=True)
class PackedKeys:
    """The packed tokens of a batch: pages of one pool, and the codec of every sequence.

    Parameters
    ----------
    layout : layout of the pages.
    codec : of the B sequences.
    k_pages : [P, layout.k_page_bytes] uint8.
    page_table : [B, N] int32, page of each 64 slots; ``64 * N >= max(cache_seqlens)``.
    cache_seqlens : [B] int32, packed slots of each sequence.
    v_pages : [P, ...] pool of the values, as :func:`svdq.ops.pack_values_` fills it; ``select``
        does not need it.
    first_position : [B] int32, position of slot 0 of each sequence; None for zeros.
    sink_tokens : leading slots that are the window's first tokens and skipped in the pages.
    outlier_slots : [B, H, N] int32, contiguous; packed slots of a head whose keys are held exact
        too, ascending, then ``NO_SLOT``. With ``token_slots``, indices into those.
    outlier_keys : [B, H, N, D] float32, bfloat16 or float16, contiguous; rotated keys.
    token_slots : [B, H, 64 * N] int32, contiguous, for gathered pages: the slot that each token
        came from, ``NO_SLOT`` for none. No page holds sinks then.
    """

    layout: PageLayout
    codec: KeyCodec
    k_pages: Tensor
    page_table: Tensor
    cache_seqlens: Tensor
    v_pages: Tensor | None = None
    first_position: Tensor | None = None
    sink_tokens: int = 0
    outlier_slots: Tensor | None = None
    outlier_keys: Tensor | None = None
    token_slots: Tensor | None = None

    def flat(self) -> dict[str, Any]:
        """The fields by their names in the operators' schemas, those of the codec among them."""
        return {
            **self.codec.flat(),
            "layout": self.layout.ints,
            "k_pages": self.k_pages,
            "v_pages": self.v_pages,
            "page_table": self.page_table,
            "cache_seqlens": self.cache_seqlens,
            "first_position": self.first_position,
            "sink_tokens": self.sink_tokens,
            "outlier_slots": self.outlier_slots,
            "outlier_keys": self.outlier_keys,
            "token_slots": self.token_slots,
        }


@dataclass(frozen=True)
class Window:
    """Uncompressed tokens of a batch: attention sinks, recent tokens, the new tokens themselves.

    Parameters
    ----------
    keys, values : [B, H, E, D] float32, bfloat16 or float16, of equal strides; rotated keys.
    lens : [B] int32, tokens in use, at most E.
    """

    keys: Tensor
    values: Tensor
    lens: Tensor

    def flat(self) -> dict[str, Any]:
        """The fields by their names in the operators' schemas."""
        return {
            "window_keys": self.keys,
            "window_values": self.values,
            "window_lens": self.lens,
        }


@dataclass(frozen=True)
class LogitRules:
    """What a model does to the logits of its softmax, in addition to scaling them.

    Parameters
    ----------
    softcap : a scaled logit x becomes ``softcap * tanh(x / softcap)``; 0 for none.
    sinks : [Hq] float32, finite, contiguous; learned sinks (``s_aux`` of GPT-OSS): one more logit
        in the softmax of each query head, neither scaled nor capped, that has no value. None for
        none.
    window_size : a query at position p sees the keys at positions ``p - window_size + 1`` and
        later, as transformers' sliding windows do; 0 for all.
    """

    softcap: float = 0.0
    sinks: Tensor | None = None
    window_size: int = 0

    def __bool__(self) -> bool:
        """True if a model asks for any of them."""
        return bool(self.softcap or self.window_size) or self.sinks is not None

    def without_sinks(self) -> LogitRules:
        """For all parts of a softmax but one: the sinks belong to one of those that are merged."""
        return self if self.sinks is None else replace(self, sinks=None)

    def flat(self) -> dict[str, Any]:
        """The fields by their names in the operators' schemas."""
        return {
            "softcap": self.softcap,
            "sinks": self.sinks,
            "window_size": self.window_size,
        }


NO_RULES = LogitRules()
