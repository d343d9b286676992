"""Page storage under any sequence of operations, and the attention kernel on odd shapes."""

import pytest
import torch
from helpers import (
    Scattered,
    assert_close,
    page_contents,
    sealed,
    spans_of,
    tail_labels,
    tail_length,
    tiny,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pikv_kernels import partial_attention
from tolerances import ATTENTION, LSE
from transformers.cache_utils import DynamicLayer

from pikv_hf import PiKVCache
from pikv_hf.cache.passes import end_forward
from pikv_hf.layer.handoff import take_layer
from pikv_hf.layer.paged_layer import PagedLayer
from pikv_hf.model.versions import with_cache
from pikv_hf.storage.room import SPARE
from pikv_hf.storage.token_table import TokenTable

HEADS, KEY_DIM, VALUE_DIM = 2, 3, 2


class CacheOperations(RuleBasedStateMachine):
    """One paged layer against a DynamicLayer that gets the same calls."""

    @initialize(
        page_size=st.integers(1, 5),
        window=st.integers(1, 6),
        router=st.sampled_from([None, "all"]),
        compressor=st.sampled_from([None, Scattered()]),
    )
    def make(self, page_size, window, router, compressor) -> None:
        model = tiny("mixtral", num_hidden_layers=1)
        options = {"router": router, "compressor": compressor}
        self.cache = PiKVCache(model, page_size=page_size, window=window, **options)
        self.layer: PagedLayer = self.cache.layers[0]
        self.generator = torch.Generator().manual_seed(0)
        self.clear()

    def clear(self) -> None:
        self.oracle, self.recording, self.rejected = DynamicLayer(), False, 0
        self.mask = torch.ones(0, 0, dtype=torch.bool)  # [row, column], False at padding
        self.experts = torch.zeros(0, 0, 2, dtype=torch.int64)
        self.ids = torch.zeros(0, 0, dtype=torch.int64)

    @property
    def seen(self) -> int:
        return self.mask.shape[1]

    @property
    def batch(self) -> int:
        return self.mask.shape[0]

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.detach()

    # ---- what the model does ----

    @precondition(lambda self: self.seen == 0)
    @rule(pads=st.lists(st.integers(0, 7), min_size=1, max_size=4), length=st.integers(1, 25))
    def prefill(self, pads, length) -> None:
        width = length + max(pads)
        self.mask = torch.ones(len(pads), 0, dtype=torch.bool)
        self.experts = torch.zeros(len(pads), 0, 2, dtype=torch.int64)
        self.ids = torch.zeros(len(pads), 0, dtype=torch.int64)
        self.feed(torch.arange(width) >= torch.tensor(pads)[:, None])

    @precondition(lambda self: self.seen > 0)
    @rule(length=st.sampled_from([1, 1, 1, 2, 5, 9]))
    def step(self, length) -> None:
        self.feed(torch.ones(self.batch, length, dtype=torch.bool))

    def feed(self, new) -> None:
        self.mask = torch.cat([self.mask, new], dim=1)
        shape = len(new), HEADS, new.shape[1]
        keys = torch.randn(*shape, KEY_DIM, generator=self.generator)
        values = torch.randn(*shape, VALUE_DIM, generator=self.generator)
        assert self.layer.update(keys, values) == (keys, values)
        self.oracle.update(keys, values)
        assert take_layer() is self.layer
        self.layer.note_columns(None if self.mask.all() else self.mask, new.shape[1])
        self.layer.finish()
        experts = torch.randint(0, 8, (*new.shape, 2), generator=self.generator)
        self.experts = torch.cat([self.experts, experts], dim=1)
        if self.cache.settings.router is not None:
            assert self.layer.state.awaits == "experts"
            self.cache.label(0, experts.flatten(0, 1), experts.flatten(0, 1).float())
        ids = torch.randint(0, 9, new.shape, generator=self.generator)
        self.ids = torch.cat([self.ids, ids], dim=1)
        end_forward(self.cache, ids)

    # ---- what `generate` and users do ----

    @precondition(lambda self: self.seen > 0 and not self.recording)
    @rule(share=st.floats(0, 1))
    def crop(self, share) -> None:
        self.remove(int(share * (self.seen - 1)))

    @precondition(lambda self: self.seen > 0)
    @rule(drafted=st.integers(1, 9), share=st.floats(0, 1))
    def verify_a_draft(self, drafted, share) -> None:
        before = [sealed(self.layer, row) for row in range(self.batch)]
        if not self.recording:
            self.cache.activate_past_recording()
            self.recording = True
        self.feed(torch.ones(self.batch, drafted, dtype=torch.bool))
        assert before == [sealed(self.layer, row) for row in range(self.batch)]
        self.remove(round(share * drafted))

    def remove(self, count) -> None:
        self.cache.crop(-count)
        if count:
            self.oracle.crop(-count)
        self.mask = self.mask[:, : self.seen - count]
        self.experts, self.ids = self.experts[:, : self.seen], self.ids[:, : self.seen]

    def map_rows(self, index) -> None:
        self.mask, self.experts, self.ids = self.mask[index], self.experts[index], self.ids[index]

    @precondition(lambda self: self.seen > 0)
    @rule(data=st.data())
    def reorder(self, data) -> None:
        row = st.integers(0, self.batch - 1)
        index = torch.tensor(data.draw(st.lists(row, min_size=self.batch, max_size=self.batch)))
        self.cache.reorder_cache(index)
        self.oracle.reorder_cache(index)
        self.map_rows(index)

    @precondition(lambda self: 0 < self.batch <= 4)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self.oracle.batch_repeat_interleave(repeats)
        self.map_rows(torch.arange(self.batch).repeat_interleave(repeats))

    @precondition(lambda self: self.batch > 1)
    @rule(data=st.data())
    def select(self, data) -> None:
        rows = st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=self.batch)
        index = torch.tensor(data.draw(rows))
        self.cache.batch_select_indices(index)
        self.oracle.batch_select_indices(index)
        self.map_rows(index)

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.clear()

    # ---- what must hold ----

    @invariant()
    def same_states(self) -> None:
        if not hasattr(self, "cache"):
            return
        layer = self.layer
        assert layer.get_seq_length() == self.seen
        if self.seen == 0:
            assert layer.states() == (None, None) and self.cache.nbytes == 0
            return
        length, offset = layer.get_mask_sizes(3)
        more = torch.cat([self.ids, self.ids[:, :1]], dim=1)
        assert self.cache.log.starts(more) and not self.cache.log.starts(more + 1)
        assert length + offset == self.seen + 3 and length == tail_length(layer) + 3
        visible = self.mask[:, None, :, None]
        for ours, theirs in zip(
            layer.states(), (self.oracle.keys, self.oracle.values), strict=True
        ):
            assert torch.equal(ours * visible, theirs * visible)

    @invariant()
    def pages_and_tail_share_the_tokens(self) -> None:
        """Every visible token once, padding in no page; a full tail is sealed."""
        if not hasattr(self, "cache") or self.seen == 0:
            return
        settings = self.cache.settings
        for row in range(self.batch):
            tokens = self.mask[row].nonzero().flatten().tolist()
            departed = self.layer.state.num_departed[row]
            assert sorted(sealed(self.layer, row)) == tokens[:departed]
            if not self.recording:
                assert len(tokens) - departed < settings.window + 2 * settings.page_size

    @invariant()
    def same_labels(self) -> None:
        if not hasattr(self, "cache") or self.seen == 0 or self.cache.settings.router is None:
            return
        start = self.seen - tail_length(self.layer)
        tail = tail_labels(self.layer)["experts"][:, 0].long()
        assert torch.equal(tail.expand(self.batch, -1, -1), self.experts[:, start:])
        for row, tokens in page_contents(self.layer):
            at = tokens["positions"][0].long()
            assert torch.equal(tokens["experts"][0].long(), self.experts[row, at])


TestCacheOperations = CacheOperations.TestCase
TestCacheOperations.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# ---- the kernel ---------------------------------------------------------------------------------

SHAPES = [  # rows, KV heads, queries, keys, key dim, value dim
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 7, 16, 16),
    (3, 2, 4, 65, 24, 24),
    (1, 4, 3, 129, 64, 64),
    (2, 1, 5, 33, 40, 32),
    (1, 2, 17, 300, 33, 33),
]


def exact(query, key, value, mask, scale):
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask.double()
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value, lse


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", ["no", "full", "one_row", "column"])
@pytest.mark.parametrize("layout", ["dense", "one_head_for_all", "slice", "transposed"])
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["usual", "large"])
def test_partial_attention(shape, masked, layout, size) -> None:
    rows, heads, queries, keys, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*dims):
        return torch.randn(*dims, generator=generator) * size

    query = draw(rows, heads, queries, key_dim)
    key, value = laid_out(draw, layout, rows, heads, keys, key_dim, value_dim)
    mask = None
    if masked != "no":
        lead = {"full": (rows, heads), "one_row": (1, 1), "column": (rows, 1)}[masked]
        hidden = torch.rand(*lead, 1 if masked == "column" else queries, keys, generator=generator)
        hidden[..., -1] = 1  # something stays visible
        mask = torch.zeros(hidden.shape).masked_fill_(hidden < 0.3, torch.finfo(torch.float32).min)
    scale = key_dim**-0.5
    out, lse = partial_attention(query, key, value, mask, scale)
    expected, expected_lse = exact(query, key, value, mask, scale)
    assert out.shape == expected.shape and out.dtype == torch.float32
    assert lse.shape == expected_lse.shape and lse.dtype == torch.float32
    assert (out - expected).abs().max() <= ATTENTION * size**2
    assert (lse - expected_lse).abs().max() <= LSE * expected_lse.abs().max().clamp_min(1)


def laid_out(draw, layout, rows, heads, keys, key_dim, value_dim):
    if layout == "one_head_for_all":  # stride 0, as for the query heads of a group
        return draw(rows, 1, keys, key_dim).expand(-1, heads, -1, -1), draw(
            rows, 1, keys, value_dim
        ).expand(-1, heads, -1, -1)
    if layout == "slice":  # pages behind one another in a longer slab
        key, value = draw(rows, heads, keys + 5, key_dim), draw(rows, heads, keys + 5, value_dim)
        return key[:, :, :keys], value[:, :, 3 : 3 + keys]
    if layout == "transposed":  # as attention modules make them
        key, value = draw(rows, keys, heads, key_dim), draw(rows, keys, heads, value_dim)
        return key.transpose(1, 2), value.transpose(1, 2)
    return draw(rows, heads, keys, key_dim), draw(rows, heads, keys, value_dim)


def test_a_row_that_sees_nothing_has_no_weight() -> None:
    """Its log-sum-exp is so low that merging gives the other part alone, without NaN."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 3, 8, generator=generator) for _ in range(3))
    hidden = torch.zeros(2, 1, 1, 3)
    hidden[0] = torch.finfo(torch.float32).min
    dark, dark_lse = partial_attention(query, key, value, hidden, 0.3)
    _, seen_lse = partial_attention(query, key + 1, value + 1, None, 0.3)
    assert dark.isfinite().all()
    weight = (dark_lse - torch.logaddexp(dark_lse, seen_lse)).exp()
    assert (weight[0] == 0).all() and (weight[1] > 0).all()


@pytest.mark.parametrize("parts", [(50,), (1, 49), (16, 1, 33), (7,) * 7 + (1,)], ids=str)
@pytest.mark.parametrize("page_size", [1, 7])
def test_attention_over_any_partition(parts, page_size) -> None:
    """However the tokens came in, the last token attends to the same."""
    model = tiny("olmoe")
    ids = torch.randint(3, 100, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = PiKVCache(model, page_size=page_size, window=2)
        logits = [model(part, **with_cache(cache)).logits for part in ids.split(parts, dim=1)]
    assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize("is_long", [False, True])
def test_eviction_from_a_long_prompt_copies_only_what_stays(is_long, monkeypatch) -> None:
    """There is room for the page that is one too many; what stays is what a short one leaves, too."""
    joined = []
    then = TokenTable.followed_by
    monkeypatch.setattr(TokenTable, "followed_by", lambda *spans: joined.append(1) or then(*spans))
    tokens = 4 * (SPARE if is_long else SPARE // 2)
    model = tiny("mixtral", num_hidden_layers=1)
    cache = PiKVCache(model, scheduler="knorm", budget=tokens + 6, page_size=4, window=6)
    layer = cache.layers[0]
    states = [torch.randn(1, 2, tokens + 10, 8) for _ in range(2)]
    for start, end in ((0, tokens + 6), (tokens + 6, tokens + 10)):
        layer.update(*(t[:, :, start:end] for t in states))
        assert take_layer() is layer
        layer.finish()
    norms = states[0][:, :, : tokens + 4].norm(dim=-1)
    expected = norms.topk(tokens, largest=False).indices.sort().values
    (span,) = spans_of(layer, [0])
    assert torch.equal(span["positions"].long(), expected)
    for name, all_of in zip(("keys", "values"), states, strict=True):
        assert torch.equal(span[name], all_of.gather(2, expected[..., None].expand(-1, -1, -1, 8)))
    assert bool(joined) != is_long
