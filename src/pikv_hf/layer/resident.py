"""Copies on the device of the pages that a router has read from far memory.

Shapes: B batch rows, H KV heads, K pages read by each, C slots of each, P tokens a page.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..placements.residency import Residency
from ..storage.memory import empty_like
from ..storage.selected import Selection
from ..storage.tiers import Near
from ..storage.token_table import TokenTable
from ..storage.uniform_pages import UniformPages
from .plan import Plan

# Weight of the newest gap between two reads in its moving average.
NEWEST_GAP = 0.4
# A page that was read once is expected again after so many steps.
FIRST_GAP = 16.0


@dataclass
class Resident:
    """The slots of one layer: `store` has C pages of each row and KV head, on the device.

    `page` [B, H, C] int64 is the index of the page in a slot among the pages of all stores; -1 = the
    slot is empty. `last`, `uses` and `gap` [B, H, C] are as `Residency.utility` takes them. `now` counts
    the steps; `missing` [B, H, K] marks the pages that the newest one has fetched, `fetched` of them.
    """

    residency: Residency
    store: UniformPages
    page: Tensor
    last: Tensor
    uses: Tensor
    gap: Tensor
    now: int = 0
    missing: Tensor | None = None
    fetched: int = 0

    @classmethod
    def like(cls, store: UniformPages, residency: Residency, batch: int, slots: int) -> "Resident":
        """Make empty slots for pages like those of `store`."""
        device = store.tier.device
        heads = next(iter(store.fields.values())).shape[1]
        shape = batch, heads, slots

        def empty(tensor: Tensor) -> Tensor:
            return empty_like(tensor.new_empty(0, device=device), (*shape, *tensor.shape[3:]))

        positions = torch.zeros(
            *shape[:2], slots * store.page_size, dtype=torch.int32, device=device
        )
        pages = UniformPages(
            codec=store.codec,
            tier=Near(device),
            fields={name: empty(tensor).zero_() for name, tensor in store.fields.items()},
            meta=TokenTable({"positions": positions}),
            digests=TokenTable({}),
            lengths=[slots * store.page_size] * batch,
            page_size=store.page_size,
            readers=list(range(batch)),
            stored=list(range(batch)),
        )
        number = torch.zeros(shape, device=device)
        page = torch.full(shape, -1, dtype=torch.int64, device=device)
        return cls(residency, pages, page, number - 1, number, number + FIRST_GAP)

    @property
    def slots(self) -> int:
        return self.page.shape[2]

    def selection(self, plan: Plan, index: Tensor, is_read: Tensor | None) -> Selection:
        """Fetch the pages `index` [B, H, K] that are in no slot, and return the slots of all.

        K <= C. Pages that are not read, by `is_read` [B, H, K], are not fetched.
        """
        same = index[..., None] == self.page[:, :, None]
        if is_read is not None:
            same &= is_read[..., None]
        is_held, is_used = same.any(-1), same.any(2)
        slot = same.int().argmax(-1)
        is_missing = ~is_held if is_read is None else ~is_held & is_read
        utility = self.residency.utility(self.now, self.last, self.uses, self.gap)
        utility = utility.masked_fill(self.page < 0, -torch.inf).masked_fill(is_used, torch.inf)
        leaving = utility.argsort(dim=-1, stable=True)
        rank = (is_missing.cumsum(-1) - 1).clamp_min(0)
        slot = torch.where(is_missing, leaving.gather(2, rank), slot)
        self._note(is_used)
        self._fetch(plan, index, slot, is_missing)
        tokens = None
        if is_read is not None or any(c.has_partial for c in plan.candidates):
            held = [c.tokens.expand(*index.shape[:2], -1) for c in plan.candidates]
            tokens = torch.cat(held, dim=-1).gather(2, index)
            tokens = tokens if is_read is None else tokens * is_read
        return Selection(self.store, None, slot, tokens)

    def _note(self, is_used: Tensor) -> None:
        """Note that the pages in the slots `is_used` [B, H, C] are read in this step."""
        self.now += 1
        gap = torch.lerp(self.gap, self.now - self.last, NEWEST_GAP)
        self.gap = torch.where(is_used, gap, self.gap)
        self.last = self.last.masked_fill(is_used, self.now)
        self.uses = self.uses + is_used

    def _fetch(self, plan: Plan, index: Tensor, slot: Tensor, is_missing: Tensor) -> None:
        """Copy the missing pages into their slots."""
        self.missing = is_missing
        row, head, place = is_missing.nonzero().unbind(1)  # waits for the device
        self.fetched = len(row)
        if not self.fetched:
            return
        page, target = index[row, head, place], slot[row, head, place]
        self.page[row, head, target] = page
        self.last[row, head, target] = float(self.now)
        self.uses[row, head, target] = 1.0
        self.gap[row, head, target] = FIRST_GAP
        positions = self.store.meta["positions"].unflatten(2, (self.slots, -1))
        for candidates in plan.candidates:
            store = candidates.store
            assert isinstance(store, UniformPages), "others are read where they are"
            inside = (page >= candidates.start) & (page < candidates.start + candidates.count)
            chosen = inside.nonzero().flatten() if len(plan.candidates) > 1 else slice(None)
            own, local = row[chosen], page[chosen] - candidates.start
            stored = own if candidates.rows is None else candidates.rows[own]
            fields, columns = store.single_pages(stored, head[chosen], local)
            for name, tensor in store.tier.bring(fields).items():
                self.store.fields[name][own, head[chosen], target[chosen]] = tensor
            positions[own, head[chosen], target[chosen]] = columns

    def tensors(self) -> Iterator[Tensor]:
        yield from self.store.tensors()
        yield from (self.page, self.last, self.uses, self.gap)
        yield from () if self.missing is None else (self.missing,)
