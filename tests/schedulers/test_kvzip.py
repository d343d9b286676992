"""KVzip: the model repeats what is held back; the marks against plain torch, and what is left of it."""

import pytest
import torch
from helpers import (
    assert_close,
    dynamic,
    forward,
    generate,
    held_by,
    paged,
    spans_of,
    tail_length,
    tiny,
)
from test_observed import asked
from test_schedulers import in_cached_space, kept
from tolerances import FLOAT32, STATES
from torch import Tensor
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.cache.repetition import listener as repetition
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import AdaKV, ChunkKV, KVzip

OPEN, BUDGET, LAYERS = 7, 25, 2
OPTIONS = {"page_size": 1, "window": OPEN, "budget": BUDGET}
WHOLE = KVzip()
CHUNKED = KVzip(prompt_ids=(5, 9, 2), chunk_size=12, overlap=4, sinks=3)


def repeated(ids: list[int], how: KVzip, first: int) -> list[tuple[range, list[int]]]:
    """The columns of each chunk of those from `first` on, and what is read to repeat it."""
    out = []
    for start in range(first, len(ids), how.chunk_size):
        columns = range(start, min(start + how.chunk_size, len(ids)))
        before = ids[max(start - how.overlap, first) : start]
        out.append((columns, [*how.prompt_ids, *before, *ids[start : columns.stop]]))
    return out


def reconstruction(name: str, ids: list[int], how: KVzip, first: int = 0) -> list[Tensor]:
    """The scores [H, T] of each layer, query by query, from the plain model without a cache.

    Of the tokens from `first` on; with others before them there are no sinks.
    """
    model = tiny(name, num_hidden_layers=LAYERS)
    marks = [torch.zeros(0)] * LAYERS
    for columns, new in repeated(ids, how, first):
        whole = {"input_ids": torch.tensor([ids + new])}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        cache = PiKVCache(model)
        forward(model, whole["input_ids"], whole["attention_mask"], cache)
        everything = asked(name, whole, num_hidden_layers=LAYERS)
        for number, (layer, queries) in enumerate(zip(paged(cache), everything, strict=True)):
            queries, keys = (t.double() for t in in_cached_space(model, layer, queries))
            sinks = [at for at in range(0 if first else how.sinks) if at < columns.start]
            best = torch.zeros(len(keys), len(columns), dtype=torch.float64)
            for at in range(len(ids), len(ids) + len(new)):
                read = [*sinks, *columns, *range(len(ids), at + 1)]
                scores = torch.einsum("hgd,htd->hgt", queries[:, :, at], keys[:, read])
                shares = (scores * model_scale(name, model)).softmax(-1)
                shares = shares[..., len(sinks) : len(sinks) + len(columns)]
                best = torch.maximum(best, shares.amax(1))
            marks[number] = best if not len(marks[number]) else torch.cat([marks[number], best], 1)
    return marks


def model_scale(name: str, model) -> float:
    return model.model.layers[0].self_attn.scaling


def best_of(scores: Tensor, count: int) -> list[set[int]]:
    return [set(row.topk(count).indices.tolist()) for row in scores]


def best_of_all(scores: Tensor, count: int) -> list[set[int]]:
    heads, length = scores.shape
    chosen = scores.flatten().topk(count * heads).indices.tolist()
    return [{at % length for at in chosen if at // length == head} for head in range(heads)]


CASES = {
    "whole": (WHOLE, WHOLE, best_of),
    "chunked": (CHUNKED, CHUNKED, best_of),
    "adakv": (AdaKV(CHUNKED, alpha=0), CHUNKED, best_of_all),
}


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("lengths", [(45,), (45, 36, 31)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("case", CASES)
def test_kept_set(name, lengths, case) -> None:
    """Of a document in pieces, and when tokens are generated, which stay; rows as if alone."""
    scheduler, how, oracle = CASES[case]
    model = tiny(name, num_hidden_layers=LAYERS)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=scheduler, **OPTIONS)
    with cache.holding():
        for start, end in ((0, 20), (20, 45)):
            forward(model, ids[:, start:end], mask[:, :end], cache)
    steps = [[kept(cache, row) for row in range(len(lengths))]]
    for end in range(46, 45 + OPEN + 4):
        one = torch.ones(len(lengths), end, dtype=torch.long)
        one[:, :45] = mask
        forward(model, torch.full((len(lengths), 1), 3), one, cache)
        steps.append([kept(cache, row) for row in range(len(lengths))])
    for row, length in enumerate(lengths):
        pad = 45 - length
        marks = reconstruction(name, ids[row, pad:].tolist(), how)
        for layer, scores in enumerate(marks):
            found = [[{at - pad for at in head} for head in step[row][layer]] for step in steps]
            expected = oracle(scores[:, :-OPEN], BUDGET - OPEN)
            assert found[0] == expected
            assert any(head != set(range(length - BUDGET, length - OPEN)) for head in expected)
            # Of the open tokens those that were repeated compete when they leave the tail.
            if oracle is best_of:
                candidates = scores[:, : length - OPEN].clone()
                for head, stay in enumerate(expected):
                    candidates[head, [at for at in range(length - OPEN) if at not in stay]] = -1
                for step, sets in enumerate(found[1 : OPEN + 1]):
                    left = length - OPEN + step + 1
                    candidates = torch.cat([candidates, scores[:, left - 1 : left]], dim=1)
                    assert sets == best_of(candidates, BUDGET - OPEN)
            # What was generated stays.
            assert all({length, length + 1} <= head for head in found[OPEN + 2])
            assert sum(map(len, found[-1])) == (BUDGET - OPEN) * len(found[-1])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_nothing_is_left_of_the_repetition(name) -> None:
    """With a budget for all, logits and tokens are those of DynamicCache; twice, with rows alike."""
    model = tiny(name)
    inputs = prompt(model, (50, 41, 46))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, full = PiKVCache(model, scheduler=CHUNKED, **{**OPTIONS, "budget": 500}), dynamic(model)
    for start, end in ((0, 30), (30, 45)):
        with cache.holding():
            for at in (start, start + 9):
                until = start + 9 if at == start else end
                forward(model, ids[:, at:until], mask[:, :until], cache)
        forward(model, ids[:, start:end], mask[:, :end], full)
        assert cache.get_seq_length() == end == cache.log.length
        assert torch.equal(cache.log.ids[:, :end], ids[:, :end])
    for at in range(45, 50):
        step = ids[:, at : at + 1], mask[:, : at + 1]
        assert_close(forward(model, *step, cache), forward(model, *step, full))
    assert all(held_by(layer, 0)[0] == 50 - OPEN for layer in paged(cache))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_next"])
def test_texts_read_with_gradients(name) -> None:
    """Layers that are not paged hold tensors with gradients, and are left as they were."""
    model = tiny(name)
    inputs = prompt(model, (45,))
    caches = []
    for grad in (True, False):
        cache = PiKVCache(model, scheduler=CHUNKED, **OPTIONS)
        with cache.holding(), torch.set_grad_enabled(grad):
            model(**inputs, **with_cache(cache))
        caches.append(cache)
    assert kept(caches[0], 0) == kept(caches[1], 0)
    step = torch.tensor([[3]]), torch.ones(1, 46, dtype=torch.long)
    assert_close(forward(model, *step, caches[0]), forward(model, *step, caches[1]))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_second_text(name) -> None:
    """What is held once more is repeated with the open tokens before it, generated ones too."""
    model = tiny(name, num_hidden_layers=LAYERS)
    inputs = prompt(model, (60,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=CHUNKED, **{**OPTIONS, "budget": 500})
    with cache.holding():
        forward(model, ids[:, :28], mask[:, :28], cache)
    for end in (29, 30):
        forward(model, ids[:, end - 1 : end], mask[:, :end], cache)
    with cache.holding():
        forward(model, ids[:, 30:], mask, cache)
    first = 30 - OPEN
    again = reconstruction(name, ids[0].tolist(), CHUNKED, first)
    before = reconstruction(name, ids[0, :28].tolist(), CHUNKED)
    for layer, older, newer in zip(paged(cache), before, again, strict=True):
        sealed = [span["record"][0, :, :, 0] for span in spans_of(layer, [0])]
        marks = torch.cat([*sealed, layer.state.observed.record[0, :, :, 0]], dim=1).double()
        expected = torch.cat([older[:, :first], newer], dim=1)
        assert torch.allclose(marks, expected, rtol=STATES, atol=FLOAT32)


def test_where_a_prompt_ends() -> None:
    """A piece of one token is of the document, too: as if that was read at once."""
    model = tiny("mixtral")
    inputs = prompt(model, (41,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for scheduler in ("knorm", "kvzip"):
        cache = PiKVCache(model, scheduler=scheduler, **{**OPTIONS, "budget": {"prefill": 20}})
        with cache.holding():
            forward(model, ids[:, :40], mask[:, :40], cache)
            forward(model, ids[:, 40:], mask, cache)
        assert paged(cache)[0].state.held_tokens() == 20


def test_an_interrupted_repetition_can_be_taken_up() -> None:
    model = build("mixtral", "eager", num_hidden_layers=LAYERS)
    inputs = prompt(model, (45,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=CHUNKED, **OPTIONS)
    expected = PiKVCache(model, scheduler=CHUNKED, **OPTIONS)
    with expected.holding():
        forward(model, ids, mask, expected)
    count = 0

    def fail(*args) -> None:
        nonlocal count
        count += 1
        if count == 3:  # the document, a chunk, the next one
            raise KeyError

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError), cache.holding():
        forward(model, ids, mask, cache)
    hook.remove()
    assert {layer.state.num_seen for layer in paged(cache)} == {45} and cache.log.length == 45
    assert {tail_length(layer) for layer in paged(cache)} == {45}
    cache.compress()
    assert kept(cache, 0) == kept(expected, 0)


def test_a_text_that_could_not_be_read_is_not_repeated() -> None:
    model = build("mixtral", "eager", num_hidden_layers=LAYERS)
    inputs = prompt(model, (45,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, read = PiKVCache(model, scheduler=WHOLE, **OPTIONS), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: read.append(0))

    def fail(*args) -> None:
        raise KeyError

    with pytest.raises(KeyError), cache.holding():
        forward(model, ids[:, :20], mask[:, :20], cache)
        model.model.layers[1].register_forward_pre_hook(fail)
        forward(model, ids[:, 20:], mask, cache)
    assert len(read) == 2, "the repetition failed in the place of the text"


def test_questions_about_one_document() -> None:
    """Marks go with forks; a prompt that `generate` reads is repeated, too, in pieces or at once."""
    model = tiny("mixtral")
    inputs = prompt(model, (45, 38))
    outs, sets = [], []
    for options in ({}, {"prefill_chunk_size": 10}):
        cache = PiKVCache(model, scheduler=CHUNKED, hold_prompt=True, **OPTIONS)
        outs.append(generate(model, inputs, cache, **options))
        sets.append([kept(cache, row) for row in (0, 1)])
    assert torch.equal(outs[0].tokens, outs[1].tokens) and sets[0] == sets[1]
    document = PiKVCache(model, scheduler=CHUNKED, **OPTIONS)
    with document.holding():
        forward(model, inputs["input_ids"], inputs["attention_mask"], document)
    forked, mask = document.fork(2), inputs["attention_mask"]
    assert kept(forked, 1) == kept(document, 0) and kept(forked, 2) == kept(document, 1)
    question, whole = (
        torch.arange(2 * 6).view(2, 6),
        torch.cat([mask, torch.ones_like(mask)], dim=1),
    )
    asked = document.fork()  # a question of several tokens needs no holding
    forward(model, question, whole[:, :51], asked)
    for end in range(52, 52 + OPEN):
        forward(model, question[:, :1], whole[:, :end], asked)
    assert all(set(range(45, 51)) <= head for layer in kept(asked, 0) for head in layer)
    for _ in range(OPEN):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        forward(model, torch.full((2, 1), 4), mask, document)
        forward(model, torch.full((4, 1), 4), mask.repeat_interleave(2, 0), forked)
    assert kept(forked, 1) == kept(document, 0) and kept(forked, 2) == kept(document, 1)


def test_budget_in_bytes() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (600,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"page_size": 8, "window": 8, "compressor": "int4"}
    cache = PiKVCache(model, scheduler=WHOLE, budget="60kB", **options)
    with cache.holding():
        forward(model, ids[:, :560], mask[:, :560], cache)
    for end in range(561, 601):
        forward(model, ids[:, end - 1 : end], mask[:, :end], cache)
        used = sum(t.nbytes for layer in paged(cache) for t in layer.state.tensors())
        assert 30_000 < used <= 60_000


@pytest.mark.parametrize("seed", range(2))
def test_largest_in_blocks(seed, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(3, 2, 7, 8, generator=generator)
    keys = torch.randn(3, 20, 8, generator=generator)
    expected = torch.zeros(3, 20, dtype=torch.float64)
    for query in range(7):
        scores = queries[:, :, query].double() @ keys[:, : 14 + query].double().transpose(1, 2)
        shares = (scores * 0.4).softmax(-1).amax(1)
        expected[:, : 14 + query] = torch.maximum(expected[:, : 14 + query], shares)
    monkeypatch.setattr("pikv_hf.schedulers.attention_mass.MIN_QUERIES", 1)
    for block in (1, 3 * 20 * 2 * 2, 2**24):
        monkeypatch.setattr("pikv_hf.schedulers.attention_mass.BLOCK", block)
        assert torch.allclose(
            repetition.largest(queries, keys, 0.4).double(), expected, atol=FLOAT32
        )


def test_refusals() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (40,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for scheduler in ("kvzip", AdaKV(WHOLE), ChunkKV(WHOLE)):
        cache = PiKVCache(model, scheduler=scheduler, **OPTIONS)
        with pytest.raises(ValueError, match="a text of 40 tokens.*hold_prompt=True"):
            forward(model, ids, mask, cache)
        assert cache.get_seq_length() == 0
        with (
            pytest.raises(ValueError, match="the model was given embeddings"),
            cache.holding(),
        ):
            model(inputs_embeds=model.get_input_embeddings()(ids), **with_cache(cache))
    with pytest.raises(
        ValueError, match="`prompt_ids` of KVzip.* exceeds the 128 tokens of Mixtral"
    ):
        PiKVCache(model, scheduler=AdaKV(KVzip(prompt_ids=(128,))), budget=20)
    with pytest.raises(ValueError, match="it cannot repeat a text"):
        PiKVCache(tiny("minimax"), scheduler="kvzip", budget=20)
    for ids in ([1], (1.0,), (-1,), (True,), "ab"):
        with pytest.raises(ValueError, match="`prompt_ids` is"):
            KVzip(prompt_ids=ids)
    for name in ("chunk_size", "overlap", "sinks"):
        for wrong in (-1, 1.5, True):
            with pytest.raises(ValueError, match=f"`{name}` is"):
                KVzip(**{name: wrong})


def test_a_prompt_with_drafts_is_refused() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (40,))
    cache = PiKVCache(model, scheduler=KVzip(), budget=16, hold_prompt=True)
    with pytest.raises(ValueError, match="together with drafted tokens"):
        generate(model, inputs, cache, prompt_lookup_num_tokens=3)
