"""Make a profile of a model's KV heads from texts.

An interrupted run leaves its state in a file beside the result. Repeating the call resumes it.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ..cache.pikv_cache import PiKVCache
from ..model.artifact import ModelIdentity, read_metadata
from ..model.versions import with_cache
from ..schedulers.duo import PROFILE, SCORES
from .head_effect import Effect, HeadEffect
from .profile_job import Job
from .resumable import SAVE_EVERY_S, write

Pieces = Callable[[int], Iterable[Tensor]]


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
    max_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_tokens is not None and job.length > max_tokens:
        raise ValueError(
            f"`length` is {job.length}, but the model reads at most {max_tokens} tokens."
        )
    identity = asdict(ModelIdentity.of(model))
    metadata = {"model": identity, "job": asdict(job), "source": source}
    partial = out.with_name(out.name + ".partial")
    done, sums = _load(partial, metadata)
    scheduler = HeadEffect(job.sinks, job.recent, sums)
    decoder: Any = model.get_decoder()
    saved_at, whole = time.monotonic(), dict(sums)
    with PiKVCache(model, scheduler=scheduler, budget=2, page_size=1, window=1) as cache:
        try:
            for ids in pieces(done):
                cache.reset()
                with torch.no_grad():
                    decoder(input_ids=ids.to(model.device), use_cache=True, **with_cache(cache))
                done, whole = done + 1, dict(sums)
                if time.monotonic() - saved_at > SAVE_EVERY_S:
                    _save(partial, whole, metadata | {"done": done})
                    saved_at = time.monotonic()
        except ValueError:
            raise  # resuming would fail again
        except BaseException:
            _save(partial, whole, metadata | {"done": done})
            raise
    if not done:
        raise ValueError(f"the texts have fewer than {job.length} tokens: give more, or `length`.")
    if not whole:
        raise ValueError(f"`model` is {type(model).__name__}, of which no layer can be paged.")
    scores = {layer: effect.scores for layer, effect in sorted(whole.items())}
    if not all(bool(s.isfinite().all()) for s in scores.values()):
        raise ValueError("the attention of the model returned numbers that are NaN or infinite.")
    tensors = {f"{SCORES}{layer}": found for layer, found in scores.items()}
    write(out, tensors, metadata | {"done": done}, PROFILE.key)
    partial.unlink(missing_ok=True)
    return scores


def _save(path: Path, sums: dict[int, Effect], metadata: dict[str, Any]) -> None:
    tensors = {f"{layer}.{k}": t for layer, e in sums.items() for k, t in e._asdict().items()}
    write(path, tensors, metadata, PROFILE.key)


def _load(path: Path, metadata: dict[str, Any]) -> tuple[int, dict[int, Effect]]:
    """Return how many texts an interrupted call has read, and their sums by layer."""
    if not path.exists():
        return 0, {}
    found = read_metadata(path, PROFILE)
    expected = json.loads(json.dumps(metadata))
    if any(found[name] != expected[name] for name in expected):
        raise ValueError(
            f"`{path}` was left by a profile of another model, other texts or other options: "
            "delete it, or write to another file."
        )
    with safe_open(path, framework="pt") as file:
        layers = {int(name.partition(".")[0]) for name in file.keys()}  # noqa: SIM118
        return found["done"], {
            layer: Effect(*(file.get_tensor(f"{layer}.{name}") for name in Effect._fields))
            for layer in sorted(layers)
        }
