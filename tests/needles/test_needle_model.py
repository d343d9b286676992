"""The bundled model loads, speaks its language, answers exactly, and uses its experts."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pikv_hf.needles.haystack import (
    KINDS,
    NEEDLE_MODEL,
    REPLY_ROOM,
    Haystack,
    is_exact,
    make_haystack,
    vocabulary,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NEEDLE_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(NEEDLE_MODEL).eval()


def reply(model, tokenizer, stacks: list[Haystack]) -> list[str]:
    batch = tokenizer([s.prompt() for s in stacks], padding=True, return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=REPLY_ROOM)
    return tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def test_checkpoint_is_small_safetensors_with_a_card():
    assert (NEEDLE_MODEL / "model.safetensors").exists()
    assert (NEEDLE_MODEL / "README.md").exists()
    assert sum(f.stat().st_size for f in NEEDLE_MODEL.iterdir()) <= 8 * 2**20


def test_generation_is_greedy_and_knows_its_special_tokens(model, tokenizer):
    config = model.generation_config
    assert not config.do_sample
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_every_word_is_one_known_token(tokenizer):
    ids = tokenizer(" ".join(vocabulary())).input_ids
    assert len(ids) == len(set(ids)) == len(vocabulary())
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [96, 257, 2048])
def test_haystack_has_the_stated_tokens_and_survives_the_round_trip(tokenizer, length, kind):
    haystack = make_haystack(length=length, needles=3, seed=length, kinds=(kind,))
    for index in range(3):
        ids = tokenizer(haystack.prompt(index)).input_ids
        assert len(ids) + REPLY_ROOM == length
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == haystack.prompt(index)


def test_haystack_depends_on_the_seed_alone():
    first, again, other = (make_haystack(length=256, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_text_states_each_answer_once():
    haystack = make_haystack(length=512, needles=6, seed=3, kinds=KINDS)
    for question, answer in zip(haystack.questions, haystack.answers, strict=True):
        prefix = question.split(" ? ")[1]
        assert haystack.text.count(prefix) == 1
        assert f"{prefix} {answer} ." in haystack.text


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_places_the_first_needle(depth):
    haystack = make_haystack(length=1024, needles=2, seed=4, depth=depth)
    at = haystack.text.index(haystack.questions[0].split(" ? ")[1])
    assert at / len(haystack.text) == pytest.approx(depth, abs=0.1)


def test_length_is_kept_for_other_tokenizers():
    haystack = make_haystack(length=600, needles=3, count=len)  # one token per character
    longest = max(len(haystack.prompt(index)) for index in range(3))
    assert 540 <= longest + REPLY_ROOM <= 600


@pytest.mark.parametrize("wrong", [{"length": 40}, {"depth": 2}, {"needles": 0}, {"kinds": ("x",)}])
def test_impossible_wishes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"got|room"):
        make_haystack(**{"length": 128, **wrong})


@pytest.mark.parametrize(
    ("generated", "exact"),
    [("forty seven . <eos>", True), ("Forty-seven!", True), ("forty", False), ("forty one", False)],
)
def test_exact_means_all_words_of_the_answer(generated, exact):
    assert is_exact(generated, "forty seven") is exact


@pytest.mark.parametrize(("length", "questions"), [(512, 40), (2048, 20)])
def test_answers_are_exact(model, tokenizer, length, questions):
    right = 0
    for seed in range(7000, 7000 + questions, 10):
        stacks = [make_haystack(length=length, needles=8, seed=seed + i) for i in range(10)]
        replies = reply(model, tokenizer, stacks)
        right += sum(s.is_exact(r) for s, r in zip(stacks, replies, strict=True))
    assert right >= 0.95 * questions


def test_reply_ends_by_itself(model, tokenizer):
    haystack = make_haystack(length=200, seed=5)
    assert reply(model, tokenizer, [haystack]) == [f"{haystack.answers[0]} ."]


def test_every_expert_is_used_and_depends_on_the_word(model, tokenizer):
    text = make_haystack(length=1024, needles=8, seed=6).prompt()
    ids = tokenizer(text, return_tensors="pt").input_ids
    num_experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    with torch.no_grad():
        router_logits = model(ids, output_router_logits=True).router_logits
    is_the = ids[0] == tokenizer.convert_tokens_to_ids("the")
    for logits in router_logits:
        chosen = torch.nn.functional.one_hot(logits.topk(top_k).indices, num_experts).sum(1).float()
        load = chosen.mean(0) / top_k
        assert load.min() > 0.01
        assert -(load * load.log()).sum() > 0.85 * math.log(num_experts)
        distance = (chosen[is_the].mean(0) / top_k - load).abs().sum() / 2
        assert distance > 0.1
