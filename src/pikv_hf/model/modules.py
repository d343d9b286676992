"""The attention modules of a model whose cache layers can be paged, and why other layers cannot."""

import re
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from .versions import DynamicLayer

# Reasons, by the name of transformers' layer class, why layers of the class are not paged.
_NATIVE = {
    "DummyLayer": "no keys of its own",
    "DynamicSlidingWindowLayer": "a sliding window, which is bounded already",
    "DynamicIndexedLayer": "an indexer that chooses the keys",
    "LinearAttentionAndFullAttentionLayer": "states of linear attention beside the keys",
    "LinearAttentionAndSlidingWindowAttentionLayer": "a sliding window, which is bounded already",
    "LinearAttentionLayer": "states of a fixed size, no keys",
}


def is_attention(module: nn.Module) -> bool:
    """Return whether the class name of `module` ends like an attention class's."""
    return re.search(r"(Attention|MLA)\d*$", type(module).__name__) is not None


def attention_modules(model: PreTrainedModel) -> dict[int, list[nn.Module]]:
    """Return, by layer, the attention modules of the text decoder whose cache can be paged."""
    text_config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers
    pageable = {i for i, layer in enumerate(layers) if type(layer) is DynamicLayer}
    found: dict[int, list[nn.Module]] = {}
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model
    for module in decoder.modules():
        index, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
        if not is_attention(module) or not isinstance(config, type(text_config)):
            continue
        if index in pageable and not _is_shared(text_config, index):
            found.setdefault(index, []).append(module)
    # Attention classes that share a layer read each other's tensors in it (diffusion decoders).
    return {idx: modules for idx, modules in found.items() if len(set(map(type, modules))) == 1}


def unpaged_reasons(config: PreTrainedConfig, paged: dict[int, Any]) -> dict[int, str]:
    """Return, by layer, why cache layers that are not in `paged` keep transformers' own class."""
    text_config = config.get_text_config(decoder=True)
    reasons = {}
    for idx, layer in enumerate(DynamicCache(config=config).layers):
        if idx in paged:
            continue
        if type(layer) is not DynamicLayer:
            kind = type(layer).__name__
            reasons[idx] = _NATIVE.get(kind, f"a cache layer of their own, {kind}")
        elif _is_shared(text_config, idx):
            reasons[idx] = "keys and values that other layers reuse"
        else:
            reasons[idx] = "attention modules that PiKVCache does not know"
    return reasons


def _is_shared(text_config: PreTrainedConfig, idx: int) -> bool:
    """Return whether other layers reuse the keys of this layer, which then must keep them all."""
    if getattr(text_config, "recurrent_kv_cache_mode", None) == "last_loop":
        return True  # earlier loops of a looped model (dory) read what its last one has cached
    modes = getattr(text_config, "kv_sharing_modes", None)
    if modes is not None:  # since 5.24 gemma4 names layers that store although none reuses them
        return modes[idx] == "store" and "reuse" in modes
    return bool(getattr(text_config, "num_kv_shared_layers", 0))
