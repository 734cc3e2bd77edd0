"""Small random models, caches driven by hand, and the decoded tokens of a cache."""

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from svdq import SVDqCache, ops
from svdq.cache.layer import SVDqLayer
from svdq.hf.attention import svdq_attention
from svdq.store.packed import PackedStore

VOCABULARY = 256
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GQA = {"num_key_value_heads": 2, "head_dim": 64}

# Family -> configuration: shared heads, biases, norms of queries and keys, hybrid layers, partial
# rotations.
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **GQA),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=4),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=80),
    "mistral": MistralConfig(**SIZES, **GQA, sliding_window=None),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": PhiConfig(**SIZES, num_key_value_heads=4, partial_rotary_factor=0.5),
    "gpt_neox": GPTNeoXConfig(**SIZES, rotary_pct=0.25),
}
# Families that transformers' "sdpa" refuses for what they do to their logits: "eager" is right.
SLIDING = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
RULED_CONFIGS = {
    "gemma2": Gemma2Config(
        **SIZES, **GQA, **SLIDING, attn_logit_softcapping=5.0, query_pre_attn_scalar=64
    ),
    "gpt_oss": GptOssConfig(**SIZES, **GQA, **SLIDING, num_local_experts=4, num_experts_per_tok=2),
}
# All channels at 8 bits and exact values: as near to the full cache as packed pages come.
FINE = {"schedule": [8], "v_bits": "exact"}


def make_model(
    family: str = "llama", attention: str = "svdq", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model of a family; the same weights every time."""
    torch.manual_seed(1)
    config = (CONFIGS | RULED_CONFIGS)[family]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # Random weights of the usual scale give all but uniform attention; larger ones look somewhere.
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name or "query_key_value" in name:
            parameter.data *= 4
        if "sinks" in name:  # initialized to about 0
            parameter.data += torch.arange(len(parameter))
    return model.to(dtype).eval()


def make_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[B, T] random token ids, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


class Driver:
    """Feeds one layer of a cache as a model would, and knows all that it was fed.

    Keys are noise of a decaying spectrum, the same for every driver.
    """

    def __init__(self, batch: int = 1, dtype: torch.dtype = torch.float32, **settings) -> None:
        torch.manual_seed(2)
        self.config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, **GQA)
        self.cache = SVDqCache(self.config, **settings)
        self.batch, self.dtype = batch, dtype
        self.module = SimpleNamespace(num_key_value_groups=2, is_causal=True)

    @property
    def layer(self) -> SVDqLayer:
        return self.cache.layers[0]

    def draw(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, 4, L, 64], keys and values [B, 2, L, 64], strided as models make them."""
        spectrum = 8.0 ** -torch.linspace(0, 1, 64)
        draw = lambda heads: torch.randn(self.batch, length, heads, 64, dtype=self.dtype)  # noqa: E731
        query, keys, values = (draw(heads).transpose(1, 2) for heads in (4, 2, 2))
        return query, (keys * spectrum + 0.5).to(self.dtype), values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, **kwargs) -> Tensor:
        """Hand new tokens over and attend, [B, L, 4, 64]."""
        new, same = self.cache.update(keys, values, 0)
        mask = kwargs.pop("attention_mask", None)
        return svdq_attention(self.module, query, new, same, mask, **kwargs)[0]

    def feed(self, length: int, **kwargs) -> Tensor:
        """Attend to ``length`` new random tokens."""
        return self.attend(*self.draw(length), **kwargs)


def decoded(layer: SVDqLayer, b: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of sequence b as the cache stands for them, [H, n, D] float32 in order."""
    window, sinks = layer.tokens.window, layer.settings.sink_tokens
    exact = [x[b, :, : window.count[b]].float() for x in (window.keys, window.values)]
    parts = [exact]
    stores = [store for store in layer.tokens.stores if store.slots[b]]
    if stores:
        packed = [torch.cat(x, 1) for x in zip(*(decoded_store(s, b) for s in stores), strict=True)]
        parts = [[x[:, :sinks] for x in exact], [x[:, sinks:] for x in packed]]
        parts.append([x[:, sinks:] for x in exact])
    keys, values = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    if layer.tokens.fit.gain is not None:
        keys = keys / layer.tokens.fit.batch_gain(layer.batch_size)[b].float()[:, None]
    return keys, values


def decoded_store(store: PackedStore, b: int) -> tuple[Tensor, Tensor]:
    """Keys (times their gain) and values of all slots of one store."""
    pool, count = store.pool, store.slots[b]
    at = (store.layout, pool.page_table[b], 0, count)
    return store.decoded_keys(b, 0, count), ops.unpack_values(pool.v_pages, *at)


def plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last L of n tokens in float64: query [Hq, L, D] -> [L, Hq, D]."""
    groups, length, total = query.shape[0] // keys.shape[0], query.shape[1], keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 0) for x in (keys, values))
    scores = query.double() @ keys.mT * query.shape[-1] ** -0.5
    hidden = torch.ones(length, total, dtype=torch.bool).triu(total - length + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ values).transpose(0, 1)


def snapshot(cache: SVDqCache) -> list:
    """Everything that a cache stands for, to compare before and after."""
    state = []
    for layer in cache.svdq_layers:
        state.append(layer.get_seq_length())
        if layer.seq_length:
            state.append(list(layer.padding))
            state.append([decoded(layer, b) for b in range(layer.batch_size)])
    return state


def assert_same_state(actual: list, expected: list) -> None:
    """Fails unless two snapshots are the same, bit by bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
