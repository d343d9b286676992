"""How much of the attention falls on what routers read, by the queries of a cache that reads all.

Shapes: B rows, H KV heads, G query heads of each, q queries, T tokens, M pages of P tokens, K of them
read, D key dim, k experts of a token, E experts.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from pikv_hf import PiKVCache
from pikv_hf.attach.binding import binding_of
from pikv_hf.attention import function
from pikv_hf.attention.routed import selected
from pikv_hf.layer.dense_states import dense_states
from pikv_hf.layer.routing import Routing
from pikv_hf.layer.state import LayerState
from pikv_hf.model.gates import Choice, num_experts, shares
from pikv_hf.routers import PageRouter, Pages, Query
from pikv_hf.storage.selected import Selection


@dataclass
class Mass:
    """Sums over queries, heads, layers and rows: of the attention, a query head's being 1.

    `read`: on all that is read; `selected`: on pages that are read; `paged`: on all pages. `tokens`
    sums the shares of the paged tokens that are read.
    """

    read: float = 0.0
    selected: float = 0.0
    paged: float = 0.0
    tokens: float = 0.0
    queries: int = 0

    def add(self, attention: Tensor, is_read: Tensor, sealed: int) -> None:
        """Add `attention` [B, H, G, q, T] of which `is_read` [B, H, q, T]; `sealed` tokens in pages."""
        of_pages, read = attention[..., :sealed], is_read[..., :sealed].float()
        selected = torch.einsum("bhgqt,bhqt->bhgq", of_pages, read)
        paged = of_pages.sum(-1)
        self.selected += float(selected.sum())
        self.paged += float(paged.sum())
        self.read += float((1 - paged + selected).sum())
        self.tokens += float(read.mean(-1).sum()) * attention.shape[2]
        self.queries += selected.numel()

    def plus(self, other: "Mass") -> "Mass":
        return Mass(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def share(self) -> float:
        """Of the attention, what is read."""
        return self.read / self.queries

    @property
    def share_of_pages(self) -> float:
        """Of the attention to pages, what is read."""
        return self.selected / self.paged

    @property
    def share_of_tokens(self) -> float:
        return self.tokens / self.queries


@dataclass(frozen=True)
class Several(PageRouter):
    """Lets pages carry what all these `routers` read of them. It selects nothing itself.

    Those that compare experts must agree from where: tokens have the labels of one gate.
    """

    routers: tuple[PageRouter, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({router.source for router in self.routers}) > 1:
            raise ValueError("`routers` take experts from different gates.")

    @property
    def source(self) -> str:
        return self.routers[0].source

    @property
    def needs_labels(self) -> bool:
        return True

    def digest(
        self, keys: Tensor, known: dict[str, Tensor], num_experts: int | None
    ) -> dict[str, Tensor]:
        digests: dict[str, Tensor] = {}
        for router in self.routers:
            digests |= router.digest(keys, known, num_experts)
        return digests

    def scores(self, query: Query, pages: Pages) -> Tensor:
        raise NotImplementedError("it selects nothing itself")


@dataclass
class Asked:
    """The queries [B, H, G, q, D] of one layer, and how many tokens each saw in all and in pages.

    `keys` [B, H, T, D] are all keys, in order.
    """

    scale: float
    queries: list[Tensor] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    sealed: list[int] = field(default_factory=list)
    keys: Tensor = field(default_factory=lambda: torch.empty(0))


class Watch:
    """Notes what each of `routers` would read, while the model reads all pages."""

    def __init__(self, routers: dict[str, PageRouter]) -> None:
        self.routers = routers
        self.masses = {name: Mass() for name in routers}
        self.layers: dict[int, Asked] = {}
        self._routings: dict[tuple[str, int], Routing] = {}

    def cache(self, model: PreTrainedModel, page_size: int, window: int) -> PiKVCache:
        """A cache that is to be used within `watching`."""
        router = Several(routers=tuple(self.routers.values()))
        return PiKVCache(model, router=router, page_size=page_size, window=window)

    @contextmanager
    def watching(self) -> Generator[None]:
        function.selected = self._selected
        try:
            yield
        finally:
            function.selected = selected

    def _selected(
        self, state: LayerState, router: PageRouter, query: Tensor, length: int, scale: float
    ) -> None:
        """In place of `selected`: measure, and read all."""
        assert length == 1, "tokens are to be read one by one"
        asked = self.layers.setdefault(state.layer_idx, Asked(scale))
        keys, latents = dense_states(state)
        asked.keys = keys if state.latent_rank is None else torch.cat([keys, latents], dim=-1)
        attention = attention_of(query[:, :, :, None], asked.keys, scale)
        own = state.routing
        for name, rule in self.routers.items():
            place = name, state.layer_idx
            state.routing = self._routings.setdefault(place, Routing())
            selections = selected(state, rule, query, length, scale)
            is_read = columns_read(state, selections)[:, :, None]
            self.masses[name].add(attention, is_read, state.first_in_tail)
        state.routing = own
        asked.queries.append(query[:, :, :, None])
        asked.seen.append(state.num_seen)
        asked.sealed.append(state.first_in_tail)


def attention_of(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the attention [B, H, G, q, T] of `queries` [B, H, G, q, D] to all `keys` [B, H, T, D]."""
    logits = queries.flatten(2, 3).float() @ keys.float().mT * scale
    return logits.softmax(-1).unflatten(2, queries.shape[2:4])


def columns_read(state: LayerState, selections: list[Selection] | None) -> Tensor:
    """Return which tokens [B, H, T] of a layer a query reads; None = all."""
    batch, heads = state.tail.keys.shape[:2]
    device = state.tail.keys.device
    is_read = torch.zeros(batch, heads, state.num_seen, dtype=torch.bool, device=device)
    is_read[:, :, state.first_in_tail if selections is not None else 0 :] = True
    for selection in selections or []:
        store = selection.store
        assert store.is_read_by_all(batch), "rows that differ in length are not measured"
        columns, is_token = selection.columns()
        # The newest token, which stands for empty places, is read in any case.
        columns = columns.long().masked_fill(~is_token, state.num_seen - 1)
        is_read.scatter_(2, columns.flatten(2), True)
    return is_read


# ---- pages and labels that no cache has ---------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """Experts and their weights [B, T, k] for all tokens of one layer."""

    experts: Tensor
    weights: Tensor

    def dense(self, count: int) -> Tensor:
        """The weights over their sum, [B, T, E]."""
        each = one_hot(self.experts.long(), count) * shares(self.weights)[..., None]
        return each.sum(-2)

    def shifted(self) -> "Labels":
        """Of each token, the labels of the token before."""
        return Labels(*(t.roll(1, dims=1) for t in (self.experts, self.weights)))

    def at(self, columns: Tensor) -> dict[str, Tensor]:
        """For `columns` [B, M, P], as a router's `digest` takes them: [B, 1, M, P, k]."""
        row = torch.arange(len(columns))[:, None, None]
        return {name: t[row, columns][:, None] for name, t in vars(self).items()}


class Heard:
    """What all gates of a model choose for the tokens of `rows` texts: `own` by layer.

    `early` is what the same gates choose for the input of their layer, before attention.
    """

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self.rows, self.count = rows, num_experts(model.config)
        self._own: dict[int, list[Labels]] = {}
        self._early: dict[int, list[Labels]] = {}
        self.handles = []
        binding = binding_of(model)
        for idx, gate in binding.gate_of.items():
            self.handles.append(gate.hook(self._listener(self._own.setdefault(idx, []))))
            early = self._listener(self._early.setdefault(idx, []))
            gate_before = binding.early_gate_of[idx]
            self.handles.append(gate_before.hook(lambda _, choose, early=early: early(choose)))

    def _listener(self, found: list[Labels]) -> Callable[[Callable[[], Choice]], None]:
        def listen(choice: Callable[[], Choice]) -> None:
            found.append(Labels(*(t.unflatten(0, (self.rows, -1)) for t in choice())))

        return listen

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def own(self) -> dict[int, Labels]:
        return {idx: _joined(parts) for idx, parts in self._own.items()}

    @property
    def early(self) -> dict[int, Labels]:
        return {idx: _joined(parts) for idx, parts in self._early.items()}

    def translated(self, layer: int, text: int) -> Labels:
        """The own experts foretold from those of the layer before, by how often both went together.

        Counted in the first `text` tokens of each row.
        """
        before, own = (self.own[idx].dense(self.count) for idx in (layer - 1, layer))
        together = before[:, :text].mT @ own[:, :text]
        top = (before @ together).topk(self.own[layer].experts.shape[-1], dim=-1)
        return Labels(top.indices, top.values)

    def foretelling(self, layer: int, text: int) -> dict[str, Labels]:
        """What may stand for the experts of a query of `layer`, by name; the last is not known."""
        own = self.own[layer]
        found = {"previous_token": own.shifted(), "early gate": self.early[layer]}
        if layer - 1 in self.own:
            translated = self.translated(layer, text)
            found |= {"previous_layer": self.own[layer - 1], "translated": translated}
        else:
            found |= dict.fromkeys(("previous_layer", "translated"), own.shifted())
        return found | {"hindsight": own}


def _joined(parts: list[Labels]) -> Labels:
    return Labels(*(torch.cat([getattr(p, n) for p in parts], 1) for n in ("experts", "weights")))


def agreement(foretold: Labels, own: Labels, count: int) -> Tensor:
    """Return the weight [B, T] of the experts in `own` that `foretold` names too."""
    named = foretold.dense(count) > 0
    return (own.dense(count) * named).sum(-1)


@dataclass(frozen=True)
class Imagined:
    """A rule over pages that no cache has: what it reads of a layer's recorded queries.

    `group`: by what tokens are ordered before they are cut into pages, "position", "expert" (the
    expert of the token with the largest weight) or "nothing" (at random).
    """

    router: PageRouter
    group: str = "position"

    def measure(
        self,
        asked: Asked,
        layer: int,
        of_pages: Labels,
        of_queries: Labels,
        page_size: int,
        experts: int,
        totals: dict[float, Mass],
    ) -> None:
        """Add to the `totals` for each share of the pages."""
        for sealed in sorted(set(asked.sealed)):
            steps = [i for i, n in enumerate(asked.sealed) if n == sealed]
            columns = self.columns(of_pages, sealed, page_size)
            keys = taken(asked.keys, columns)
            digests = self.router.digest(keys, of_pages.at(columns), experts)
            pages = Pages(
                digests=self.router.prepared(digests, torch.ones(1, 1, columns.shape[1]).bool()),
                numbers=torch.arange(columns.shape[1])[None, None],
                keys=lambda keys=keys: keys,
            )
            states = torch.cat([asked.queries[i] for i in steps], dim=3)
            newest = torch.tensor([asked.seen[i] - 1 for i in steps])
            query = Query(
                states=states,
                scale=asked.scale,
                positions=lambda newest=newest: newest[None],
                layer_idx=layer,
                max_pages=columns.shape[1],
                experts=of_queries.experts[:, newest],
                weights=of_queries.weights[:, newest],
            )
            scores = self.router.over_group(self.router.scores(query, pages))
            is_first = (columns == 0).any(-1)[:, None, None]
            scores = scores.masked_fill(is_first, torch.inf)
            scores = scores.expand(*states.shape[:2], len(steps), -1)
            order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
            order = scores.shape[-1] - 1 - order
            attention = causal_attention(states, asked, newest)
            for share, total in totals.items():
                index = order[..., : math.ceil(scores.shape[-1] * share)]
                is_read = torch.zeros(*order.shape[:3], asked.keys.shape[2], dtype=torch.bool)
                is_read[..., sealed:] = True
                at = columns[:, None, None].expand(*order.shape[:3], -1, -1)
                at = at.gather(3, index[..., None].expand(*index.shape, page_size))
                total.add(attention, is_read.scatter_(3, at.flatten(3), True), sealed)

    def columns(self, labels: Labels, sealed: int, page_size: int) -> Tensor:
        """Return the columns [B, M, P] of the tokens of each page."""
        experts, weights = labels.experts[:, :sealed], labels.weights[:, :sealed]
        if self.group == "expert":
            largest = experts.gather(2, weights.argmax(-1, keepdim=True))[..., 0]
            order = largest.argsort(dim=1, stable=True)
        elif self.group == "nothing":
            generator = torch.Generator().manual_seed(sealed)
            order = torch.rand(experts.shape[:2], generator=generator).argsort(dim=1)
        else:
            order = torch.arange(sealed).expand(len(experts), -1)
        return order.unflatten(1, (-1, page_size))


def taken(keys: Tensor, columns: Tensor) -> Tensor:
    """Return the keys [B, H, M, P, D] of the tokens at `columns` [B, M, P]."""
    index = columns.flatten(1)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    return keys.gather(2, index).unflatten(2, columns.shape[1:])


def causal_attention(states: Tensor, asked: Asked, newest: Tensor) -> Tensor:
    """Return the attention [B, H, G, q, T] of `states` that see all columns up to `newest` [q]."""
    logits = states.flatten(2, 3).float() @ asked.keys.float().mT * asked.scale
    logits = logits.unflatten(2, states.shape[2:4])
    is_hidden = torch.arange(logits.shape[-1]) > newest[:, None]
    return logits.masked_fill(is_hidden, -torch.inf).softmax(-1)
