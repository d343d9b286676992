"""Rotation of a layer's keys by their position (RoPE, Su et al., arXiv 2104.09864)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .versions import cache_in

# Positions at which keys are probed; low frequencies are visible only at large positions.
PROBED = (0, 1, 1023, 1_000_003)
# Share of a key's change with position that may stay unexplained, in float32 and in 16 bits.
UNEXPLAINED, UNEXPLAINED_SHORT = 1e-3, 3e-2
# A key that changes by less than this share of its norm does not depend on its position.
UNCHANGED = 1e-3


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotation by position of the keys that a layer caches, and of queries that read them.

    From dim `offset` on a key has n pairs of dims, neighbours if `interleaved`, else dims i and
    n + i. Pair i turns by `frequencies[i]` per position (float32, [n]), other dims do not; n may be
    0. Rotations keep norms: the factor of a scaled embedding (YaRN) is a part of the key.
    """

    frequencies: Tensor
    offset: int = 0
    interleaved: bool = False

    @property
    def is_identity(self) -> bool:
        """True if keys do not depend on their positions (NoPE)."""
        return self.frequencies.numel() == 0

    @property
    def turning(self) -> slice:
        """The dims that turn."""
        return slice(self.offset, self.offset + 2 * self.frequencies.numel())

    def rotate(self, states: Tensor, source: Tensor, target: Tensor | int) -> Tensor:
        """Move `states` [..., T, D] from positions `source` to `target`, as the model makes them.

        Positions are whole numbers [..., T] that broadcast, also negative. Keeps the dtype; states
        that do not move keep every bit.
        """
        target = torch.as_tensor(target, device=source.device)
        unmoved = (source == target)[..., None].to(states.device)
        turned = self._turn(states, *self._between(source, target, states.device))
        return torch.where(unmoved, states, turned.to(states.dtype))

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """Move `states` [..., T, D] from `positions` [..., T] to position 0, in float32."""
        return self.rotate(states.float(), positions, 0)

    def ahead(self, states: Tensor, first: int, count: int) -> Tensor:
        """Turn position-free `states` [..., D] by the mean rotation of `count` positions.

        The positions begin at `first`. The mean is linear, but shortens vectors. Float32.
        """
        future = torch.arange(first, first + count, device=states.device)
        cos, sin = self._between(torch.zeros_like(future), future, states.device)
        return self._turn(states, cos.mean(0), sin.mean(0))

    def _between(
        self, source: Tensor, target: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [..., T, n] of the angles from `source` to `target`.

        Angles of positions are rounded to float32, as in the model; their differences are not.
        """
        frequencies = self.frequencies.to(device)
        a, b = (at.to(device, torch.float32)[..., None] * frequencies for at in (source, target))
        cos, sin = a.cos(), a.sin()
        return b.cos() * cos + b.sin() * sin, b.sin() * cos - b.cos() * sin

    def _turn(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Multiply pair i of `states` by the matrix [[cos, -sin], [sin, cos]], in float32."""
        start, pairs = self.offset, self.frequencies.numel()
        if self.interleaved:
            first = slice(start, start + 2 * pairs, 2)
            second = slice(start + 1, start + 2 * pairs, 2)
        else:
            first, second = slice(start, start + pairs), slice(start + pairs, start + 2 * pairs)
        x, y = states[..., first].float(), states[..., second].float()
        shape = torch.broadcast_shapes(x.shape, cos.shape)[:-1]
        turned = states.float().expand(*shape, states.shape[-1]).clone()
        turned[..., first] = x * cos - y * sin
        turned[..., second] = y * cos + x * sin
        return turned


def check_axes(position_ids: Tensor | None) -> None:
    """Refuse positions [axes, B, T] of images, which do not follow from sequence columns."""
    if position_ids is None or position_ids.dim() < 3 or position_ids.shape[-1] == 1:
        return
    if not (position_ids[:1] == position_ids).all():
        raise ValueError(
            "`scheduler` moves keys or queries to other positions, which cannot be done after "
            "images or videos, whose tokens have several positions each: use another scheduler."
        )


def rotaries(decoder: Any, attention: dict[int, list[nn.Module]]) -> dict[int, Rotary]:
    """Return the rotation of each layer in `attention`, the modules of `decoder` by cache layer.

    One forward pass gives the keys of one token at the positions `PROBED`. The frequencies of the
    rotary modules are tried until a rotation explains these keys. Changes nothing.

    Raises:
        ValueError: no such rotation explains the keys, angles change with the sequence length, or
            the decoder is a part of an encoder-decoder.
    """
    if not attention:
        return {}
    if decoder.config.is_encoder_decoder:
        raise ValueError(
            f"{type(decoder).__name__} belongs to an encoder-decoder, which has no rotary "
            "embedding: its keys and queries cannot be moved to other positions."
        )
    modules = [module for module in decoder.modules() if _frequencies(module)]
    for module in modules:
        types = getattr(module, "rope_type", "default")
        for rope_type in types.values() if isinstance(types, dict) else (types,):
            if "dynamic" in rope_type or rope_type == "longrope":
                raise ValueError(
                    f"the rotary embedding of {type(decoder).__name__} is of type {rope_type!r}, "
                    "whose angles change with the length of the sequence: cached keys cannot be "
                    "moved to other positions."
                )
    keys = _keys_by_position(decoder, attention, modules)
    candidates = [found for module in modules for found in _frequencies(module)]
    return {idx: _fit(keys[idx], candidates, idx) for idx in sorted(attention)}


def _frequencies(module: nn.Module) -> list[Tensor]:
    """Return the angles per position [n] of a rotary module: one tensor, or one per layer type."""
    return [
        buffer.detach().float().clone()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1
    ]


@torch.no_grad()
def _keys_by_position(
    decoder: Any, attention: dict[int, list[nn.Module]], rotary: list[nn.Module]
) -> dict[int, Tensor]:
    """Return the keys [len(PROBED), H, D] of one token at each probed position, by layer.

    Only the `rotary` modules get these positions, and the rest of the decoder gets position 0:
    sparse attention or temperatures may not allow such large ones. Without them all get `PROBED`.
    """
    device = decoder.device if decoder.device.type != "meta" else "cpu"
    probed = torch.tensor(PROBED, device=device)[:, None]

    def moved(value: Any) -> Any:
        is_positions = isinstance(value, Tensor) and not value.is_floating_point()
        return probed.to(value.device).expand_as(value) if is_positions else value

    def move(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    def repeat(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Give every row the hidden state of row 0, so that roundings do not add up over layers."""
        if "hidden_states" not in kwargs:
            return (args[0][:1].expand_as(args[0]), *args[1:]), kwargs
        states = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": states[:1].expand_as(states)}

    states = decoder.get_input_embeddings()(torch.ones_like(probed))
    if not states.is_floating_point():  # a later stage of a pipeline has no embeddings
        size = decoder.config.hidden_size
        states = torch.linspace(-1, 1, size, dtype=decoder.dtype, device=device)
        states = states.expand(*probed.shape, -1)
    attending = [module for modules in attention.values() for module in modules]
    hooks = [m.register_forward_pre_hook(move, with_kwargs=True) for m in rotary]
    hooks += [m.register_forward_pre_hook(repeat, with_kwargs=True) for m in attending]
    try:
        # Autocast would round keys more than `_fit` expects from their dtype.
        with torch.autocast(probed.device.type, enabled=False):
            out = decoder(
                inputs_embeds=states,
                position_ids=torch.zeros_like(probed) if rotary else probed,
                use_cache=True,
            )
    finally:
        for hook in hooks:
            hook.remove()
    layers = cache_in(out).layers
    return {idx: _cached(layers[idx], found[0])[:, :, 0] for idx, found in attention.items()}


def _cached(layer: Any, module: nn.Module) -> Tensor:
    """Return keys as a paged layer holds them: latents concatenated with their rotary key."""
    keys, rank = layer.keys, getattr(module, "kv_lora_rank", None)
    is_latent = hasattr(module, "kv_b_proj") and keys.shape[1] == 1 and keys.shape[3] == rank
    return torch.cat([keys, layer.values], dim=-1) if is_latent else keys


def _fit(keys: Tensor, candidates: list[Tensor], idx: int) -> Rotary:
    """Return the rotation that explains the `keys` [len(PROBED), H, D] of layer `idx`."""
    first, others = keys[:1].float(), keys[1:].float()
    change = (others - first).norm()
    if change <= UNCHANGED * others.norm():
        return Rotary(torch.empty(0))
    source, target = torch.zeros(1, 1, dtype=torch.long), torch.tensor(PROBED[1:])[:, None]
    limit = UNEXPLAINED if keys.dtype == torch.float32 else UNEXPLAINED_SHORT
    for frequencies in candidates:
        for rotary in _layouts(frequencies, first, others):
            if (rotary.rotate(first, source, target) - others).norm() <= limit * change:
                return rotary
    raise ValueError(
        f"layer {idx}: no rotary embedding of the model explains how its keys change with their "
        "position: they, and queries, cannot be moved to other positions."
    )


def _layouts(frequencies: Tensor, first: Tensor, others: Tensor) -> Iterator[Rotary]:
    """Yield rotations by `frequencies` of the first or last dims, with both kinds of pairs.

    The frequencies come first in the given order, then in the order that fits the keys best:
    models that see images order frequencies by axis.
    """
    pairs = frequencies.numel()
    rest = first.shape[-1] - 2 * pairs
    for offset in sorted({0, rest}) if rest >= 0 else ():
        for interleaved in (False, True):
            yield Rotary(frequencies, offset, interleaved)
    for interleaved in (False, True):
        if rest == 0:
            yield Rotary(_reordered(frequencies, interleaved, first, others), 0, interleaved)


def _reordered(frequencies: Tensor, interleaved: bool, first: Tensor, others: Tensor) -> Tensor:
    """Return for each of the n pairs the frequency of `frequencies` [n] that fits it best."""

    def as_complex(keys: Tensor) -> Tensor:
        shape, pair = ((-1, 2), -1) if interleaved else ((2, -1), -2)
        return torch.complex(*keys.unflatten(-1, shape).unbind(pair))

    frequencies = frequencies.to(first.device)
    angles = torch.tensor(PROBED[1:], device=first.device)[:, None, None, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    error = as_complex(first)[..., None] * turn - as_complex(others)[..., None]
    return frequencies[error.abs().square().sum((0, 1)).argmin(-1)]
