"""A page table whose pages are dealt to places holds what a table in one place holds."""

import copy

import torch
from helpers import Scattered
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from on_one_cpu import places_of

from pikv_hf.compressors import COMPRESSORS, Identity
from pikv_hf.placements import Experts, PiKVXor, Spread
from pikv_hf.placements.site import PlacedLayer
from pikv_hf.storage.page_table import PageTable
from pikv_hf.storage.token_table import TokenTable

HEADS, DIM, EXPERTS, TOP = 2, 4, 6, 2
CODECS = {
    "identity": Identity(),
    "int8": COMPRESSORS["int8"](),
    "svd": COMPRESSORS["svd"](rank=2),
    "mixed": Scattered(),
}
METHODS = [(Spread(), 2), (Spread(), 3), (Spread(), 5)]
METHODS += [(Experts(), 2), (Experts(), 3), (Experts(capacity_factor=2.0), 5)]
METHODS += [(PiKVXor(), 2), (PiKVXor(), 4)]


def of_heads(spans: list[TokenTable], row: int = 0) -> list[dict[str, torch.Tensor]]:
    """The tokens of each KV head of a row of spans behind one another, by name."""
    found: list[dict[str, torch.Tensor]] = []
    for head in range(spans[0]["keys"].shape[1] if spans else 0):
        parts = []
        for span in spans:
            lead = span["keys"].shape[:3]
            at = row if lead[0] > 1 else 0  # rows may share one row
            table = {k: t.expand(*lead, *t.shape[3:])[at, head] for k, t in span.tensors.items()}
            valid = table.pop("valid", torch.ones(lead[2], dtype=torch.bool))
            parts.append({name: t[valid] for name, t in table.items()})
        names = parts[0] if parts else {}
        found.append({name: torch.cat([part[name] for part in parts]) for name in names})
    return found


def assert_equal(actual: list[TokenTable], expected: list[TokenTable], row: int = 0) -> None:
    """Row `row` of `actual` has the tokens of row 0 of `expected`, bit for bit."""
    pairs = zip(of_heads(actual, row), of_heads(expected), strict=True)
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


class TableOperations(RuleBasedStateMachine):
    """Two tables that get the same calls: one of several places, one of one place."""

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        page_size=st.integers(1, 5),
        codec=st.sampled_from(sorted(CODECS)),
        method=st.sampled_from(METHODS),
        number=st.integers(0, 6),
        batch=st.integers(1, 4),
        has_labels=st.booleans(),
    )
    def make(self, seed, page_size, codec, method, number, batch, has_labels) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        layer = PlacedLayer(number, number, 7, EXPERTS)
        self.one = PageTable(CODECS[codec], page_size)
        self.many = PageTable(CODECS[codec], page_size, places_of(*method, layer))
        self.batch, self.column, self.has_labels = batch, 0, has_labels
        self.is_in_order = True

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def span(self, rows: int, tokens: int) -> TokenTable:
        """New tokens, later than all others, whose experts are skewed to the first ones."""
        tensors = {
            "keys": self.draw(rows, HEADS, tokens, DIM),
            "values": self.draw(rows, HEADS, tokens, DIM),
            "positions": torch.arange(self.column, self.column + tokens).view(1, 1, -1),
        }
        if self.has_labels:
            skew = 1 / torch.arange(1.0, EXPERTS + 1)
            chosen = skew.expand(rows * tokens, -1).multinomial(TOP, generator=self.generator)
            tensors["experts"] = chosen.view(rows, 1, tokens, TOP).to(torch.uint8)
            tensors["weights"] = self.draw(rows, 1, tokens, TOP).abs()
        self.column += tokens
        return TokenTable(tensors)

    def both(self, call) -> None:
        for table in (self.one, self.many):
            call(table)

    # ---- writing ----

    @rule(tokens=st.integers(1, 40), data=st.data())
    def append(self, tokens, data) -> None:
        """Whole rows, some of the rows, or rows of other lengths."""
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, unique=True))
        rows, lengths = sorted(rows), None
        if data.draw(st.booleans()):
            count = st.integers(0, tokens)
            lengths = data.draw(st.lists(count, min_size=len(rows), max_size=len(rows)))
            lengths[data.draw(st.integers(0, len(rows) - 1))] = tokens
        span = self.span(len(rows), tokens)
        self.both(lambda table: table.append(span, rows, self.batch, lengths=lengths))

    @rule(tokens=st.integers(1, 40))
    def append_ragged(self, tokens) -> None:
        """KV heads with other numbers of tokens."""
        span = self.span(self.batch, tokens)
        counts = torch.rand(self.batch, HEADS, 1, generator=self.generator) * (tokens + 1)
        valid = torch.arange(tokens) < counts.long()
        span = span.with_columns(TokenTable({"valid": valid}))
        rows = list(range(self.batch))
        self.both(lambda table: table.append(span, rows, self.batch))

    # ---- moving rows and tokens ----

    @precondition(lambda self: self.many.slabs)
    @rule(data=st.data(), free=st.booleans(), more=st.integers(0, 2))
    def map_rows(self, data, free, more) -> None:
        row, count = st.integers(0, self.batch - 1), max(1, self.batch + more - 1)
        source = data.draw(st.lists(row, min_size=count, max_size=count))
        self.both(lambda table: table.map_rows(source, free=free))
        self.batch = len(source)

    @precondition(lambda self: self.is_in_order)
    @rule(share=st.floats(0, 1))
    def crop(self, share) -> None:
        self.column = int(share * self.column)
        self.both(lambda table: table.crop(self.column))

    @rule(share=st.floats(0, 1), again=st.booleans())
    def take(self, share, again) -> None:
        """Rows of one signature leave their pages, and some of their tokens go back."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in range(self.batch):
            groups.setdefault((*self.many.signature(row), *self.one.signature(row)), []).append(row)
        chosen = [rows for rows in groups.values() if self.many.held(rows[0]) is not None]
        one, many = (table.take(chosen, with_values=True) for table in (self.one, self.many))
        for rows, expected, span in zip(chosen, one, many, strict=True):
            assert expected is not None and span is not None
            for row in range(len(rows)):
                assert_equal([span], [expected.for_rows(len(rows)).of_rows([row])], row)
            if again and len(span):
                kept = expected.valid_first().narrow(0, max(1, int(share * len(span))))
                kept = kept.without("keys", "values") if kept.codes() else kept
                self.both(lambda table, kept=kept, rows=rows: table.append(kept, rows, self.batch))

    @rule()
    def fork(self) -> None:
        """Go on with copies that share the pages, while the first tables keep theirs."""
        for name in ("one", "many"):
            table = getattr(self, name)
            copied = copy.deepcopy(table, {id(t): t for t in table.tensors()})
            for each in (table, copied):
                each.mark_forked()
            setattr(self, name, copied)

    @rule()
    def clear(self) -> None:
        self.both(PageTable.clear)
        self.column = 0

    # ---- what must hold ----

    @invariant()
    def the_same_tokens(self) -> None:
        if not hasattr(self, "many"):
            return
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in range(self.batch):
            held, expected = self.many.held(row), self.one.held(row)
            assert (held is None) == (expected is None)
            assert held is None or torch.equal(held, expected)
            groups.setdefault(self.many.signature(row), []).append(row)
            if expected is not None:
                assert_equal(self.many.spans([row]), self.one.spans([row]))
        for rows in groups.values():
            if self.one.held(rows[0]) is not None:
                together = self.many.spans(rows)
                for at, row in enumerate(rows):
                    assert_equal(together, self.one.spans([row]), at)

    @invariant()
    def stores_are_of_one_place(self) -> None:
        """Each page is in one store of its place, and no store is empty."""
        if not hasattr(self, "many"):
            return
        for slab in self.many.slabs:
            assert slab.page_count > 0
            assert all(t.shape[0] > 0 for t in slab.fields.values())


TestTableOperations = TableOperations.TestCase
TestTableOperations.settings = settings(
    max_examples=40,
    stateful_step_count=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
