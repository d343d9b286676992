"""Every MoE decoder of the installed transformers, found by introspection and built tiny.

    found, left_out = discover()        # {"mixtral": Architecture(...), ...}, {"class": "reason"}
    model = build("mixtral", "sdpa")    # random weights, eval mode, no end token
    inputs = prompt(model, (30, 27, 23))  # left-padded; keyword arguments of `generate`

An architecture is a text config that declares experts, together with the smallest class around it
that can generate.
"""

import copy
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers.models
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from zoo_specs import GENERIC, LAYERS, SPECIAL, TOWER, VOCAB, WIDE, Special


class Architecture(NamedTuple):
    """A MoE text model and the class that generates with it."""

    name: str
    model_class: type[PreTrainedModel]
    text_config_class: type[PreTrainedConfig]


class Zoo(NamedTuple):
    """What `discover` found, and the reason for every candidate that it left out."""

    found: dict[str, Architecture]
    left_out: dict[str, str]


@functools.cache
def discover() -> Zoo:
    """All MoE architectures that generate. Only folders that mention experts are imported."""
    zoo = Zoo({}, {})
    for path in sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py")):
        sources = [path, *path.parent.glob("configuration_*.py")]
        if any("expert" in source.read_text().lower() for source in sources):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            _add_module(module, zoo)
    return zoo


def _add_module(module: ModuleType, zoo: Zoo) -> None:
    stem = module.__name__.rpartition("modeling_")[2]
    models = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and (value.__module__, value.__name__) == (module.__name__, name)
        and value.config_class is not None
    ]
    generative: dict[type, list[type[PreTrainedModel]]] = {}
    for model in filter(lambda model: model.can_generate(), models):
        generative.setdefault(_text_config_class(model), []).append(model)
    moe = {config_class for config_class in generative if _has_experts(config_class)}

    for config_class, classes in generative.items():
        smallest, *others = sorted(classes, key=lambda model: len(_parts(model.config_class)))
        if config_class in moe:
            name = config_class.model_type.removesuffix("_text") if len(moe) > 1 else stem
            assert name not in zoo.found, f"two architectures are called {name}"
            zoo.found[name] = Architecture(name, smallest, config_class)
            reason = f"the same text model as {smallest.__name__}"
        else:
            others = classes
            reason = _why_not_moe(config_class)
        zoo.left_out.update({model.__name__: reason for model in others})
    if not generative:
        zoo.left_out[f"modeling_{stem}"] = "no class of it can generate"


def _has_experts(config_class: type) -> bool:
    """Whether a text config, or a part of it such as DBRX's `ffn_config`, declares experts."""
    parts = (config_class, *_parts(config_class).values())
    names = (_declared(part) | set(part.attribute_map) for part in parts if part is not AutoConfig)
    return any("expert" in name for name in set().union(*names))


def _why_not_moe(config_class: type) -> str:
    if config_class is AutoConfig:
        return "wraps any text model"
    if any("text_config" in _parts(part) for part in _parts(config_class).values()):
        return "wraps several generative models"
    return f"{config_class.__name__} declares no experts"


def build_config(name: str, **text_fields: Any) -> PreTrainedConfig:
    """The tiny config of `name`; `text_fields` win over every table."""
    architecture = discover().found[name]
    special = copy.deepcopy(SPECIAL.get(name, Special()))
    text_class, config_class = architecture.text_config_class, architecture.model_class.config_class
    text = {**_tiny_text(text_class), **special.text, **text_fields}
    if config_class is text_class:
        return config_class(**{**text, **special.outer})
    outer = {"text_config": text, **_tiny_towers(config_class), **_token_ids(config_class)}
    outer |= _known(config_class, {"initializer_range": WIDE})
    return config_class(**{**outer, **special.outer})


def build(
    name: str,
    attn: str = "eager",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **text_fields: Any,
) -> PreTrainedModel:
    """A tiny model of `name` in eval mode that always generates to `max_new_tokens`."""
    config = build_config(name, **text_fields)
    model_class = discover().found[name].model_class
    torch.manual_seed(seed)
    with poisoned_memory():
        model = model_class._from_config(config, attn_implementation=attn, dtype=dtype).eval()
    for tensor in model.state_dict().values():
        _fill_if_unset(tensor)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 1, None, 0
    generation.do_sample = False
    return model


def prompt(model: PreTrainedModel, lengths: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `generate`: one left-padded row of random tokens for each length."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, 100, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    inputs: dict[str, Any] = {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
    }
    if model.config.is_encoder_decoder:  # the cache is the decoder's: it needs a prompt too
        inputs["decoder_input_ids"] = torch.randint(3, 100, ids.shape, generator=generator)
        inputs["decoder_input_ids"][:, 0] = model.config.decoder_start_token_id
    if "talker_input_ids" in inspect.signature(model.forward).parameters:
        hidden = model.config.get_text_config().hidden_size
        draw = functools.partial(torch.randn, generator=generator, dtype=model.dtype)
        inputs["talker_input_ids"] = inputs.pop("input_ids")
        inputs["inputs_embeds"] = draw(len(lengths), width, hidden)
        inputs["trailing_text_hidden"] = draw(len(lengths), 4, hidden)
        inputs["tts_pad_embed"] = draw(1, 1, hidden)
        inputs["output_hidden_states"] = True
    return inputs


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (integers: the largest) inside, so a read of it shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _parts(config_class: type) -> dict[str, type]:
    return getattr(config_class, "sub_configs", None) or {}


def _text_config_class(model_class: type[PreTrainedModel]) -> type:
    return _parts(model_class.config_class).get("text_config", model_class.config_class)


def _declared(config_class: type) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def _known(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    names = _declared(config_class)
    return {key: value for key, value in values.items() if key in names}


def _tiny_text(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Generic values, and per-layer lists shortened so that every kind of the default stays."""
    values = _known(config_class, GENERIC)
    if "kv_lora_rank" in values:  # latents: a KV head for each query head, rotary part apart
        values["num_key_value_heads"] = values["num_attention_heads"]
        values["head_dim"] = values["qk_rope_head_dim"]
    default = config_class()
    if getattr(default, "sliding_window", None) is None:  # a window would make every layer slide
        values.pop("sliding_window", None)
    for field in _declared(config_class):
        if field.endswith("_types") and isinstance(per_layer := getattr(default, field), list):
            values[field] = list(islice(cycle(dict.fromkeys(per_layer)), LAYERS))
    return values


def _tiny_towers(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The configs beside the text config, nested ones too; those of any model keep their default."""
    return {
        part: {**_known(part_class, TOWER), **_tiny_towers(part_class)}
        for part, part_class in _parts(config_class).items()
        if part != "text_config" and part_class is not AutoConfig
    }


def _token_ids(config_class: type[PreTrainedConfig]) -> dict[str, int]:
    """Image, audio, ... tokens at the end of the vocabulary, where no prompt takes its tokens."""
    fields = (name for name in sorted(_declared(config_class)) if re.search("_token_i", name))
    special = {"bos_token_id", "eos_token_id", "pad_token_id"}
    return {name: VOCAB - 1 - i for i, name in enumerate(fields) if name not in special}


def _fill_if_unset(tensor: torch.Tensor) -> None:
    """Random values for weights that a fresh model leaves zero, or does not initialize at all."""
    if tensor.is_floating_point():
        if tensor.ndim > 1 and not tensor.any() or tensor.isnan().any():
            tensor.normal_(0, WIDE)
    elif tensor.ndim == 2 and not tensor.any():  # expert ids by token id: distinct in each row
        rows, top_k = tensor.shape
        tensor.copy_(torch.rand(rows, GENERIC["num_experts"]).argsort(-1)[:, :top_k])
