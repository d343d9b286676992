"""What attention reads of pages, recorded while a model runs, and beside what the rules say."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from formulas import Asked, Page, count_of, scores_of, updated
from torch import Tensor

from pikv_hf import ROUTERS
from pikv_hf.attention import function
from pikv_hf.layer.state import LayerState
from pikv_hf.storage.uniform_pages import UniformPages

EXPERTS = 8  # of the tiny models


@dataclass(frozen=True)
class Read:
    """What a query, at `position` of its row, has read: the pages, as the positions of their tokens."""

    layer: int
    row: int
    head: int
    position: int
    pages: frozenset[tuple[int, ...]]
    held: frozenset[tuple[int, ...]]


def pages_of(state: LayerState, row: int) -> list[list[Page]]:
    """The pages of each KV head of a batch row, read from the stores token by token."""
    heads: list[list[Page]] = [[] for _ in range(state.tail.keys.shape[1])]
    for number, store in enumerate(state.pages.slabs):
        if row in store.readers:
            stored = store.stored[store.readers.index(row)]
            for head, own in enumerate(heads):
                for rank, (tokens, data) in enumerate(contents(store, stored, head)):
                    own.append(_page(state, row, (number, rank), tokens, data))
    return heads


def contents(store: Any, stored: int, head: int) -> list[tuple[int, dict[str, Tensor]]]:
    """The valid tokens, and all data [P, ...], of each page of a stored row and KV head, in order."""
    if isinstance(store, UniformPages):
        keys, values = store.codec.decode(store.fields)
        size, tables = store.page_size, {"keys": keys, "values": values}
        for name, t in store.meta.tensors.items():
            tables[name] = t.unflatten(2, (-1, size))
        of_head = {
            name: t[min(stored, len(t) - 1), min(head, t.shape[1] - 1)]
            for name, t in tables.items()
        }
        length = store.lengths[stored]
        valid = [min(length - start, size) for start in range(0, length, size)]
        return [(n, {k: t[i] for k, t in of_head.items()}) for i, n in enumerate(valid)]
    used = store.page_count
    fields = {k: t[:used, None, None] for k, t in store.fields.items()}
    keys, values = (t[:, 0, 0] for t in store.codec.decode(fields))
    tables = {"keys": keys, "values": values}
    tables |= {k: t[:used, 0] for k, t in store.meta.tensors.items()}
    mine = (store.owner[:used] == stored * store.heads + head).nonzero().flatten().tolist()
    return [(int(store.lengths[i]), {k: t[i] for k, t in tables.items()}) for i in mine]


def _page(
    state: LayerState, row: int, key: tuple[int, int], tokens: int, data: dict[str, Tensor]
) -> Page:
    store = state.pages.slabs[key[0]]
    keys, values = (data[name][:tokens].double() for name in ("keys", "values"))
    columns = data["positions"][:tokens].tolist()
    positions = [position(state, row, column) for column in columns]
    shares = None
    if "experts" in data and state.facts.has_gate:
        each = [shares_of(data["experts"][i], data["weights"][i]) for i in range(tokens)]
        shares = torch.stack(each).mean(0)
    is_full = tokens == store.page_size
    return Page(
        key=key,
        columns=tuple(columns),
        positions=tuple(positions),
        number=positions[0] // state.settings.page_size,
        keys=keys,
        values=values if values.shape[-1] else keys,
        shares=shares,
        is_full=is_full,
        is_free=is_full and positions[0] >= sinks_of(state),
        is_near=store.tier.name == "device",
    )


def ranks_of(selection: Any, at: int, head: int) -> list[int]:
    """The numbers of the selected pages among those of their row and head, by reader and query."""
    if hasattr(selection, "index"):
        return selection.index[at, head].tolist()
    store, places = selection.store, selection.places[at, head].tolist()
    if isinstance(store, UniformPages):
        room = next(iter(store.fields.values())).shape[2]
        return [place % room for place in places]
    owner = store.owner[: store.page_count].tolist()
    return [owner[:place].count(owner[place]) for place in places]


def sinks_of(state: LayerState) -> int:
    return max(state.settings.num_sinks, 1)


def position(state: LayerState, row: int, column: int) -> int:
    """The number of tokens of the row before a column."""
    hidden = state.columns.hidden
    return column if hidden is None else column - int(hidden[row, :column].sum())


def shares_of(experts: Tensor, weights: Tensor) -> Tensor:
    shares = torch.zeros(EXPERTS, dtype=torch.float64)
    for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
        shares[expert] += weight / sum(weights.tolist())
    return shares


def foretold(state: LayerState, router: Any, row: int, back: int) -> Tensor | None:
    """The shares of experts that foretell those of the token `back` from the end."""
    if router.experts_from == "previous_layer":
        for other in reversed(state.neighbours.paged[: state.facts.paged_index]):
            if other.facts.has_gate:
                labels = other.tail.labels
                at = other.tail.length - back
                return shares_of(labels["experts"][row, 0, at], labels["weights"][row, 0, at])
    labels = state.tail.labels
    if labels is None or not len(labels):
        return None
    return shares_of(labels["experts"][row, 0, -1], labels["weights"][row, 0, -1])


class Watch:
    """Records all reads of generated tokens; with a `name`, it checks them against its formula.

    It checks also that attention is that of the selected pages and the tail alone: `bound` limits
    the error.
    """

    def __init__(self, monkeypatch: Any, name: str | None = None, margin: float = 0.0) -> None:
        self.name, self.margin, self.bound = name, margin, 0.0
        self.reads: list[Read] = []
        self.counted: list[tuple[list[Page], list[Page]]] = []  # held and read
        self.checked = self.attended = 0
        self.averages: dict[tuple[int, int], Tensor] = {}
        self._held: dict[tuple[int, int], Any] = {}
        self._newest: dict[tuple[int, int, int], list[Page]] = {}
        self._select, self._attend = function.selected, function._attend
        monkeypatch.setattr(function, "selected", self.selected)

    def check_attention(self, monkeypatch: Any, bound: float) -> None:
        self.bound = bound
        monkeypatch.setattr(function, "_attend", self.attend)

    def reorder(self, rows: list[int]) -> None:
        """Let row i continue row `rows[i]`."""
        old, layers = self.averages, {layer for layer, _ in self.averages}
        pairs = [(layer, new, row) for layer in layers for new, row in enumerate(rows)]
        self.averages = {(layer, new): old[layer, row] for layer, new, row in pairs}

    def selected(self, state: LayerState, router: Any, query: Tensor, length: int, scale: float):
        held = {row: self._pages(state, row) for row in range(len(query))}
        selections = self._select(state, router, query, length, scale)
        self._newest = {}
        for row, heads in held.items():
            reads, misses = (torch.zeros(EXPERTS, dtype=torch.float64) for _ in range(2))
            for head, pages in enumerate(heads):
                for number in range(length):
                    keys = self._keys(selections, state, row, head, number, length, pages)
                    read = [page for page in pages if page.key in keys]
                    self._newest[row, head, number] = read
                    self.counted.append((pages, read))
                    column = state.num_seen - length + number
                    self.reads.append(_read(state, row, head, column, read, pages))
                    if self.name is not None:
                        states = query[row, head].unflatten(0, (-1, length))[:, number]
                        self._check(state, router, row, head, number, length, states, scale, held)
                    for page in read:
                        if page.shares is not None and page.is_full:
                            reads[page.bucket] += 1
                            misses[page.bucket] += not page.is_near
            if self.name is not None and router.has_state and state.facts.has_gate:
                at = state.layer_idx, row
                self.averages[at] = updated(self._averages(at), reads, misses)
        return selections

    def _pages(self, state: LayerState, row: int) -> list[list[Page]]:
        """`pages_of`, made anew when pages have changed."""
        stores = [(id(s), s.page_count, *s.readers, *s.stored) for s in state.pages.slabs]
        lengths = [torch.as_tensor(s.lengths).tolist() for s in state.pages.slabs]
        at, key = (state.layer_idx, row), (stores, lengths)
        if at not in self._held or self._held[at][0] != key:
            self._held[at] = key, pages_of(state, row)
        return self._held[at][1]

    def _averages(self, at: tuple[int, int]) -> Tensor:
        start = torch.stack([torch.ones(EXPERTS), torch.zeros(EXPERTS)]).double()
        return self.averages.get(at, start)

    def _keys(
        self,
        selections: Any,
        state: LayerState,
        row: int,
        head: int,
        number: int,
        length: int,
        pages,
    ) -> set[tuple[int, int]]:
        """The pages that a query reads; all tokens of each, and none twice."""
        if selections is None:
            return {page.key for page in pages}
        valid = {page.key: len(page.columns) for page in pages}
        found: list[tuple[int, int]] = []
        for selection in selections:
            store = next(i for i, s in enumerate(state.pages.slabs) if s is selection.store)
            if row not in selection.store.readers:
                continue
            at = selection.store.readers.index(row) * length + number
            ranks = ranks_of(selection, at, head)
            size, tokens = selection.store.page_size, selection.tokens
            tokens = [size] * len(ranks) if tokens is None else tokens[at, head].tolist()
            for rank, count in zip(ranks, tokens, strict=True):
                if count:
                    assert valid.get((store, rank)) == count, "a page that the head does not have"
                    found.append((store, rank))
        assert len(found) == len(set(found)), "a page is read twice"
        return set(found)

    def _check(
        self, state, router, row, head, number, length, states, scale, held: dict[int, list]
    ) -> None:
        pages = held[row][head]
        if not pages:
            return
        loads, misses = self._averages((state.layer_idx, row))
        own = None
        if hasattr(router, "experts_from") and state.facts.has_gate:
            own = foretold(state, router, row, length - number)
        at = position(state, row, state.num_seen - length + number)
        asked = Asked(states.double(), scale, at, state.layer_idx, head, own, loads, misses)
        size = min(store.page_size for store in state.pages.slabs)
        largest = max(state.pages.slabs, key=lambda store: store.nbytes)
        page_bytes = largest.page_bytes * len(held[row]) * state.facts.num_paged
        count = count_of(router, pages, sinks_of(state), size, page_bytes)
        scores, logits = scores_of(self.name, router, asked, pages, count)
        read = {page.key for page in self._newest[row, head, number]}
        if self.name == "hierarchical" and not states.any():
            return  # of a token without an embedding: all clusters are ties
        assert_best(pages, scores, read, self.margin, self.name in ("hash", "round_robin"))
        if router.top_p is None:
            assert len(read) == count
        else:
            assert_mass(pages, logits, read, router.top_p, self.margin)
        self.checked += len(read) < len(pages)

    def attend(
        self, state: LayerState, query: Tensor, mask: Any, scale: float, sink: Any, expand: Any
    ) -> Tensor:
        self._newest = {}
        out = self._attend(state, query, mask, scale, sink, expand)
        length, heads = query.shape[2], state.tail.keys.shape[1]
        keys, values = state.tail.view()
        values = values if values.shape[-1] else keys
        each = query.unflatten(1, (heads, -1))
        covered = state.columns.covered
        for (row, head, number), read in self._newest.items():
            newest = state.num_seen - length + number
            columns = range(state.starts[row], newest + 1)
            hidden = state.columns.hidden
            columns = [
                c for c in columns if hidden is None or c >= hidden.shape[1] or not hidden[row, c]
            ]
            columns = [c for page in read for c in page.columns] + columns
            at = [c - state.first_in_tail for c in columns[sum(len(p.columns) for p in read) :]]
            k = torch.cat([*(p.keys for p in read), keys[row, head, at].double()])
            v = torch.cat([*(p.values for p in read), values[row, head, at].double()])
            logits = each[row, head, :, number].double() @ k.T * scale
            if covered is not None:
                of_query = covered[row, min(number, covered.shape[1] - 1)].tolist()
                gone = [c < len(of_query) and of_query[c] for c in columns]
                logits[:, torch.tensor(gone)] = -torch.inf
            if sink is not None:
                own = sink.view(heads, -1)[head].double()[:, None]
                logits, v = torch.cat([logits, own], -1), torch.cat([v, torch.zeros_like(v[:1])])
            expected = logits.softmax(-1) @ v
            actual = out[row, head].unflatten(0, (-1, length))[:, number].double()
            assert (actual - expected).abs().max() <= self.bound * expected.abs().max().clamp_min(1)
            self.attended += 1
        return out


def _read(state: LayerState, row: int, head: int, column: int, read, pages) -> Read:
    return Read(
        state.layer_idx,
        row,
        head,
        position(state, row, column),
        frozenset(page.positions for page in read),
        frozenset(page.positions for page in pages),
    )


def assert_best(
    pages: list[Page], scores: list[float], read: set, margin: float, has_ties: bool
) -> None:
    """The pages that are not free are read, and of the others none is better than one that is."""
    assert all(page.is_free or page.key in read for page in pages)
    finite = [abs(score) for score in scores if math.isfinite(score)]
    margin *= max([1.0, *finite])
    free = [(page, score) for page, score in zip(pages, scores, strict=True) if page.is_free]
    chosen = [(score, page) for page, score in free if page.key in read]
    others = [(score, page) for page, score in free if page.key not in read]
    if chosen and others:
        worst, best = min(score for score, _ in chosen), max(score for score, _ in others)
        assert worst >= best - margin, f"{worst} is read, {best} is not"
        ordered = len({page.key[0] for page in pages}) == 1
        if has_ties and ordered and worst == best:
            oldest = min(page.positions for score, page in chosen if score == worst)
            assert all(page.positions < oldest for score, page in others if score == best)


def assert_mass(
    pages: list[Page], logits: list[float], read: set, top_p: float, margin: float
) -> None:
    """Together the full pages read have `top_p`, and without the last of them they have not."""
    full = [number for number, page in enumerate(pages) if page.is_full]
    weights = torch.tensor(logits, dtype=torch.float64)[full].softmax(0).tolist()
    mass = {pages[number].key: weight for number, weight in zip(full, weights, strict=True)}
    total = sum(weight for key, weight in mass.items() if key in read)
    assert not full or total >= top_p - margin
    free = [mass[page.key] for page in pages if page.is_free and page.key in read]
    assert not free or total - min(free) < top_p + margin


def name_of(router: Any) -> str:
    return next(name for name, method in ROUTERS.items() if type(router) is method)
