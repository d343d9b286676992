"""What is refused of a used cache: with one clear error, and nothing is changed by it."""

import pytest
import torch
from helpers import PADDED, SMALL, assert_close, assert_same, dynamic, forward, generate, tiny
from transformers import GenerationConfig
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import StreamingLLM

families = pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_next"])

# ---- a used cache, passed in a way that transformers turns into wrong tokens ------------------


@pytest.fixture(params=[(24,), PADDED], ids=["one_row", "left_padded"])
def filled(request, name):
    """A model, a conversation with the ids of it all, and a cache that holds all but the last."""
    model = tiny(name)
    inputs = prompt(model, request.param)
    cache = PiKVCache(model, **SMALL)
    tokens = generate(model, inputs, cache).tokens
    new = torch.ones(len(tokens), tokens.shape[1] - inputs["attention_mask"].shape[1])
    mask = torch.cat([inputs["attention_mask"], new.long()], dim=1)
    return model, inputs, tokens, mask, cache


def assert_refused(filled, error, match, call) -> None:
    """`call` raises, and the cache then continues as if nothing had been tried."""
    model, inputs, tokens, mask, cache = filled
    seen = cache.get_seq_length()
    with pytest.raises(error, match=match):
        call(model)
    assert cache.get_seq_length() == seen
    reference = dynamic(model)
    generate(model, inputs, reference)
    full = {"input_ids": tokens, "attention_mask": mask}
    assert_same(generate(model, full, cache), generate(model, full, reference))


def new_ids(filled, count):
    return prompt(filled[0], (count,) * len(filled[2]), seed=4)["input_ids"]


@families
@pytest.mark.parametrize("count", [3, 60], ids=["fewer_than_cached", "more_than_cached"])
@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "short_mask"])
def test_new_ids_without_the_full_mask(filled, count, masked) -> None:
    ids = new_ids(filled, count)
    inputs = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
    cache = filled[4]
    match = r"`input_ids`.*full token ids.*attention_mask.*cache\.reset\(\)"
    assert_refused(filled, ValueError, match, lambda m: generate(m, inputs, cache))


@families
def test_everything_is_cached_already(filled) -> None:
    _, _, tokens, mask, cache = filled
    inputs = {"input_ids": tokens[:, :-1], "attention_mask": mask[:, :-1]}
    match = r"`input_ids` has \d+ tokens, but the cache holds \d+ already.*cache\.reset\(\)"
    assert_refused(filled, ValueError, match, lambda m: generate(m, inputs, cache))


@families
def test_the_same_prompt_again(filled) -> None:
    _, inputs, _, _, cache = filled
    match = r"cache holds \d+ already.*cache\.reset\(\)"
    assert_refused(filled, ValueError, match, lambda m: generate(m, inputs, cache))


@families
def test_another_and_longer_prompt(filled) -> None:
    cache = filled[4]
    inputs = {"input_ids": new_ids(filled, 70)}
    match = r"does not begin with the \d+ tokens that the cache holds.*cache\.reset\(\)"
    assert_refused(filled, ValueError, match, lambda m: generate(m, inputs, cache))


@families
@pytest.mark.parametrize("where", ["argument", "config", "model_config"])
def test_use_cache_false(filled, where, monkeypatch) -> None:
    model, _, tokens, mask, cache = filled
    options = {"use_cache": False} if where == "argument" else {}
    if where == "config":
        options["generation_config"] = GenerationConfig(use_cache=False, max_new_tokens=3)
    if where == "model_config":
        monkeypatch.setattr(model.generation_config, "use_cache", False)

    def call(m):
        try:
            generate(m, {"input_ids": tokens, "attention_mask": mask}, cache, **options)
        finally:
            monkeypatch.undo()

    assert_refused(filled, ValueError, r"`use_cache` is False.*use_cache=True", call)


@families
@pytest.mark.parametrize("where", ["argument", "config"])
@pytest.mark.parametrize("implementation", ["paged", "static", "dynamic"])
def test_cache_implementation(filled, where, implementation) -> None:
    _, _, tokens, mask, cache = filled
    options = {"cache_implementation": implementation}
    if where == "config":
        options = {"generation_config": GenerationConfig(**options, max_new_tokens=3)}
    inputs = {"input_ids": tokens, "attention_mask": mask}
    match = rf"`cache_implementation` is '{implementation}'.*only one"
    assert_refused(filled, ValueError, match, lambda m: generate(m, inputs, cache, **options))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_by_position_or_through_the_class(filled) -> None:
    """The other spellings of the same calls."""
    model, inputs, tokens, _, cache = filled
    prompt_again = inputs["input_ids"]
    calls = [
        lambda m: m.generate(prompt_again, **with_cache(cache), max_new_tokens=3),
        lambda m: m.generate(inputs=prompt_again, **with_cache(cache), max_new_tokens=3),
        lambda m: type(m).generate(m, tokens, **with_cache(cache), use_cache=False),
    ]
    for call in calls:
        assert_refused(filled, ValueError, "cache", call)
        cache.reset()
        generate(model, inputs, cache)


# ---- forward ----------------------------------------------------------------------------------


@families
def test_forward_without_using_the_cache(filled) -> None:
    _, _, tokens, mask, cache = filled

    def call(model):
        model(tokens[:, -1:], attention_mask=mask, **with_cache(cache), use_cache=False)

    assert_refused(filled, ValueError, r"`use_cache` is False", call)


@families
def test_forward_at_wrong_positions(filled) -> None:
    _, _, tokens, mask, cache = filled

    def call(model):
        positions = torch.zeros(len(tokens), 1, dtype=torch.int64)
        model(tokens[:, -1:], attention_mask=mask, position_ids=positions, **with_cache(cache))

    assert_refused(filled, ValueError, r"start at position .* but the cache ends at", call)


@families
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_another_batch_size(filled, how) -> None:
    _, _, tokens, mask, cache = filled
    ids, mask = torch.cat([tokens, tokens]), torch.cat([mask, mask])

    def call(model):
        if how == "forward":
            forward(model, ids[:, -1:], mask, cache)
        else:
            generate(model, {"input_ids": ids, "attention_mask": mask}, cache)

    assert_refused(filled, ValueError, r"(?s)batch|rows|does not begin", call)


@families
def test_beams_on_a_filled_cache(filled) -> None:
    _, _, tokens, mask, cache = filled
    inputs = {"input_ids": tokens, "attention_mask": mask}
    match = r"(?s)batch|rows|batch_repeat_interleave"
    assert_refused(filled, ValueError, match, lambda m: generate(m, inputs, cache, num_beams=3))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_another_dtype(filled) -> None:
    model, _, tokens, mask, cache = filled
    try:

        def call(m):
            forward(m.bfloat16(), tokens[:, -1:], mask, cache)

        with pytest.raises(ValueError, match=r"dtype.*bfloat16.*float32"):
            call(model)
    finally:
        tiny.cache_clear()


@families
def test_attention_weights_are_refused(filled) -> None:
    _, _, tokens, mask, cache = filled

    def call(model):
        model(tokens[:, -1:], attention_mask=mask, **with_cache(cache), output_attentions=True)

    assert_refused(filled, ValueError, r"`output_attentions`", call)


@families
@pytest.mark.parametrize("entry", ["generate", "forward", "decoder"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_cache_of_another_model(name, entry, fresh) -> None:
    owner, other = tiny(name), build(name, seed=1)
    inputs = prompt(owner, (24,))
    cache = PiKVCache(owner, **SMALL)
    if not fresh:
        with torch.no_grad():
            owner(**inputs, **with_cache(cache))
    attached = PiKVCache(other, **SMALL)
    for bystander in (attached, None):  # the other model has a cache of its own, or none
        if bystander is None:
            attached.detach()
        with pytest.raises(ValueError, match=r"PiKVCache\(model\)"), torch.no_grad():
            if entry == "generate":
                generate(other, inputs, cache)
            else:
                (other if entry == "forward" else other.model)(**inputs, **with_cache(cache))
    cache.reset()
    assert_same(generate(owner, inputs, cache), generate(owner, inputs, dynamic(owner)))
    attached.attach(other)
    assert_same(generate(other, inputs, attached), generate(other, inputs, dynamic(other)))


@families
def test_a_detached_cache(filled) -> None:
    model, first, tokens, mask, cache = filled
    cache.detach()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    with pytest.raises((RuntimeError, ValueError), match=r"cache\.attach\(model\)"):
        generate(model, inputs, cache)
    cache.attach(model)
    reference = dynamic(model)
    generate(model, first, reference)
    assert_same(generate(model, inputs, cache), generate(model, inputs, reference))


def test_attached_twice() -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model)
    with pytest.raises(RuntimeError, match=r"attached already.*detach"):
        cache.attach(model)


def test_attached_to_another_architecture() -> None:
    cache = PiKVCache(tiny("mixtral"), **SMALL)
    generate(tiny("mixtral"), prompt(tiny("mixtral"), PADDED), cache)
    cache.detach()
    with pytest.raises(ValueError, match="(?i)layer|model|config"):
        cache.attach(tiny("qwen3_next"))


def test_update_outside_of_a_forward() -> None:
    cache = PiKVCache(tiny("mixtral"))
    states = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="attached"):
        cache.update(states, states, 0)
    assert cache.get_seq_length() == 0


# ---- crop -------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize(
    "count, match", [(-1000, "has seen"), (1, "0 or the negative"), (1000, "0 or the negative")]
)
def test_crop(filled, count, match) -> None:
    cache = filled[4]
    assert_refused(filled, ValueError, match, lambda m: cache.crop(count))


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe_swa", "qwen3_next"])
def test_crop_that_another_layer_cannot_do(filled) -> None:
    """transformers' own layers refuse, before or behind paged ones: no layer is cropped."""
    cache = filled[4]
    assert_refused(filled, Exception, "(?i)slid|crop|window", lambda m: cache.crop(-12))


def test_crop_into_what_a_scheduler_dropped() -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, scheduler=StreamingLLM(2, 8), **SMALL)
    with torch.no_grad():
        model(prompt(model, (40,))["input_ids"], **with_cache(cache))
    with pytest.raises(ValueError, match="only the newest 4 tokens"):
        cache.crop(-5)
    cache.crop(-4)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, "2"])
def test_repeats(repeats) -> None:
    cache = PiKVCache(tiny("mixtral"))
    with pytest.raises((ValueError, TypeError), match="`repeats`"):
        cache.batch_repeat_interleave(repeats)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_that_do_not_exist(filled, method) -> None:
    cache, rows = filled[4], len(filled[2])
    index = torch.tensor([rows] * rows)
    call = getattr(cache, method)
    assert_refused(filled, (IndexError, ValueError), "", lambda m: call(index))


# ---- a mask that does not cover the tokens -----------------------------------------------------


@families
@pytest.mark.parametrize("missing", [1, 3, 24])
def test_a_mask_without_the_cached_tokens(name, missing) -> None:
    model = tiny(name)
    ids, cache = prompt(model, (27,))["input_ids"], PiKVCache(tiny(name), **SMALL)
    logits = forward(model, ids[:, :24], torch.ones_like(ids[:, :24]), cache)
    with pytest.raises(
        ValueError, match=rf"{27 - missing} columns for 3 new .* cache of 24; .* 27"
    ):
        mask = torch.ones(1, 27 - missing, dtype=torch.long)
        model(ids[:, 24:], attention_mask=mask, **with_cache(cache))
    assert cache.get_seq_length() == 24
    full = dynamic(model)
    assert_close(logits, forward(model, ids[:, :24], torch.ones_like(ids[:, :24]), full))
    rest = ids[:, 24:], torch.ones_like(ids)
    assert_close(forward(model, *rest, cache), forward(model, *rest, full))
