"""How the keys of a layer turn with their position (RoPE, Su et al., arXiv 2104.09864)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .versions import cache_in

# Positions of the tokens that a model is asked for: low frequencies show at large ones only.
PROBED = (0, 1, 1023, 1_000_003)
# What of the change of a key with its position may remain unexplained: float32, shorter types.
UNEXPLAINED, UNEXPLAINED_SHORT = 1e-3, 3e-2
# A key that changes less, in relation to its length, does not depend on its position.
UNCHANGED = 1e-3


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotation by position of the keys that a layer caches, and of the queries asked of them.

    Dims `offset` and later of a key are n pairs, of which pair i turns by `frequencies[i]` per
    position (float32, [n]): neighbours if `interleaved`, else dims i and n + i. The others do not
    turn; with n = 0 none does. Rotations keep lengths, so that the factor of a scaled rotary
    embedding (YaRN) is a part of the key.
    """

    frequencies: Tensor
    offset: int = 0
    interleaved: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether keys do not depend on their positions (NoPE)."""
        return self.frequencies.numel() == 0

    @property
    def turning(self) -> slice:
        """The dims that turn."""
        return slice(self.offset, self.offset + 2 * self.frequencies.numel())

    def rotate(self, states: Tensor, source: Tensor, target: Tensor | int) -> Tensor:
        """`states` [..., T, D] of positions `source` as the model makes them at `target`.

        Positions are whole numbers [..., T] that broadcast, negative ones included. The same dtype;
        what stays where it is keeps every bit.
        """
        target = torch.as_tensor(target, device=source.device)
        stays = (source == target)[..., None].to(states.device)
        turned = self._turn(states, *self._between(source, target, states.device))
        return torch.where(stays, states, turned.to(states.dtype))

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """`states` [..., T, D] of `positions` [..., T] as they are at position 0, in float32."""
        return self.rotate(states.float(), positions, 0)

    def ahead(self, states: Tensor, first: int, count: int) -> Tensor:
        """Position-free `states` [..., D] turned by the mean rotation of `count` positions.

        The first of them is `first`. The mean is linear, but shortens vectors. Float32.
        """
        future = torch.arange(first, first + count, device=states.device)
        cos, sin = self._between(torch.zeros_like(future), future, states.device)
        return self._turn(states, cos.mean(0), sin.mean(0))

    def _between(
        self, source: Tensor, target: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine [..., T, n] of the angles from `source` to `target`.

        Each position's angle is rounded to float32, as in the model, and their difference is not.
        """
        frequencies = self.frequencies.to(device)
        a, b = (at.to(device, torch.float32)[..., None] * frequencies for at in (source, target))
        cos, sin = a.cos(), a.sin()
        return b.cos() * cos + b.sin() * sin, b.sin() * cos - b.cos() * sin

    def _turn(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`states` with pair i multiplied by the matrix [[cos, -sin], [sin, cos]], in float32."""
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
    """Refuse positions [axes, B, T] of images, of which columns of the sequence tell nothing."""
    if position_ids is None or position_ids.dim() < 3 or position_ids.shape[-1] == 1:
        return
    if not (position_ids[:1] == position_ids).all():
        raise ValueError(
            "`scheduler` moves keys or queries to other positions, which cannot be done behind images "
            "or videos, whose tokens have several positions each: use another scheduler."
        )


def rotaries(decoder: Any, attention: dict[int, list[nn.Module]]) -> dict[int, Rotary]:
    """The rotation of each layer in `attention`, the modules by cache layer of a `decoder`.

    The decoder is asked for the keys of one token at several positions, which costs a forward pass
    of four tokens, and the rotation is the one by frequencies of its rotary modules that explains
    them. Changes nothing.

    Raises:
        ValueError: keys of a layer turn in no such way, or by angles that change with the length
            of the sequence; the decoder is a part of an encoder-decoder.
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
    """Angles per position [n] that a rotary module holds: one tensor, or one per layer type."""
    return [
        buffer.detach().float().clone()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1
    ]


@torch.no_grad()
def _keys_by_position(
    decoder: Any, attention: dict[int, list[nn.Module]], rotary: list[nn.Module]
) -> dict[int, Tensor]:
    """Keys [len(PROBED), H, D] of the same token at each of the positions, by layer.

    Only the `rotary` modules are given these positions, for the rest of the decoder all are 0: what
    else depends on them (sparse attention, temperatures) may not reach so far.
    """
    device = decoder.device if decoder.device.type != "meta" else "cpu"
    probed = torch.tensor(PROBED, device=device)[:, None]

    def moved(value: Any) -> Any:
        is_positions = isinstance(value, Tensor) and not value.is_floating_point()
        return probed.to(value.device).expand_as(value) if is_positions else value

    def move(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    def repeat(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Every row gets the hidden state of the first: roundings do not add up over layers."""
        if "hidden_states" not in kwargs:
            return (args[0][:1].expand_as(args[0]), *args[1:]), kwargs
        states = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": states[:1].expand_as(states)}

    attending = [module for modules in attention.values() for module in modules]
    hooks = [m.register_forward_pre_hook(move, with_kwargs=True) for m in rotary]
    hooks += [m.register_forward_pre_hook(repeat, with_kwargs=True) for m in attending]
    try:
        # With autocast keys would be rounded more than their dtype tells.
        with torch.autocast(probed.device.type, enabled=False):
            out = decoder(
                inputs_embeds=decoder.get_input_embeddings()(torch.ones_like(probed)),
                position_ids=torch.zeros_like(probed) if rotary else probed,
                use_cache=True,
            )
    finally:
        for hook in hooks:
            hook.remove()
    layers = cache_in(out).layers
    return {idx: _cached(layers[idx], found[0])[:, :, 0] for idx, found in attention.items()}


def _cached(layer: Any, module: nn.Module) -> Tensor:
    """Keys as a paged layer holds them: latents have their rotary key beside them."""
    keys, rank = layer.keys, getattr(module, "kv_lora_rank", None)
    is_latent = hasattr(module, "kv_b_proj") and keys.shape[1] == 1 and keys.shape[3] == rank
    return torch.cat([keys, layer.values], dim=-1) if is_latent else keys


def _fit(keys: Tensor, candidates: list[Tensor], idx: int) -> Rotary:
    """The rotation that explains the `keys` [len(PROBED), H, D] of layer `idx`."""
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
    """Rotations by these angles of the first or the last dims of keys, with both kinds of pairs.

    Each in the order of the frequencies, and in that which suits the keys best: models that see
    images order them by axis.
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
    """Of `frequencies` [n] the one for each of the n pairs that explains its change best."""

    def as_complex(keys: Tensor) -> Tensor:
        shape, pair = ((-1, 2), -1) if interleaved else ((2, -1), -2)
        return torch.complex(*keys.unflatten(-1, shape).unbind(pair))

    frequencies = frequencies.to(first.device)
    angles = torch.tensor(PROBED[1:], device=first.device)[:, None, None, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    error = as_complex(first)[..., None] * turn - as_complex(others)[..., None]
    return frequencies[error.abs().square().sum((0, 1)).argmin(-1)]
