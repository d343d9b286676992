"""One document, many questions: held back until it is whole, then forked."""

import pytest
import torch
from helpers import (
    BUDGETED,
    FAMILIES,
    PADDED,
    assert_close,
    assert_same,
    dynamic,
    forward,
    generate,
    paged,
    slabs_of,
    tail_length,
    tiny,
    two_layers,
)
from test_schedulers import kept
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

SMALL = {"page_size": 2, "window": 4}
OPTIONS = {"budget": 16, **SMALL}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", BUDGETED)
@pytest.mark.parametrize("compressor", [None, "int4"])
def test_pieces_end_as_one(name, method, compressor) -> None:
    """A padded prompt in pieces, held back, leaves the tokens and logits that it leaves at once."""
    model = tiny(name) if method == "fastv" else two_layers(name)
    inputs = prompt(model, (50, 41, 46))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    found = []
    for way in ("at once", "holding", "hold_prompt"):
        hold = way == "hold_prompt" or (way == "at once" and method == "kvzip")
        hold |= way == "holding" and compressor is not None
        cache = PiKVCache(
            model, scheduler=method, compressor=compressor, hold_prompt=hold, **OPTIONS
        )
        pieces = [(0, 48)] if way == "at once" else [(0, 20), (20, 33), (33, 48)]
        if way == "holding":  # within the block one token is a piece, too
            pieces[2:] = [(33, 34), (34, 47), (47, 48)]

        def read(pieces=pieces, cache=cache) -> None:
            for start, end in pieces:
                forward(model, ids[:, start:end], mask[:, :end], cache)

        if way == "holding":
            with cache.holding():
                read()
                assert tail_length(paged(cache)[0]) == 48
        else:
            read()
        logits = [forward(model, ids[:, at : at + 1], mask[:, : at + 1], cache) for at in (48, 49)]
        found.append(([kept(cache, row) for row in range(3)], torch.cat(logits, dim=1)))
    for sets, logits in found[1:]:
        assert sets == found[0][0]
        assert_close(logits, found[0][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_in_pieces(name) -> None:
    """`generate(prefill_chunk_size=...)` as without, beams and a last piece of one token included."""
    model = two_layers(name)
    inputs = prompt(model, PADDED)
    for options, pieces in (({}, (7, 29)), ({"num_beams": 3}, (29,))):
        outs = []
        for extra in ({}, *({"prefill_chunk_size": piece} for piece in pieces)):
            cache = PiKVCache(model, scheduler="snapkv", hold_prompt=True, **OPTIONS)
            outs.append(generate(model, inputs, cache, max_new_tokens=8, **options, **extra))
            assert slabs_of(paged(cache)[0]) and paged(cache)[0].state.prompt_end == 30
        for out in outs[1:]:
            assert_same(out, outs[0])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_generate_with_a_cache_made_in_its_call(name) -> None:
    """`model.generate` is looked up before the cache attaches: its last piece is a prompt, too."""
    model = tiny(name)
    inputs = prompt(model, PADDED)
    outs = []
    for piece in (None, 29):
        more = {"prefill_chunk_size": piece, "max_new_tokens": 8, "do_sample": False}
        outs.append(
            model.generate(
                **inputs,
                **with_cache(PiKVCache(model, scheduler="snapkv", hold_prompt=True, **OPTIONS)),
                **{name: value for name, value in more.items() if value is not None},
            )
        )
        assert "_prefill" not in vars(model), "the cache is gone, and what it changed, too"
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    "name, method", [("mixtral", "snapkv"), ("mixtral", "kvzip"), ("deepseek_v3", "h2o")]
)
def test_a_second_turn_in_pieces(name, method) -> None:
    """One that ends with a piece of one token is a prompt as a whole."""
    model = tiny(name)
    inputs = prompt(model, PADDED)
    for new in (9, 2):
        outs = []
        for piece in (0, new - 1):
            cache = PiKVCache(model, scheduler=method, hold_prompt=True, **OPTIONS)
            tokens = generate(model, inputs, cache, max_new_tokens=4).tokens
            ids = torch.cat([tokens, tokens[:, -new:]], dim=1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, 30:])], dim=1)
            if piece:  # `generate` reads the last token alone
                forward(model, ids[:, 33:-1], mask[:, :-1], cache)
            again = {"input_ids": ids, "attention_mask": mask}
            outs.append(generate(model, again, cache, max_new_tokens=4))
            assert {layer.state.prompt_end for layer in paged(cache)} == {34 + new}
        assert_same(*outs)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", [None, "adakv", "keydiff"])
def test_fork(name, method) -> None:
    """Each of n questions about each row is answered as by a cache of its own; the origin stays."""
    model = two_layers(name)
    options = {"scheduler": method, **(OPTIONS if method else SMALL)}
    inputs = prompt(model, (50, 41))
    ids, mask = inputs["input_ids"][:, :40], inputs["attention_mask"][:, :40]
    questions = torch.randint(0, model.config.vocab_size, (6, 9))
    every = mask.repeat_interleave(3, dim=0)

    def answer(cache, batch: slice):
        logits = []
        for at in range(9):
            rows = torch.cat([every[batch], torch.ones_like(questions[batch, : at + 1])], dim=1)
            logits.append(forward(model, questions[batch, at : at + 1], rows, cache))
        return torch.cat(logits, dim=1)

    document = PiKVCache(model, **options)
    forward(model, ids, mask, document)
    before = [t.clone() for layer in paged(document) for t in layer.state.pages.tensors()]
    nbytes = document.nbytes
    forked = document.fork(3)
    actual = answer(forked, slice(None))
    assert document.nbytes == nbytes and document.get_seq_length() == 40
    after = [t for layer in paged(document) for t in layer.state.pages.tensors()]
    for was, now in zip(before, after, strict=True):  # room that is not written to may be NaN
        assert torch.equal(was.view(torch.uint8), now.contiguous().view(torch.uint8))
    alone = PiKVCache(model, **options)
    forward(model, ids, mask, alone)
    alone.batch_repeat_interleave(3)
    assert_close(actual, answer(alone, slice(None)))
    # The origin goes on after its fork has written, and both forks and origin agree.
    again = answer(document.fork(3), slice(None))
    assert_close(again, actual)
    document.batch_repeat_interleave(3)
    assert_close(answer(document, slice(None)), actual)


def test_forks_share_sealed_pages() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (400,))
    document = PiKVCache(model, page_size=8, window=8)
    forward(model, inputs["input_ids"], inputs["attention_mask"], document)
    held = {t.data_ptr() for layer in paged(document) for t in layer.state.pages.tensors()}
    fork = document.fork(4)
    slabs = [t for layer in paged(fork) for slab in slabs_of(layer) for t in slab.fields.values()]
    assert slabs and all(t.data_ptr() in held for t in slabs)
    out = model.generate(
        torch.cat([inputs["input_ids"], torch.tensor([[5, 6]])], dim=1).repeat(4, 1),
        **with_cache(fork),
        max_new_tokens=12,
    )
    expected = model.generate(
        torch.cat([inputs["input_ids"], torch.tensor([[5, 6]])], dim=1),
        **with_cache(dynamic(model)),
        max_new_tokens=12,
    )
    assert (out == expected).all()
    with pytest.raises(ValueError, match="`n` is 0"):
        document.fork(0)


def test_an_error_within_holding_still_ends_it() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (40,))
    cache = PiKVCache(model, scheduler="knorm", **OPTIONS)
    with pytest.raises(KeyError), cache.holding():
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        raise KeyError
    assert not cache.reading.is_held and paged(cache)[0].state.held_tokens() == 16


def test_the_exception_within_holding_is_the_one_that_is_raised() -> None:
    """Not that its tokens cannot be stored, which is found when the block is left."""
    model = tiny("mixtral")
    cache = PiKVCache(model, compressor="int8", **SMALL)
    with pytest.raises(KeyError, match="mine"), cache.holding():
        layer = paged(cache)[0]
        layer.update(torch.full((1, 2, 20, 16), torch.nan), torch.zeros(1, 2, 20, 16))
        layer.finish()
        raise KeyError("mine")
    assert not cache.reading.is_held
