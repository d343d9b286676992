"""Pages whose number may differ between rows and KV heads.

Shapes: R stored rows, H KV heads, N pages, P tokens a page, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from pikv_kernels import lowest_score, merge_segments, new_mask
from torch import Tensor

from .codec import MAX_WEIGHTED, PageCodec, attend_states, cover, decoded, flat_tokens
from .gather import select_pages
from .incoming_pages import EncodedPages
from .memory import is_writable
from .page_list import PageList
from .prefetch import Block
from .row_map import PageStore, Partial
from .tiers import Tier
from .token_table import TokenTable

# Elements of queries, and of outputs before they are merged, that are copied at a time.
MAX_COPIED = 2**22


class Run(NamedTuple):
    """Adjacent pages, each `group` of them of one owner; if it is 1, pages may be partial."""

    pages: int
    group: int


@dataclass(kw_only=True)
class RaggedPages(PageStore):
    """Pages of one encoding in any order, each with its owner.

    `fields` [capacity, ...] are the encoded pages, `meta` [capacity, 1, P, ...] other data of their
    tokens, `digests` [capacity, ...] what a router reads of them, `owner` [capacity] = stored row * H + KV head, and `lengths` [capacity] the number of
    valid tokens, which come first in a page. `runs` lists the runs of pages in order.
    """

    codec: PageCodec
    meta: TokenTable
    digests: TokenTable
    owner: Tensor
    lengths: Tensor
    runs: list[Run]
    stored_rows: int
    heads: int
    _in_place: tuple[int, list[Block]] | None = field(default=None, repr=False)
    _held: Tensor | None = field(default=None, repr=False)
    _list: PageList | None = field(default=None, repr=False)

    @property
    def home(self) -> torch.device:
        return self.owner.device

    @property
    def rows(self) -> int:
        return self.stored_rows

    @property
    def page_count(self) -> int:
        return sum(run.pages for run in self.runs)

    @property
    def page_size(self) -> int:
        return self.meta["positions"].shape[2]

    @property
    def page_bytes(self) -> int:
        return self.nbytes // max(len(self.owner), 1)  # the pool may have no memory

    @property
    def room(self) -> float:
        return 1 - self.page_count / max(len(self.owner), 1)

    def held(self) -> Tensor:
        if self._held is None:  # read once, as reading waits for a device
            self._held = self._count()
        return self._held

    def _count(self) -> Tensor:
        held = torch.zeros(self.rows * self.heads, dtype=torch.int64)
        owner, lengths = (t[: self.page_count].cpu() for t in (self.owner, self.lengths))
        return held.index_add_(0, owner, lengths.long()).view(self.rows, self.heads)

    @classmethod
    def like(
        cls,
        pages: EncodedPages,
        codec: PageCodec,
        tier: Tier,
        room: int,
        rows: int,
        heads: int,
    ) -> "RaggedPages":
        """Make an empty pool for `rows` batch rows and `room` pages like `pages`."""

        def empty(tensor: Tensor) -> Tensor:
            return tensor.new_empty(room, *tensor.shape[1:])

        return cls(
            codec=codec,
            tier=tier,
            fields={k: tier.empty(v, room, *v.shape[1:]) for k, v in pages.fields.items()},
            meta=TokenTable({k: empty(tensor) for k, tensor in pages.meta.tensors.items()}),
            digests=TokenTable({k: empty(tensor) for k, tensor in pages.digests.tensors.items()}),
            owner=empty(pages.owner),
            lengths=empty(pages.lengths),
            runs=[],
            stored_rows=rows,
            heads=heads,
            readers=list(range(rows)),
            stored=list(range(rows)),
        )

    def free_pages(self, pages: EncodedPages, batch: int) -> int:
        """Return how many pages like `pages`, in whole groups, can be appended for `batch` rows."""
        is_free = (
            pages.meta.tensors.keys() == self.meta.tensors.keys()
            and not self.is_forked
            and self.is_read_by_all(batch)
            and self.is_in_order()
            and is_writable(self.owner)
        )
        free = self.owner.shape[0] - self.page_count if is_free else 0
        return free // pages.group * pages.group

    def write(self, pages: EncodedPages) -> None:
        """Append `pages`."""
        start, count = self.page_count, len(pages)
        for held, new in zip(self._stored(), pages.tensors(), strict=True):
            held.narrow(0, start, count).copy_(new)
        self._add_run(Run(count, pages.group))
        self.changed()

    def _stored(self) -> Iterator[Tensor]:
        yield from (*self.fields.values(), *self.meta.tensors.values())
        yield from (*self.digests.tensors.values(), self.owner, self.lengths)

    def _add_run(self, new: Run) -> None:
        if self.runs and self.runs[-1].group == new.group:
            new = Run(self.runs.pop().pages + new.pages, new.group)
        self.runs.append(new)

    def attend(
        self, query: Tensor, scale: float, covered: Tensor | None = None
    ) -> Iterator[Partial]:
        # The weights of many queries would be larger than the pages.
        is_weighted = self.codec.gives_weights and query.shape[2] <= MAX_WEIGHTED
        queries = self.codec.into_pages(query, self.fields) if is_weighted else query
        results: list[tuple[Tensor, Tensor, Tensor]] = []
        for result in self._attend_runs(queries.flatten(0, 1), is_weighted, scale, covered):
            results.append(result)
            if sum(out.numel() for out, _, _ in results) >= MAX_COPIED:
                yield self._merged(results, query, is_weighted)
                results = []
        if results:
            yield self._merged(results, query, is_weighted)

    def _merged(
        self, results: list[tuple[Tensor, Tensor, Tensor]], query: Tensor, is_weighted: bool
    ) -> Partial:
        """Merge results over some runs into one result [R, H, Q, Dv] of `query` [R, H, Q, Dk]."""
        out, lse, owner = (torch.cat(parts) for parts in zip(*results, strict=True))
        out, lse = merge_segments(out, lse, owner, query.shape[0] * query.shape[1])
        if is_weighted:
            out = self.codec.out_of_pages(out)
        return out.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])

    def _attend_runs(
        self, queries: Tensor, is_weighted: bool, scale: float, covered: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield results [n, Q, Dv] and [n, Q] of `queries` [R * H, Q, Dk], and their owners [n]."""
        step = max(1, MAX_COPIED // (queries.shape[1] * queries.shape[2]))
        max_decoded = self.codec.tokens_per_block(len(queries), self.tier.device) * len(queries)
        step = min(step, max(1, max_decoded // self.page_size))
        for fields, (block, run) in self.tier.blocks(self._blocks(step)):
            owner = self._at("owner", queries.device)[block][:: run.group]
            query = queries.index_select(0, owner)[:, None]
            mask = self._mask(block, queries) if run.group == 1 else None
            tokens = run.group * self.page_size
            if covered is not None:
                columns = self.meta["positions"][block].reshape(len(owner), 1, tokens)
                columns = columns.to(queries.device)
                mask = new_mask(queries, len(owner), 1, 1, tokens) if mask is None else mask
                mask = cover(mask, columns, covered.index_select(0, owner // self.heads))
            # Over single undecoded pages, one fused kernel is faster than several operations.
            is_fused = not is_weighted or (run.group == 1 and self.codec.block_tokens is None)
            if not is_fused:
                out, lse, _ = self.codec.attend_weighted(query, fields, tokens, scale, mask)
            elif mask is None:
                out, lse = self.codec.attend(query, fields, tokens, scale)
            else:
                out, lse = self._attend_masked(query, fields, tokens, mask, scale)
            yield out[:, 0], lse[:, 0], owner

    def _attend_masked(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, mask: Tensor, scale: float
    ) -> Partial:
        """Attend with `query` [n, 1, Q, Dk] to pages [n, 1, group, ...] with a `mask`."""
        keys, values = (flat_tokens(t, tokens) for t in self.codec.decode(fields))
        return attend_states(query, keys, values, mask, scale)

    def _mask(self, block: slice, like: Tensor) -> Tensor:
        """Return the mask [n, 1, 1, P] that hides places without a token in the pages `block`."""
        lengths = self._at("lengths", like.device)[block, None]
        place = torch.arange(self.page_size, device=lengths.device)
        mask = new_mask(like, len(lengths), len(place))
        return mask.masked_fill_(place >= lengths, lowest_score(like.dtype))[:, None, None]

    def _at(self, name: str, device: torch.device) -> Tensor:
        """Return `owner` or `lengths` on `device`, copied once if that is not the layer's."""
        tensor: Tensor = getattr(self, name)
        if device == tensor.device:
            return tensor
        if (name, device) not in self._index:
            self._index[name, device] = tensor[: self.page_count].to(device)
        return self._index[name, device]

    def changed(self) -> None:
        super().changed()
        self._in_place = self._held = self._list = None

    def _blocks(self, max_pages: int) -> Iterator[Block]:
        """Return `_views`; for pages read in place they are made once, not at every step."""
        if not self.tier.in_place:
            return self._views(max_pages)
        if self._in_place is None or self._in_place[0] != max_pages:
            self._in_place = max_pages, list(self._views(max_pages))
        return iter(self._in_place[1])

    def _views(self, max_pages: int) -> Iterator[Block]:
        """Yield up to `max_pages` pages of a run [n, 1, group, ...], with their slice and run."""
        start, step = 0, min(max_pages, self.tier.max_pages(self.page_bytes))
        for run in self.runs:
            each = max(step // run.group, 1) * run.group
            for first in range(start, start + run.pages, each):
                places = slice(first, min(first + each, start + run.pages))
                pages = {name: field[places] for name, field in self.fields.items()}
                groups = {k: t.unflatten(0, (-1, 1, run.group)) for k, t in pages.items()}
                yield groups, (places, run)
            start += run.pages

    def span(self, *, with_codes: bool, with_values: bool) -> TokenTable:
        """Return all tokens [N, 1, P, ...], decoded, with their other data and `order` [N, 1, P].

        `order` combines owner and position in one number; it is -1 at places without a token.
        """
        used = self.page_count
        fields = {name: field[:used, None, None] for name, field in self.fields.items()}
        fields = self._brought(fields)
        states = decoded(self.codec, fields, with_values).items()
        meta = TokenTable({name: tensor[:used] for name, tensor in self.meta.tensors.items()})
        place = torch.arange(self.page_size, device=self.owner.device)
        valid = place < self.lengths[:used, None, None]
        order = (self.owner[:used, None, None] << 32) + meta["positions"]
        order = order.masked_fill(~valid, -1)
        tokens = meta.with_columns(TokenTable({name: pages[:, :, 0] for name, pages in states}))
        tokens = tokens.with_columns(TokenTable({"order": order}))
        if not (with_codes and self.codec.is_per_token):
            return tokens
        return tokens.with_codes({name: field[:, 0] for name, field in fields.items()})

    def keep_rows(self, used: Tensor) -> None:
        new_of_old = torch.full((self.rows,), -1).index_copy_(0, used, torch.arange(len(used)))
        owner = self.owner[: self.page_count]
        row = new_of_old.to(owner.device)[owner // self.heads]
        self._keep_pages(row >= 0, row * self.heads + owner % self.heads)
        self.stored_rows = len(used)

    def crop(self, position: int) -> None:
        columns = self.meta["positions"][: self.page_count, 0]
        place = torch.arange(self.page_size, device=columns.device)
        valid = place < self.lengths[: self.page_count, None]
        self.lengths = ((columns < position) & valid).sum(1, dtype=torch.int32)
        self._keep_pages(self.lengths > 0, self.owner[: self.page_count])
        self.changed()

    def _keep_pages(self, keep: Tensor, owner: Tensor) -> None:
        """Keep only the pages marked in `keep` [N], with their new owners from `owner` [N]."""
        index = keep.nonzero().flatten()
        self.fields = {k: self.tier.select(v, index) for k, v in self.fields.items()}
        self.meta = self.meta.select_rows(index)
        self.digests = self.digests.select_rows(index)
        self.owner = owner.index_select(0, index)
        self.lengths = self.lengths[: len(keep)].index_select(0, index)
        self.runs = [Run(len(index), 1)] if len(index) else []

    def page_list(self) -> PageList:
        if self._list is None:
            owners, used = self.rows * self.heads, self.page_count
            owner, lengths = self.owner[:used], self.lengths[:used].long()
            counts = torch.bincount(owner, minlength=owners)
            order, width = owner.argsort(stable=True), int(counts.max())
            # `order` is sorted by owner, so an owner's pages begin at the sum of earlier counts.
            rank = torch.arange(width, device=owner.device)
            is_held = rank < counts[:, None]
            at = ((counts.cumsum(0) - counts)[:, None] + rank).clamp_max(used - 1)
            places = order[at].unflatten(0, (self.rows, self.heads))
            tokens = lengths[places] * is_held.view(places.shape)
            is_full = tokens == self.page_size
            full = is_full.sum(-1)
            self._list = PageList(
                digests=TokenTable({k: t[places] for k, t in self.digests.tensors.items()}),
                first=self.meta["positions"][:used, 0, 0][places],
                tokens=tokens,
                full=full.cpu(),
                partial=((tokens > 0).sum(-1) - full).cpu(),
            )
            self._index["of owners"] = places
        return self._list

    def pages_at(self, index: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        places = self._places(index, rows)
        return {name: select_pages(tensor, places) for name, tensor in self.fields.items()}

    def columns_at(self, index: Tensor, rows: Tensor | None) -> Tensor:
        return self.meta["positions"][:, 0][self._places(index, rows)]

    def _places(self, index: Tensor, rows: Tensor | None) -> Tensor:
        """Return the numbers in the pool of the pages `index` [n, H, K] of stored `rows` [n]."""
        self.page_list()  # lists the pages of each owner
        places = self._index["of owners"]
        return (places if rows is None else places.index_select(0, rows)).gather(2, index)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._stored()
        yield from self._index.values()
        yield from () if self._list is None else self._list.tensors()


def together(
    pools: list[RaggedPages], rows: list[int], *, with_codes: bool, with_values: bool
) -> TokenTable:
    """Collect the tokens [R, H, T, ...] of the batch rows `rows` from `pools`, oldest first.

    The fullest KV head has T tokens. If a head has fewer, its tokens come last, and `valid` marks
    the places that hold a token.
    """
    parts, heads = [], pools[0].heads
    for pool in pools:
        tokens = pool.span(with_codes=with_codes, with_values=with_values)
        flat = TokenTable({name: t.flatten(0, 2)[None, None] for name, t in tokens.tensors.items()})
        numbers = [number for number, row in enumerate(rows) if row in pool.readers]
        stored = pool.stored_of([rows[number] for number in numbers])
        for number, row in zip(numbers, stored, strict=True):
            order = flat["order"][0, 0]
            of_row = flat.select_tokens(((order >> 32) // heads == row).nonzero().flatten())
            moved = of_row["order"] + ((number - row) * heads << 32)
            parts.append(of_row.with_columns(TokenTable({"order": moved})))
    found = parts[0]
    for part in parts[1:]:
        found = found.followed_by(part)
    order, index = found["order"][0, 0].sort()
    found, owner = found.select_tokens(index).without("order"), order >> 32
    counts = torch.bincount(owner, minlength=len(rows) * heads)
    width = int(counts.max())
    if width * len(counts) == len(found):
        shape = len(rows), heads, width
        return TokenTable({name: t[0, 0].unflatten(0, shape) for name, t in found.tensors.items()})
    # `found` is sorted by owner, so an owner's tokens end at its running sum of counts.
    behind = counts.cumsum(0)[:, None] - torch.arange(width, 0, -1, device=counts.device)
    valid = behind >= (counts.cumsum(0) - counts)[:, None]
    padded = found.select_tokens(behind.clamp_min(0).flatten())
    shape = len(rows), heads, width
    spread = {name: t[0, 0].unflatten(0, shape) for name, t in padded.tensors.items()}
    return TokenTable(spread | {"valid": valid.unflatten(0, shape[:2])})
