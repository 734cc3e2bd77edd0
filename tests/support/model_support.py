"""A tiny random model with its tokenizer, saved in a folder as a user would have one."""

import string
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from cache_support import VOCABULARY, make_model

CHAT_TEMPLATE = (
    "{% for m in messages %}w1 {{ m['role'] }} {{ m['content'] }} w2 {% endfor %}"
    "{% if add_generation_prompt %}w1 assistant {% endif %}"
)


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... are tokens 0, 1, ...; any other word is the last token."""
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"[UNK]": VOCABULARY - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="w0",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def make_char_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Every character is a token, so that any English text comes back from its tokens."""
    letters = {character: i for i, character in enumerate(string.printable)}
    tokenizer = Tokenizer(WordLevel(letters | {"[UNK]": len(letters)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        chat_template=CHAT_TEMPLATE if chat else None,
        clean_up_tokenization_spaces=False,
    )


def make_text(num_tokens: int) -> str:
    """Words in an order that does not repeat soon."""
    return " ".join(f"w{2 + (i * i + 7 * i) % 251}" for i in range(num_tokens))


def save_model(folder: Path, family: str = "llama") -> Path:
    """Save a random model and its tokenizer."""
    make_model(family, "sdpa").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
