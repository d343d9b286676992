"""What a model's attention reads, captured through a cache of our own, in bounded memory.

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

QUERIES = 64  # tokens that ask for the ones before them, in each piece of text
KEPT_QUERIES = 256  # of all query heads of a KV head, in each window
HELD_OUT = 4  # every fourth piece is not fitted to, but judged by


class Window(NamedTuple):
    """Queries [H, n, D] and the keys [H, T, D] and values [H, T, Dv] that lie before them."""

    query: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Capture:
    """What is known of one layer: moments of all its keys and values, and windows drawn at random.

    `held_out` are windows of pieces that count nowhere else.
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
        """Of the window of piece 0."""
        keys, values = (Moments.of(states) for states in window[1:])
        return cls(scale, keys, values, (_on_cpu(window),), ())

    def then(self, number: int, window: Window, most: int) -> "Capture":
        """With the window of piece `number`; at most `most` windows to fit to are kept."""
        kept = _on_cpu(window)
        if number % HELD_OUT == 1:
            held_out = _drawn(self.held_out, kept, number // HELD_OUT, -(-most // HELD_OUT))
            return replace(self, held_out=held_out)
        keys, values = (Moments.of(states) for states in window[1:])
        before = number - (number + 2) // HELD_OUT
        return replace(
            self,
            keys=self.keys.plus(keys),
            values=self.values.plus(values),
            fitted=_drawn(self.fitted, kept, before, most),
        )


def _on_cpu(window: Window) -> Window:
    return Window(*(states.cpu().contiguous() for states in window))


def _drawn(windows: tuple[Window, ...], new: Window, seen: int, most: int) -> tuple[Window, ...]:
    """`windows`, a uniform sample of `seen` ones, with a further one (reservoir sampling)."""
    if len(windows) < most:
        return (*windows, new)
    place = random.Random(seen).randint(0, seen)
    return tuple(new if idx == place else window for idx, window in enumerate(windows))


@dataclass(frozen=True)
class Recorder(Identity):
    """A compressor that loses nothing, and remembers what it was given.

    It sees what every compressor sees: keys after RoPE, latents with queries that were moved to
    them. `page` and `asked` hold, by layer, what the running piece of text has shown.
    """

    layer_idx: int = -1
    page: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    asked: dict[int, tuple[Tensor, float]] = field(default_factory=dict, repr=False)

    def bind(self, config: PreTrainedConfig, layer_idx: int) -> "Recorder":
        return replace(self, layer_idx=layer_idx)

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        if self.layer_idx not in self.page:  # else it is of the tokens that asked
            # Copies: what a layer seals may stand in a buffer that the next layer writes to.
            self.page[self.layer_idx] = keys[0, :, 0].clone(), values[0, :, 0].clone()
        return super().encode(keys, values)

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        self.asked[self.layer_idx] = query[0], scale
        return super().attend(query, fields, tokens, scale)


class Captured(NamedTuple):
    """What the layers have captured, by layer, after `pieces` pieces of text."""

    pieces: int
    layers: dict[int, Capture]


class Observer:
    """Reads pieces of text with a model and keeps what its layers captured."""

    def __init__(self, model: PreTrainedModel, length: int, windows: int) -> None:
        self.model, self.length, self.windows = model, length, windows
        self.captured = Captured(0, {})
        # One page for the whole context, and nothing of it asked for by its own tokens.
        self._recorder = Recorder()
        self._cache = PiKVCache(model, compressor=self._recorder, page_size=length, window=1)

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        """Read one piece [1, length + 1 + QUERIES].

        `captured` is replaced at the end, at once: it stays whole when this is interrupted.
        """
        self._cache.reset()
        self._recorder.page.clear()
        self._recorder.asked.clear()
        decoder: Any = self.model.get_decoder()
        for part in ids.to(self.model.device).tensor_split([self.length + 1], dim=1):
            decoder(input_ids=part, use_cache=True, **with_cache(self._cache))
        number, layers = self.captured.pieces, dict(self.captured.layers)
        for idx, (query, scale) in self._recorder.asked.items():
            window = Window(_some(query, number), *self._recorder.page[idx])
            layers[idx] = (
                Capture.first(window, scale)
                if number == 0
                else layers[idx].then(number, window, self.windows)
            )
        self.captured = Captured(number + 1, layers)

    def close(self) -> None:
        """Leave the model as it was."""
        self._cache.detach()


def _some(query: Tensor, seed: int) -> Tensor:
    """At most `KEPT_QUERIES` of the queries [H, n, D]."""
    count = query.shape[1]
    chosen = sorted(random.Random(seed).sample(range(count), min(count, KEPT_QUERIES)))
    return query[:, chosen]
