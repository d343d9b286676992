"""The ways in which a tiny model is divided over ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from zoo import build

# As few as divide; two on each stage of a pipeline where sliding and full attention alternate.
LAYERS = {"gpt_oss": 4}
PROJECTIONS = {
    "deepseek_v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
}
# Projections of latent attention whose outputs are heads; transformers' own plan leaves them whole.
LATENT_HEADS = {"q_b_proj": "colwise", "kv_b_proj": "colwise", "o_proj": "rowwise"}


def _attention_plan(family: str) -> dict[str, str]:
    """Whole attention on every rank; without a plan transformers divides nothing at all."""
    names = PROJECTIONS.get(family, ("q_proj", "k_proj", "v_proj", "o_proj"))
    plan = {f"model.layers.*.self_attn.{name}": "replicate" for name in names}
    return plan | {"lm_head": "replicate"}


def _latent_plan(family: str) -> dict[str, str]:
    return {f"model.layers.*.self_attn.{name}": style for name, style in LATENT_HEADS.items()}


# By name: arguments of `DistributedConfig` for a model family on a number of ranks.
CONFIGS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "ep": lambda family, ranks: {
        "tp_size": ranks,
        "ep_size": ranks,
        "tp_plan": _attention_plan(family),
    },
    "tp": lambda family, ranks: {"tp_size": ranks, "tp_plan": "auto"},
    "tp_of_latents": lambda family, ranks: {"tp_size": ranks, "tp_plan": _latent_plan(family)},
    "tp_ep": lambda family, ranks: {"tp_size": ranks, "ep_size": ranks},
    "pp": lambda family, ranks: {"pp_size": ranks},
    "dp_ep": lambda family, ranks: {"fsdp_size": ranks, "ep_size": ranks},
    "dp_tp": lambda family, ranks: {"fsdp_size": 2, "tp_size": ranks // 2},
}


def save(family: str, folder: Path) -> None:
    """Write the tiny model of `family` as a checkpoint."""
    whole(family).save_pretrained(folder)


def whole(family: str) -> PreTrainedModel:
    """The tiny model of `family` in one process."""
    return build(family, "eager", num_hidden_layers=LAYERS.get(family, 2))


def load(family: str, loading: str, folder: Path) -> Any:
    """The model in `folder`, divided over the ranks of this launch, which end no text.

    Of "plain" and "ddp" each rank has a whole model.
    """
    config = None
    if loading in CONFIGS:
        config = DistributedConfig(**CONFIGS[loading](family, dist.get_world_size()))
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, attn_implementation="eager"
    ).eval()
    model.generation_config.bos_token_id, model.generation_config.pad_token_id = 1, 0
    model.generation_config.eos_token_id = None
    return DistributedDataParallel(model) if loading == "ddp" else model
