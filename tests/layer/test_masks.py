"""A mask that says something else of cached tokens than an earlier one: obeyed, or refused."""

from dataclasses import dataclass

import pytest
import torch
from helpers import (
    FAMILIES,
    SMALL,
    Scattered,
    assert_close,
    assert_same,
    dynamic,
    forward,
    generate,
    padded_prompt,
    paged,
    sealed,
    tiny,
)
from torch import Tensor

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.routers import PageRouter
from pikv_hf.schedulers import AdaKV, Random

families = pytest.mark.parametrize("name", FAMILIES)
# Padding on the left of row 1; tokens in the middle of row 2, as of a chat that had ended early.
LENGTHS = (30, 26, 30)
MIDDLE = slice(9, 14)


@dataclass(frozen=True)
class EveryPage(PageRouter):
    """Selects all pages, the newest first: the last has a larger part than is left out."""

    top_p: float | None = 1 - 2**-20

    def scores(self, query, pages):
        return pages.numbers[:, :, None, None].float()


@pytest.fixture
def read(name):
    """A model, three rows of which 30 tokens are cached, more tokens, and the mask of them all."""
    model = tiny(name)
    ids, mask = padded_prompt(model, LENGTHS)
    mask[2, MIDDLE] = 0
    more = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(3))
    caches = PiKVCache(model, **SMALL), dynamic(model)
    for cache in caches:
        forward(model, ids, mask, cache)
    assert all(sealed(layer, 2)[:10] == [*range(9), 14] for layer in paged(caches[0]))
    return model, ids, more, mask, caches


def longer(mask: Tensor, count: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)


def assert_continue(model, more, mask, caches) -> None:
    """The tokens `more`, some at once and the others one by one, so that pages are sealed."""
    parts = []
    for cache in caches:
        outs = [forward(model, more[:, :4], longer(mask, 4), cache)]
        outs += [
            forward(model, more[:, i : i + 1], longer(mask, i + 1), cache) for i in range(4, 12)
        ]
        parts.append(torch.cat(outs, dim=1))
    assert_close(*parts)


@families
def test_padding_in_the_middle_stays_hidden(read) -> None:
    model, _, more, mask, caches = read
    assert_continue(model, more, mask, caches)


@families
def test_hiding_sealed_tokens_is_obeyed(read) -> None:
    """By one token and by several, and shown again afterwards; other rows see what they saw."""
    model, _, more, mask, caches = read
    for hidden in ({0: [3]}, {1: [4, 5, 6], 2: [14]}, {}):
        for length in (1, 3):
            changed = longer(mask, length)
            for row, columns in hidden.items():
                changed[row, columns] = 0
            new, more = more[:, :length], more[:, length:]
            assert_close(*(forward(model, new, changed, cache) for cache in caches))
            mask = longer(mask, length)


@families
@pytest.mark.parametrize("options", [{"num_beams": 2}, {}], ids=str)
def test_generate_behind_hidden_tokens(read, options) -> None:
    model, ids, more, mask, caches = read
    changed = longer(mask, 4)
    changed[0, 3:20], changed[1, 5] = 0, 0
    inputs = {"input_ids": torch.cat([ids, more[:, :4]], dim=1), "attention_mask": changed}
    if options:
        for cache in caches:
            cache.reorder_cache(torch.arange(3).repeat_interleave(2))
    assert_same(*(generate(model, inputs, cache, **options) for cache in caches))


OPTIONS = [
    {"compressor": "int8"},
    {"compressor": Scattered()},
    {"scheduler": "random", "budget": 20},
    {"scheduler": AdaKV(Random()), "budget": 20, "compressor": "int8"},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in ("mixtral", "deepseek_v3") for options in OPTIONS),
        # The first layer of deepseek_v3 has no experts for a router.
        ("mixtral", {"router": EveryPage(), "compressor": "int4"}),
    ],
    ids=str,
)
def test_what_is_hidden_has_no_weight(name, options) -> None:
    """Whatever the hidden tokens are: in one layer no other token depends on them."""
    model, outs = tiny(name, num_hidden_layers=1), []
    ids, mask = padded_prompt(model, LENGTHS)
    changed = longer(mask, 4)
    changed[0, 3:9] = 0
    for token in (7, 8):
        ids[0, 3:9] = token
        cache = PiKVCache(model, **options, **SMALL)
        forward(model, ids, mask, cache)
        outs.append(forward(model, ids[:, :4].clone().fill_(5), changed, cache))
    assert_close(*outs)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_showing_what_was_padding_is_refused(read) -> None:
    model, _, more, mask, caches = read
    for row, column in ((1, 0), (1, 3), (2, 9)):
        changed = longer(mask, 1)
        changed[row, column] = 1
        with pytest.raises(ValueError, match=f"shows token {column} of row {row}, .*hide it"):
            forward(model, more[:, :1], changed, caches[0])
    with pytest.raises(ValueError, match="shows token 0 of row 1"), torch.no_grad():
        model(more[:, :1], **with_cache(caches[0]))
    assert_continue(model, more, mask, caches)


@families
def test_hiding_open_tokens_is_obeyed(read) -> None:
    """They are padding from then on: what is sealed later leaves them out."""
    model, _, more, mask, caches = read
    mask[0, 27:29] = 0
    assert_continue(model, more, mask, caches)
    for layer in paged(caches[0]):
        assert {27, 28}.isdisjoint(sealed(layer, 0)) and 30 in sealed(layer, 0)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("window", [4, 60], ids=["sealed", "open"])
def test_a_chat_that_ends_early(name, window) -> None:
    """Its row is filled up with tokens that the mask of the next turn hides."""
    model = tiny(name)
    ids, mask = padded_prompt(model, (12, 9))
    caches = PiKVCache(model, page_size=4, window=window), dynamic(model)
    turns = [generate(model, {"input_ids": ids, "attention_mask": mask}, c) for c in caches]
    assert_same(*turns)
    text = torch.cat([turns[1].tokens, turns[1].tokens[:, -4:]], dim=1)
    mask = longer(mask, text.shape[1] - 12)
    mask[1, 13:26] = 0
    inputs = {"input_ids": text, "attention_mask": mask}
    assert_same(*(generate(model, inputs, cache) for cache in caches))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_rows_and_crop_take_the_padding_along(read) -> None:
    model, _, more, mask, caches = read
    rows = torch.tensor([2, 0, 1, 1])
    for cache in caches:
        cache.reorder_cache(rows[:3])
        cache.crop(-10)
    fork = caches[0].fork()
    changed = longer(mask[rows[:3], :20], 12)
    assert_continue(model, more, mask[rows[:3], :20], (fork, caches[1]))
    changed[0, 9] = 1
    with pytest.raises(ValueError, match="shows token 9 of row 0"):
        forward(model, more, changed, caches[0])
    caches[0].batch_select_indices(torch.tensor([1]))
    with torch.no_grad():
        model(more[:1], **with_cache(caches[0]))  # this row has no padding, and needs no mask
    caches[0].reset()
    with torch.no_grad():
        model(more, **with_cache(caches[0]))


# ---- masks of each query, made by the user ------------------------------------------------------


def own_mask(attn: str, queries: int, columns: int) -> Tensor:
    """[2, 1, queries, columns], causal: bool, or what is added to scores."""
    newest = torch.arange(columns - queries, columns)[:, None]
    visible = (torch.arange(columns) <= newest).expand(2, 1, -1, -1).clone()
    return visible if attn == "sdpa" else as_scores(visible)


def as_scores(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.fixture(params=["eager", "sdpa"])
def own(request, name):
    """A model, two rows of tokens, its kind of mask; and two caches of 20 tokens, of which the fifth

    is hidden from the last query alone.
    """
    model, attn = tiny(name, request.param), request.param
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(1))
    caches = PiKVCache(model, **SMALL), dynamic(model)
    first = own_mask(attn, 20, 20)
    first[0, 0, -1, 5] = first[0, 0, 0, -1]
    assert_close(*(run(model, ids[:, :20], first, cache) for cache in caches))
    return model, ids, attn, caches


def run(model, ids: Tensor, mask: Tensor, cache) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, **with_cache(cache)).logits


own_masks = pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen3_next"])


@own_masks
def test_hidden_from_the_last_query_is_no_padding(own) -> None:
    model, ids, attn, caches = own
    for start, end in ((20, 24), (24, 25), (25, 30)):
        mask = own_mask(attn, end - start, end)
        assert_close(*(run(model, ids[:, start:end], mask, cache) for cache in caches))


@own_masks
@pytest.mark.parametrize("query", [0, 3])
def test_own_masks_hide_tokens_from_a_query(own, query) -> None:
    model, ids, attn, caches = own
    mask = own_mask(attn, 4, 24)
    for column in (7, 19):  # sealed, and open
        mask[1, 0, query, column] = own_mask(attn, 2, 2)[0, 0, 0, 1]
    assert_close(*(run(model, ids[:, 20:24], mask, cache) for cache in caches))
    mask = own_mask(attn, 1, 25)
    assert_close(*(run(model, ids[:, 24:25], mask, cache) for cache in caches))
    if attn == "eager":
        mask = own_mask(attn, 4, 29)
        mask[1, 0, query, 7] = -1.0  # neither hidden nor as visible as the others
        with pytest.raises(ValueError, match="adds to the scores of token 7 of row 1"):
            run(model, ids[:, 25:29], mask, caches[0])


@own_masks
def test_own_masks_of_each_head_are_refused_later(own) -> None:
    model, ids, attn, caches = own
    mask = own_mask(attn, 1, 21).repeat(1, model.config.num_attention_heads, 1, 1)
    with pytest.raises(ValueError, match="masks each of 4 heads apart.*cache.reset"):
        run(model, ids[:, 20:21], mask, caches[0])


def test_a_repetition_hides_what_was_hidden() -> None:
    """KVzip repeats a second text; of the first, tokens in the middle are padding."""
    model = tiny("mixtral")
    ids, mask = padded_prompt(model, LENGTHS)
    mask[2, MIDDLE] = 0
    cache = PiKVCache(model, scheduler="kvzip", budget=60, hold_prompt=True, **SMALL)
    for end in (30, 60):
        forward(model, ids, longer(mask, end - 30), cache)
        cache.compress()
    for layer in paged(cache):
        kept = sealed(layer, 2)
        assert set(range(9, 14)).isdisjoint(kept) and 40 in kept


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_own_masks_of_each_head_from_the_first_tokens_on(name) -> None:
    """The model attends by itself then: keys, and latents with their rotary part, are all given."""
    model = tiny(name)
    ids, _ = padded_prompt(model, (34,))
    heads = model.config.num_attention_heads
    mask = torch.ones(1, heads, 34, 34).tril()
    mask[:, ::2, :, 5] = mask[:, ::2, :, 5] * (torch.arange(34) == 5)  # hidden from half of them
    mask = (1 - mask) * torch.finfo(torch.float32).min
    logits = []
    for cache in (PiKVCache(model, **SMALL), dynamic(model)):
        outs = []
        for start, end in ((0, 20), (20, 33), (33, 34)):
            given = mask[:, :, start:end, :end]
            with torch.no_grad():
                out = model(ids[:, start:end], attention_mask=given, **with_cache(cache))
            outs.append(out.logits)
        logits.append(torch.cat(outs, dim=1))
    assert_close(*logits)


# ---- what a crop or a fork has left behind ------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("compressor", [None, Scattered()], ids=str)
def test_hiding_tokens_behind_a_crop_into_pages(read, compressor) -> None:
    model, ids, more, mask, _ = read
    caches = PiKVCache(model, compressor=compressor, **SMALL), dynamic(model)
    changed = longer(mask[:, :11], 3)
    changed[0, 2] = 0
    outs = []
    for cache in caches:
        forward(model, ids, mask, cache)
        cache.crop(-19)
        outs.append(forward(model, more[:, :3], changed, cache))
    assert_close(*outs)


def test_a_fork_of_which_a_row_seals_nothing() -> None:
    """Rows that read one stored row, with statistics: questions of different lengths."""
    model, outs = tiny("mixtral"), []
    document, mask = padded_prompt(model, (28,))
    questions, asked = padded_prompt(model, (2, 2, 12))
    cache = PiKVCache(model, scheduler="h2o", budget=2000, page_size=4, window=8)
    forward(model, document, mask, cache)
    fork, full = cache.fork(3), dynamic(model)
    forward(model, document.expand(3, -1), mask.expand(3, -1), full)
    for each in (fork, full):
        mask = torch.cat([mask[:1].expand(3, -1), asked], dim=1) if mask.shape[1] == 28 else mask
        parts = [forward(model, questions, mask, each)[:, -1:]]
        parts += [forward(model, questions[:, :1], longer(mask, n), each) for n in range(1, 9)]
        outs.append(torch.cat(parts, dim=1))
    assert_close(*outs)
