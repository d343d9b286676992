"""Capture what a model's attention reads, through a `PiKVCache`, in bounded memory.

Shapes: H KV heads, n queries per KV head, T tokens, D key dim, Dv value dim.
"""

import random
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..cache.pikv_cache import PiKVCache
from ..compressors import Identity
from ..compressors.moments import Moments
from ..model.versions import with_cache

QUERIES = 64  # last tokens of each piece, whose queries over the earlier tokens are captured
KEPT_QUERIES = 256  # queries kept in each window for each KV head, over all its query heads
HELD_OUT = 4  # every fourth piece is held out of training


class Window(NamedTuple):
    """Queries [H, n, D], and the keys [H, T, D] and values [H, T, Dv] of all earlier tokens."""

    query: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Capture:
    """Moments of one layer's keys and values, and a random sample of its windows for training.

    `held_out` are windows of other pieces, which neither the moments nor `fitted` contain.
    """

    scale: float
    keys: Moments
    values: Moments
    fitted: tuple[Window, ...]
    held_out: tuple[Window, ...]

    @property
    def is_finite(self) -> bool:
        return all(bool(m.second.isfinite().all()) for m in (self.keys, self.values))

    @classmethod
    def first(cls, window: Window, scale: float) -> "Capture":
        """Return the capture of piece 0, from its window."""
        moments = Moments.of(window.keys), Moments.of(window.values)
        return cls(scale, *moments, fitted=(_on_cpu(window),), held_out=())

    def then(self, number: int, window: Window, max_windows: int) -> "Capture":
        """Return the capture with the window of piece `number` added.

        `fitted` has at most `max_windows` windows, `held_out` a quarter as many.
        """
        kept = _on_cpu(window)
        if number % HELD_OUT == 1:
            held_out = _drawn(self.held_out, kept, number // HELD_OUT, -(-max_windows // HELD_OUT))
            return replace(self, held_out=held_out)
        before = number - (number + 2) // HELD_OUT
        return replace(
            self,
            keys=self.keys.plus(Moments.of(window.keys)),
            values=self.values.plus(Moments.of(window.values)),
            fitted=_drawn(self.fitted, kept, before, max_windows),
        )


def _on_cpu(window: Window) -> Window:
    return Window(*(states.cpu().contiguous() for states in window))


def _drawn(windows: tuple[Window, ...], new: Window, seen: int, limit: int) -> tuple[Window, ...]:
    """Update `windows`, a uniform sample of `seen` windows, with `new` (reservoir sampling)."""
    if len(windows) < limit:
        return (*windows, new)
    place = random.Random(seen).randint(0, seen)
    return tuple(new if idx == place else window for idx, window in enumerate(windows))


@dataclass(frozen=True)
class Recorder(Identity):
    """A lossless compressor that records the keys, values and queries it is given.

    Keys are recorded after RoPE; for MLA, latents and the queries projected to them. By layer,
    `page` holds keys and values of the current piece's context, `queries` queries and their scale.
    """

    layer_idx: int = -1
    page: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    queries: dict[int, tuple[Tensor, float]] = field(default_factory=dict, repr=False)

    def bind(self, config: PreTrainedConfig, layer_idx: int) -> "Recorder":
        return replace(self, layer_idx=layer_idx)

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        if self.layer_idx not in self.page:  # later pages hold the tokens after the context
            # Copies, because the next layer may overwrite the buffer that a layer seals from.
            self.page[self.layer_idx] = keys[0, :, 0].clone(), values[0, :, 0].clone()
        return super().encode(keys, values)

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        self.queries[self.layer_idx] = query[0], scale
        return super().attend(query, fields, tokens, scale)


class Captured(NamedTuple):
    """The captures of all layers, by layer, after `pieces` pieces of text."""

    pieces: int
    layers: dict[int, Capture]


class Observer:
    """Reads pieces of text with a model and captures what its layers attend to."""

    def __init__(self, model: PreTrainedModel, length: int, windows: int) -> None:
        self.model, self.length, self.windows = model, length, windows
        self.captured = Captured(0, {})
        # The whole context is one page, and only later tokens query it.
        self._recorder = Recorder()
        self._cache = PiKVCache(model, compressor=self._recorder, page_size=length, window=1)

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        """Read one piece `ids` [1, length + 1 + QUERIES] and add it to `captured`.

        `captured` changes in one assignment at the end: an interruption leaves it consistent.
        """
        self._cache.reset()
        self._recorder.page.clear()
        self._recorder.queries.clear()
        decoder: Any = self.model.get_decoder()
        for part in ids.to(self.model.device).tensor_split([self.length + 1], dim=1):
            decoder(input_ids=part, use_cache=True, **with_cache(self._cache))
        number, layers = self.captured.pieces, dict(self.captured.layers)
        for idx, (query, scale) in self._recorder.queries.items():
            window = Window(_some(query, number), *self._recorder.page[idx])
            layers[idx] = (
                Capture.first(window, scale)
                if number == 0
                else layers[idx].then(number, window, self.windows)
            )
        self.captured = Captured(number + 1, layers)

    def close(self) -> None:
        """Detach the cache, which restores the model."""
        self._cache.detach()


def _some(query: Tensor, seed: int) -> Tensor:
    """Return at most `KEPT_QUERIES` of the queries [H, n, D], drawn at random."""
    count = query.shape[1]
    chosen = sorted(random.Random(seed).sample(range(count), min(count, KEPT_QUERIES)))
    return query[:, chosen]
