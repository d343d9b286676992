"""Refusals of methods that would choose otherwise where ranks run parts of a model."""

from torch import nn

from ..layer.settings import Settings
from ..model.parallel import Parallelism
from ..routers import PageRouter


def check_division(
    settings: Settings, division: Parallelism, attention: dict[int, list[nn.Module]]
) -> None:
    """Refuse methods that would not give on a rank what they give in one process.

    `attention` are the attention modules of paged layers.

    Raises:
        ValueError: a method depends on all heads, or on all layers, of which this rank has some.
    """
    if division.shards_heads:
        parts = f"the attention heads of the model are divided over {division.tp} ranks"
        for name in _needing_all_heads(settings):
            raise ValueError(
                f"`{name}` is {getattr(settings, name)}, whose result for a KV head depends on the "
                f"other heads or on its number, but {parts}: use a method whose KV heads choose "
                "independently, or load the model with whole attention on every rank."
            )
        is_latent = any(hasattr(modules[0], "kv_b_proj") for modules in attention.values())
        for name in _reading_queries(settings) if is_latent else ():
            raise ValueError(
                f"`{name}` is {getattr(settings, name)}, which may read queries, but {parts}, so that each "
                "would choose differently among the latents that all share: use a method that reads "
                "no queries, or load the model with whole attention on every rank."
            )
    if division.layers is not None:
        for name in _linking_layers(settings):
            raise ValueError(
                f"`{name}` is {getattr(settings, name)}, whose choice in a layer depends on other "
                f"layers, but the layers of the model are divided over {division.pp} ranks: use a "
                "method that chooses in each layer alone."
            )


def _needing_all_heads(settings: Settings) -> list[str]:
    router = settings.router
    splits = {
        "scheduler": settings.traits.is_splittable,
        "compressor": settings.compressor.is_splittable,
        "router": not isinstance(router, PageRouter) or router.is_splittable,
    }
    return [name for name, is_splittable in splits.items() if not is_splittable]


def _reading_queries(settings: Settings) -> list[str]:
    needs = settings.needs
    reads = {
        "scheduler": needs.queries or needs.statistics or needs.repetition,
        "compressor": settings.compressor.observed_queries,
        "router": isinstance(settings.router, PageRouter),
    }
    return [name for name, is_read in reads.items() if is_read]


def _linking_layers(settings: Settings) -> list[str]:
    links = {
        "scheduler": settings.traits.links_layers or settings.needs.repetition,
        "router": settings.labels_by_earlier_gate,
    }
    return [name for name, is_linked in links.items() if is_linked]
