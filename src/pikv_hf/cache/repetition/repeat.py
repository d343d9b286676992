"""One repetition of a whole text, whose tokens are removed again."""

import copy
from typing import Any

import torch

from ...layer.paged_layer import PagedLayer
from ...storage.memory import tensors_in
from ..paged_cache import PagedCache
from ..token_log import TokenLog
from .listener import Listener
from .text import Text


@torch.no_grad()
def repeat(cache: PagedCache) -> None:
    """Let the model repeat the tail tokens of `cache`, if its scheduler needs their marks.

    Afterwards the cache is as before, with the marks as statistics of the tail tokens.
    Nothing is repeated if the last forward pass has failed.
    """
    how = cache.settings.needs.repetition
    written = [state for state in cache.states if state.is_written]
    log, layers, seen = cache.log, list(cache.layers), cache.log.length
    if how is None or any(state.awaits or state.num_seen != seen for state in written):
        return
    listeners = [Listener(state) for state in written if state.unpaged_reason is None]
    if not listeners:
        return
    saved = [(state, state.saved()) for state in written]
    covered = cache.columns.covered
    text = Text(cache, how, listeners[0].state)
    with cache.reading.prompt(None):
        try:
            for listener in listeners:
                listener.state.listen(listener)
            for number in range(text.chunks):
                parts = text.chunk(number)
                for listener in listeners:
                    listener.hear(parts)
                # Layers that are not paged cannot remove tokens: the repetition writes to copies.
                twins = [x if isinstance(x, PagedLayer) else _twin(x) for x in layers]
                cache.stand_in(twins, TokenLog())
                text.read(parts)
                for state in written:
                    state.crop(seen)
                cache.columns.crop(seen)
        finally:
            cache.stand_in(layers, log)
            cache.step.end()
            cache.columns.crop(seen)
            cache.columns.cover(covered)
            for state, before in saved:
                if state.num_seen > seen:
                    state.crop(seen)
                state.restore(before)
    for listener in listeners:
        listener.state.observed.set_record(listener.marks[..., None])


def _twin(layer: Any) -> Any:
    """Copy a layer, tensors with a gradient included, which `deepcopy` alone refuses."""
    return copy.deepcopy(layer, {id(t): t.detach().clone() for t in tensors_in(vars(layer))})
