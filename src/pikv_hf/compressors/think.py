import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from typing_extensions import Self

from ..validation import check_number
from .base import Compressor, computed_dtype, portion


@dataclass(frozen=True)
class ThinK(Compressor):
    """Drops the key channels that the newest queries use least (ThinK, arXiv 2407.21018).

    For each page of a row and KV head the floor((1 - ratio) D) channels j of largest |Q_j| |K_j|
    are kept. The product is the Frobenius norm of Q_j K_j^T in the paper, with Q the observed
    queries of all query heads of the KV head. The indices of the kept channels are stored, too.
    (The paper selects once for a whole prompt.) Values are kept unchanged, as in the paper's main
    method. Without queries the channels of largest |K_j| are kept. The latents of MLA are values,
    too, except for their rotary channels: a share `ratio` of these is pruned, other channels are
    kept unchanged. With DeepSeek's 64 rotary channels of 576 this saves at most 1/9 of the bytes.

    Attention reads the kept channels, and only these channels of the query. Tokens that a scheduler
    moves to other pages are pruned again; their lost channels are not restored.

    Args:
        ratio: share of key channels that is dropped, from 0 (nothing is lost) to less than 1.
    """

    observed_queries: ClassVar[int] = 32  # the observation window of the paper

    ratio: float = 0.4
    # Channels at the end of a latent that are not values; 0 if the model does not tell.
    _rotary: int = field(default=0, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, "[0, 1)")

    def bind(self, config: PreTrainedConfig, layer_idx: int) -> Self:
        rotary = getattr(config, "qk_rope_head_dim", None)
        return replace(self, _rotary=rotary) if isinstance(rotary, int) else self

    def check_dims(self, key_dim: int, value_dim: int) -> None:
        if value_dim == 0 and not 0 < self._rotary <= key_dim:
            raise ValueError(
                "think drops key channels, but latents (MLA) are keys and values at once, apart "
                "from a rotary part of unknown size (the config does not tell, or this is a member "
                "of another compressor): use another compressor, such as int8."
            )

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return self._encode(keys, values, None)

    def encode_observed(self, keys: Tensor, values: Tensor, queries: Tensor) -> dict[str, Tensor]:
        return self._encode(keys, values, queries)

    def _encode(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> dict[str, Tensor]:
        self.check_dims(keys.shape[-1], values.shape[-1])
        is_latent = values.shape[-1] == 0
        flag = {"is_latent": values} if is_latent else {}  # takes no bytes: only a flag
        if is_latent:
            values, keys = keys.tensor_split([-self._rotary], dim=-1)
        usage = keys.new_ones(())
        if queries is not None:
            queries = queries[..., -keys.shape[-1] :].to(computed_dtype(queries.dtype))
            usage = queries.square().sum(2)[:, :, None]
        return self._pruned(keys, values, usage) | flag

    def _pruned(self, keys: Tensor, values: Tensor, usage: Tensor) -> dict[str, Tensor]:
        """Prune keys; `usage` [R, H, 1, Dk] or scalar is the sum of squares of query channels."""
        dim, step, wide = keys.shape[-1], portion(keys), computed_dtype(keys.dtype)
        norms = (torch.linalg.vector_norm(t, dim=-2, dtype=wide) for t in keys.split(step, dim=2))
        squares = torch.cat([*norms], dim=2).square()
        # A stable sort, so that ties are always broken alike.
        order = (squares * usage).sort(dim=-1, descending=True, stable=True).indices
        channels = order[..., : self._kept(dim)].sort(dim=-1).values
        kept = keys.new_empty(*keys.shape[:-1], channels.shape[-1])
        portions = (t.split(step, dim=2) for t in (kept, keys, channels))
        for out, part, index in zip(*portions, strict=True):
            out.copy_(part.gather(-1, index[..., None, :].expand(*part.shape[:-1], -1)))
        return {
            "kept_keys": kept,
            "channels": channels.to(torch.uint8 if dim <= 256 else torch.int16),
            "values": values,
            "key_dim": keys[..., :0, :],  # takes no bytes: its shape tells the number of channels
        }

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        kept, values = fields["kept_keys"], fields["values"]
        channels = fields["channels"].long()[..., None, :].expand(kept.shape)
        keys = kept.new_zeros(*kept.shape[:-1], fields["key_dim"].shape[-1])
        keys = keys.scatter_(-1, channels, kept)
        if "is_latent" in fields:
            return torch.cat([values, keys], dim=-1), fields["is_latent"]
        return keys, values

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        kept, pages = fields["kept_keys"], fields["kept_keys"].shape[2]
        # Query channels are copied for each page, or keys are decoded if that copy is smaller.
        if query.shape[2] > kept.shape[3] or "is_latent" in fields:
            return super().attend(query, fields, tokens, scale)
        index = fields["channels"].long()[:, :, :, None].expand(-1, -1, -1, query.shape[2], -1)
        queries = query[:, :, None].expand(-1, -1, pages, -1, -1).gather(-1, index)
        if query.dtype == torch.float16:  # products could overflow
            queries, kept = queries.float(), kept.float()
        scores = (queries @ kept.mT).transpose(2, 3).flatten(3)[..., :tokens]
        scores = scores.to(computed_dtype(query.dtype)) * scale
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().to(query.dtype)
        return weights @ fields["values"].flatten(2, 3)[:, :, :tokens], lse

    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        if value_dim == 0:
            key_dim, value_dim = self._rotary, key_dim - self._rotary
        kept = self._kept(key_dim)
        index = (1 if key_dim <= 256 else 2) / page_size
        return kept * (element_size + index) + value_dim * element_size

    def _kept(self, dim: int) -> int:
        # Rounding may make (1 - .9) * 10 a little less than 1.
        return max(math.floor((1 - self.ratio) * dim + 1e-9), 1)
