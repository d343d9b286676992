"""What is refused: with one clear error, as early as can be, and nothing is changed by it."""

import types

import pytest
import torch
from helpers import (
    PADDED,
    SMALL,
    assert_close,
    assert_same,
    dynamic,
    forward,
    generate,
    tiny,
)
from torch import nn
from transformers import AutoConfig, BertConfig, DynamicCache, GenerationConfig
from zoo import build, prompt

from pikv_hf import COMPRESSORS, PLACEMENTS, ROUTERS, SCHEDULERS, PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import ChunkKV, PyramidKV, Random, SnapKV, StreamingLLM

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


# ---- construction -----------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ({"compressor": "int9"}, ValueError, r"`compressor` is 'int9'.*int8"),
    ({"scheduler": "streamingllm"}, ValueError, r"`scheduler`.*'streaming_llm'"),
    ({"router": "al"}, ValueError, r"`router` is 'al'.*'all'"),
    ({"placement": "lokal"}, ValueError, r"`placement` is 'lokal'.*'local'"),
    ({"compressor": "xyz"}, ValueError, r"one of \[.*'identity', 'int2'"),
    ({"compressor": 8}, TypeError, r"`compressor` is a int"),
    ({"scheduler": COMPRESSORS["int8"]()}, TypeError, r"`scheduler`.*Int8"),
    ({"router": dict}, TypeError, r"`router`"),
    ({"placement": torch.device("cpu")}, TypeError, r"`placement` is a device"),
    ({"page_size": 0}, ValueError, r"`page_size` is 0"),
    ({"page_size": 2.5}, ValueError, r"`page_size` is 2.5"),
    ({"page_size": True}, ValueError, r"`page_size` is True"),
    ({"page_size": None}, ValueError, r"`page_size` is None"),
    ({"window": 0}, ValueError, r"`window` is 0"),
    ({"window": -1}, ValueError, r"`window` is -1"),
    ({"window": "8"}, ValueError, r"`window` is '8'"),
    ({"budget": 64}, ValueError, r"`budget` is 64.*`scheduler`"),
    ({"budget": 0, "scheduler": "streaming_llm"}, ValueError, r"`budget` is 0"),
    ({"budget": -5, "scheduler": "streaming_llm"}, ValueError, r"`budget` is -5"),
    ({"budget": 1.5, "scheduler": "streaming_llm"}, ValueError, r"`budget` is 1.5"),
    ({"budget": float("nan"), "scheduler": "streaming_llm"}, ValueError, r"`budget` is nan"),
    ({"budget": True, "scheduler": "streaming_llm"}, ValueError, r"`budget` is True"),
    ({"budget": "half", "scheduler": "streaming_llm"}, ValueError, r"`budget` is 'half'"),
    ({"budget": 32, "window": 32, "scheduler": "streaming_llm"}, ValueError, r"`window` is 32"),
    ({"window": 64, "scheduler": StreamingLLM(4, 32)}, ValueError, r"`window` is 64"),
    ({"config": AutoConfig}, (TypeError, ValueError), r"`config`|exactly one"),
    ({"sheduler": "h2o"}, TypeError, r"sheduler"),
]


@pytest.mark.parametrize("arguments, error, match", BAD_ARGUMENTS, ids=lambda x: str(x)[:50])
def test_arguments(arguments, error, match) -> None:
    model = build_once()
    with pytest.raises(error, match=match):
        PiKVCache(model, **arguments)
    assert_untouched(model)


def build_once():
    return tiny("mixtral")


def assert_untouched(model) -> None:
    assert "generate" not in vars(model)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert getattr(module, "config", model.config) is model.config


@pytest.mark.parametrize(
    "config",
    [{}, "mixtral", GenerationConfig(), types.SimpleNamespace(num_hidden_layers=2), nn.Identity()],
    ids=lambda value: type(value).__name__,
)
def test_config_that_is_none(config) -> None:
    with pytest.raises(TypeError, match=r"`config` is a \w+.*PreTrainedConfig"):
        PiKVCache(config=config)


@pytest.mark.parametrize(
    "model", ["mistralai/Mixtral-8x7B-v0.1", nn.Linear(2, 2), 3, DynamicCache(), BertConfig()]
)
def test_model_that_is_none(model) -> None:
    with pytest.raises(TypeError, match=r"`model` is a \w+.*PreTrainedModel"):
        PiKVCache(model)


def test_neither_model_nor_config() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        PiKVCache()
    with pytest.raises(ValueError, match="exactly one"):
        PiKVCache(tiny("mixtral"), config=tiny("mixtral").config)


@pytest.mark.parametrize(
    "option",
    [
        {"scheduler": "streaming_llm"},
        {"compressor": "int8"},
        {"router": "all"},
    ],
    ids=str,
)
def test_options_that_need_a_model(option) -> None:
    name = next(iter(option))
    with pytest.raises(ValueError, match=rf"`{name}`.*PiKVCache\(model"):
        PiKVCache(config=tiny("mixtral").config, **option)


@pytest.mark.parametrize("registry", [COMPRESSORS, ROUTERS, SCHEDULERS, PLACEMENTS], ids=str)
def test_every_registered_name_is_accepted(registry) -> None:
    arguments = {id(COMPRESSORS): "compressor", id(ROUTERS): "router"}
    arguments |= {id(SCHEDULERS): "scheduler", id(PLACEMENTS): "placement"}
    options = {"budget": 0.5} if registry is SCHEDULERS else {}
    for name, method in registry.items():
        if getattr(method, "needs_calibration", False) or getattr(method, "needs_file", False):
            continue  # accepted with a file: test_calibrate.py, test_duo.py, test_pikv_quest.py
        for value in (name, method, method()):
            PiKVCache(tiny("mixtral"), **{arguments[id(registry)]: value}, **options)


def test_a_scheduler_without_a_budget() -> None:
    with pytest.raises(ValueError, match=r"`scheduler` is SnapKV.*needs a `budget`"):
        PiKVCache(tiny("mixtral"), scheduler="snapkv")


@pytest.mark.parametrize(
    "method, wrong",
    [
        (SnapKV, {"kernel_size": 4}),
        (SnapKV, {"window_size": 0}),
        (ChunkKV, {"chunk_length": 0}),
        (ChunkKV, {"scorer": "snapkv"}),
        (PyramidKV, {"beta": 1}),
        (PyramidKV, {"scorer": None}),
        (Random, {"seed": -1}),
    ],
    ids=str,
)
def test_options_of_schedulers(method, wrong) -> None:
    with pytest.raises((ValueError, TypeError), match=f"`{next(iter(wrong))}` is"):
        method(**wrong)


@pytest.mark.parametrize("sinks, window", [(-1, 8), (4, 0), (4, -3), (1.5, 8), ("4", 8)])
def test_streaming_llm_arguments(sinks, window) -> None:
    with pytest.raises((ValueError, TypeError), match="`sinks`|`window`"):
        StreamingLLM(sinks, window)


def test_unsupported_attention_implementation() -> None:
    model = build("mixtral")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"attn_implementation='flex_attention'.*'sdpa', 'eager'"):
        PiKVCache(model)
    assert_untouched(model)
    model.set_attn_implementation("eager")
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    assert_same(generate(model, inputs, PiKVCache(model, **SMALL)), expected)


def test_a_router_on_a_dense_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"`router`.*gates.*LlamaForCausalLM"):
        PiKVCache(model, router="all")
    assert_untouched(model)
    ids = torch.randint(3, 60, (1, 30))
    with torch.no_grad():
        ours = model(ids, **with_cache(PiKVCache(model, **SMALL))).logits
        assert_close(ours, model(ids, **with_cache(dynamic(model))).logits)


def test_an_implementation_set_while_attached_is_refused_before_anything_is_written() -> None:
    model = build("mixtral", "sdpa")
    cache = PiKVCache(model, **SMALL)
    inputs = prompt(model, PADDED)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation='flex_attention', whose masks"):
        model(**inputs, **with_cache(cache))
    assert cache.get_seq_length() == 0
    model.set_attn_implementation("eager")
    expected = generate(model, inputs, dynamic(model))
    assert_same(generate(model, inputs, cache), expected)


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


# ---- keys and values of a layer ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_layer_lists_its_keys_and_values(name) -> None:
    model = tiny(name)
    ids, caches = prompt(model, (27,))["input_ids"], (dynamic(model), PiKVCache(model, **SMALL))
    for cache in caches:
        model(ids[:, :20], **with_cache(cache))
        model(ids[:, 20:], **with_cache(cache))
    for expected, layer in zip(*(cache.layers for cache in caches), strict=True):
        assert_close(layer.keys, expected.keys)
        assert_close(layer.values, expected.values)
        with pytest.raises(AttributeError, match="`keys` of a paged layer cannot be set"):
            layer.keys = expected.keys
    dropping = PiKVCache(model, scheduler="knorm", budget=12, **SMALL)
    assert dropping.layers[0].keys is None
    model(ids, **with_cache(dropping))
    with pytest.raises(RuntimeError, match="a cache that drops tokens"):
        _ = dropping.layers[0].keys
