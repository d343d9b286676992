"""Make a profile of a model's KV heads from texts.

An interrupted run leaves its state in a file beside the result. Repeating the call resumes it.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache.pikv_cache import PiKVCache
from ..model.loading import check_length
from ..model.versions import with_cache
from ..schedulers.duo import PROFILE, SCORES
from .head_effect import Effect, HeadEffect
from .profile_job import Job
from .resumable import Resumable

Pieces = Callable[[int], Iterable[Tensor]]


class Progress(Resumable):
    """The sums of a profile over the texts that are `done`, by layer."""

    def __init__(self, *arguments: Any) -> None:
        self.done = 0
        self.sums: dict[int, Effect] = {}
        super().__init__(PROFILE, *arguments)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        sums = self.sums.items()
        tensors = {f"{layer}.{k}": t for layer, e in sums for k, t in e._asdict().items()}
        return tensors, {"done": self.done}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self.done = metadata["done"]
        for layer in sorted({int(name.partition(".")[0]) for name in tensors}):
            self.sums[layer] = Effect(*(tensors[f"{layer}.{name}"] for name in Effect._fields))


def profile(
    model: PreTrainedModel, pieces: Pieces, out: Path, job: Job, source: str = ""
) -> dict[int, Tensor]:
    """Measure the KV heads of `model` on texts, and write the profile to `out`.

    The texts are read one after the other; at most one layer of one text is held in memory. An
    interrupted call (an exception, Ctrl-C) writes its state to `out` + ".partial". Calling again
    with equal arguments resumes it and leads to the file that an uninterrupted call writes.

    Args:
        pieces: a function of n that returns the token ids [1, tokens] of all texts but the first n.
        source: identifies the texts, so that a call with other texts is not resumed.

    Returns:
        The scores [H] of each layer: the norm of the change of its attention output when a head
        reads only sinks and recent tokens, over the output's norm. `model` is left as it was.

    Raises:
        ValueError: no text; a model whose heads share one latent (MLA) or are not cached; or the
            partial file was written by a call with other arguments.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"`model` is {type(model).__name__}: encoder-decoders are not profiled.")
    check_length(model, job.length, f"`length` is {job.length}")
    progress = Progress(model, out, job, source)
    scheduler = HeadEffect(job.sinks, job.recent, dict(progress.sums))
    decoder: Any = model.get_decoder()
    with (
        PiKVCache(model, scheduler=scheduler, budget=2, page_size=1, window=1) as cache,
        progress.saved_if_interrupted(),
    ):
        for ids in pieces(progress.done):
            cache.reset()
            with torch.no_grad():
                decoder(input_ids=ids.to(model.device), use_cache=True, **with_cache(cache))
            progress.done, progress.sums = progress.done + 1, dict(scheduler.sums)
            progress.save_sometimes()
    if not progress.done:
        raise ValueError(f"the texts have fewer than {job.length} tokens: give more, or `length`.")
    if not progress.sums:
        raise ValueError(f"`model` is {type(model).__name__}, of which no layer can be paged.")
    scores = {layer: effect.scores for layer, effect in sorted(progress.sums.items())}
    if not all(bool(s.isfinite().all()) for s in scores.values()):
        raise ValueError("the attention of the model returned numbers that are NaN or infinite.")
    tensors = {f"{SCORES}{layer}": found for layer, found in scores.items()}
    progress.finish(tensors, {"done": progress.done})
    return scores
