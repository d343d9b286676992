"""Models and tokenizers by name, for commands."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .versions import with_cache

if TYPE_CHECKING:

    class GenerativeModel(PreTrainedModel):
        """A model of `AutoModelForCausalLM`; `PreTrainedModel` alone has no `generate`."""

        generate: Callable[..., Any]

else:
    GenerativeModel: TypeAlias = PreTrainedModel


def load(
    name: str, dtype: str = "auto", device_map: str | None = None
) -> tuple[GenerativeModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, on the GPU if there is one; set the model to greedy decoding."""
    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map).eval()
    config = model.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    if config.pad_token_id is None:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else end
    # transformers' annotation lets a backend that is not installed be None.
    return model, tokenizer  # ty: ignore[invalid-explicit-return]


def check_length(model: PreTrainedModel, tokens: int, given: str) -> None:
    """Refuse texts of `tokens` tokens if `model` reads fewer; `given`: which argument asks."""
    max_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_tokens is not None and tokens > max_tokens:
        raise ValueError(f"{given}, but the model reads at most {max_tokens} tokens.")


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    special_tokens: bool = True,
) -> dict[str, Tensor]:
    """Encode `text` as the inputs of `generate`."""
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_tensors="pt")
    ids = encoded.input_ids.to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(
    model: GenerativeModel,
    inputs: dict[str, Tensor],
    cache: Cache | None,
    streamer: Any,
    max_new_tokens: int,
) -> Any:
    """Generate at most `most` tokens with `cache`; return an output that has the cache in it."""
    options = {
        "streamer": streamer,
        "max_new_tokens": max_new_tokens,
        "return_dict_in_generate": True,
    }
    return model.generate(**inputs, **with_cache(cache), **options)
