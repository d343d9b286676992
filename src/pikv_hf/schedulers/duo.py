from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.artifact import FileKind, check_model, read_factors, read_metadata
from ..validation import check_number, check_whole
from .base import Candidates, Needs, Scheduler, Traits
from .top_tokens import best_of_each_head

PROFILE = FileKind("profile", "pikv_profile", "pikv profile")
SCORES = "scores."


@dataclass(frozen=True)
class Duo(Scheduler):
    """Keeps all tokens in some heads, few in others (Xiao et al., arXiv 2410.10819, section 2).

    DuoAttention: retrieval heads keep every token, streaming heads only sinks and recent tokens. A
    share `sparsity` of the model's KV heads streams, the heads with the lowest scores in the
    profile. The paper learns scores by distillation; `pikv profile` measures how much the output of
    the layer's attention changes when the head streams.

    The lengths of the heads follow, so the cache is given no `budget`. Tokens are evicted in pages:
    a streaming head holds up to `page_size - 1` tokens more. An eviction reads and writes all pages
    of a layer, so a larger `interval` of the cache is faster.

    Args:
        profile: the file that `pikv profile` made for the model.
        sparsity: share of all KV heads that stream, in [0, 1].
        sinks: first tokens that a streaming head keeps, >= 0.
        recent: newest tokens that a streaming head keeps, >= 1 and >= the cache's `window`.
    """

    needs_file: ClassVar[bool] = True

    profile: str | PathLike[str] | None = None
    sparsity: float = 0.5
    sinks: int = 64
    recent: int = 256
    # By layer: True for KV heads [H] that stream.
    _streams: dict[int, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, minimum in (("sinks", 0), ("recent", 1)):
            check_whole(name, getattr(self, name), minimum)
        check_number("sparsity", self.sparsity, "[0, 1]")
        if self.profile is not None and not isinstance(self.profile, str | PathLike):
            raise TypeError(
                f"`profile` is {self.profile!r}; it must be the path of a file that `pikv profile` "
                "made."
            )
        scores = {} if self.profile is None else read_profile(self.profile)
        object.__setattr__(self, "_streams", streaming_heads(scores, self.sparsity))

    def check(self, model: PreTrainedModel, layers: int) -> None:
        if self.profile is None:
            raise ValueError(
                "`scheduler` is 'duo', which needs to know the model's heads: make a file with `pikv "
                "profile` and pass Duo(profile=...)."
            )
        check_model(self.profile, model, PROFILE)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Duo":
        return self  # copies of a cache share what the profile says

    def tensors(self, layer_idx: int) -> Iterable[Tensor]:
        return (self._streams[layer_idx],)

    @property
    def needs(self) -> Needs:
        return Needs(sinks=self.sinks)

    @property
    def traits(self) -> Traits:
        return Traits(is_ragged=True, has_lengths=True, decides_by_scores=False)

    def budget(self, seen: int) -> int:
        """Return the tokens that a streaming head holds."""
        return self.sinks + self.recent

    def lengths(self, layer_idx: int, left: int, budget: int) -> Tensor:
        streams = self._streams[layer_idx]
        return torch.full(streams.shape, left).masked_fill(streams, budget)

    def scores(self, tokens: Candidates) -> Tensor:
        number = tokens.number().expand(tokens.positions.shape)
        return tokens.positions.double().masked_fill(number < self.sinks, torch.inf)

    def keep(self, tokens: Candidates, budget: int) -> Tensor:
        held = tokens.number().amax(-1).expand(tokens.positions.shape[:2]) + 1
        streams = self._streams[tokens.layer_idx].to(held.device)
        if len(streams) != held.shape[1]:
            raise ValueError(
                f"`profile` has {len(streams)} KV heads for layer {tokens.layer_idx}, but the cache "
                f"has {held.shape[1]}: make one for this model with `pikv profile`."
            )
        counts = torch.where(streams, held.clamp_max(budget), held)
        return best_of_each_head(self.ranked(tokens, budget), counts)


def read_profile(path: str | PathLike[str]) -> dict[int, Tensor]:
    """Read the scores [H] of the KV heads of each layer, by layer.

    Raises:
        ValueError: there is no such file, or `pikv profile` did not make it.
    """
    read_metadata(path, PROFILE)
    return {int(layer): scores for layer, scores in read_factors(path, SCORES).items()}


def streaming_heads(scores: dict[int, Tensor], sparsity: float) -> dict[int, Tensor]:
    """Return masks [H], by layer, of the heads in the share `sparsity` of lowest scores."""
    if not scores:
        return {}
    layers = sorted(scores)
    joined = torch.cat([scores[layer] for layer in layers]).double()
    lowest = joined.argsort(stable=True)[: round(sparsity * len(joined))]
    streams = torch.zeros(len(joined), dtype=torch.bool).index_fill(0, lowest, True)
    parts = streams.split([len(scores[layer]) for layer in layers])
    return dict(zip(layers, parts, strict=True))
