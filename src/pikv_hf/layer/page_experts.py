"""The experts of the pages of a layer.

Shapes: R stored rows, H KV heads, M pages of P tokens, N pages of a pool, k experts of a token.
"""

import torch

from ..model.gates import page_shares
from ..storage.ragged_pages import RaggedPages
from ..storage.uniform_pages import UniformPages


def pages_per_expert(stores: list[UniformPages | RaggedPages]) -> list[int] | None:
    """Count the full pages of all rows and KV heads by the expert with the largest share in them.

    None = no tokens in pages, or they have no labels.
    """
    chosen = []
    for store in stores:
        if "experts" not in store.meta:
            return None
        size, labels = store.page_size, (store.meta["experts"], store.meta["weights"])
        if isinstance(store, RaggedPages):
            is_full = store.lengths[: store.page_count] == size
            pages = [label[: store.page_count, 0][is_full] for label in labels]
        else:
            full = torch.tensor(store.lengths)[:, None] // size
            heads = store.held().shape[1] // labels[0].shape[1]
            is_full = torch.arange(store.pages) < full
            is_full = is_full[:, None].expand(-1, labels[0].shape[1], -1).to(labels[0].device)
            shape = *is_full.shape[:2], -1, -1
            each = (
                label[:, :, : store.pages * size].expand(*shape).unflatten(2, (-1, size))
                for label in labels
            )
            pages = [label[is_full].repeat(heads, 1, 1) for label in each]
        experts, weights = pages
        if len(experts):
            chosen.append(page_shares(experts, weights, int(experts.max()) + 1).argmax(1))
    return torch.bincount(torch.cat(chosen)).tolist() if chosen else None
