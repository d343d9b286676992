"""Profiles of KV heads: what is measured, on which texts, what is written, and for which model."""

import copy
from itertools import islice
from pathlib import Path

import pytest
import torch
from command_line import pikv
from helpers import held_by, paged, tiny
from safetensors.torch import load_file
from tolerances import FITTED, SUMS, VISIBLE
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.fitting.head_effect import QUERIES, HeadEffect
from pikv_hf.fitting.needle_texts import needle_pieces
from pikv_hf.fitting.profile import profile
from pikv_hf.fitting.profile_job import Job
from pikv_hf.model import loading
from pikv_hf.model.versions import CACHE, with_cache
from pikv_hf.needles.haystack import make_haystack
from pikv_hf.schedulers import Duo
from pikv_hf.schedulers.duo import read_profile

TINY = Job(length=100, sinks=3, recent=20)


def pieces_of(model: PreTrainedModel, count: int, length: int = 100) -> list[Tensor]:
    return [*prompt(model, (count * length,), seed=5)["input_ids"].split(length, dim=1)]


def measured(model, path: Path, count: int = 3, job: Job = TINY) -> dict[int, Tensor]:
    pieces = pieces_of(model, count, job.length)
    return profile(model, lambda done: pieces[done:], path, job)


def streamed_outputs(model, piece: Tensor, idx: int) -> list[Tensor]:
    """What the attention module of a layer returns for the newest queries: as it is, and with each
    KV head restricted by a mask for its query heads alone."""
    module = model.model.layers[idx].self_attn
    seen = []
    handle = module.register_forward_pre_hook(lambda *args: seen.append(args), with_kwargs=True)
    with torch.no_grad():
        model(piece, use_cache=False)
    handle.remove()
    (_, args, kwargs) = seen[0]
    length, heads = piece.shape[1], model.config.num_attention_heads
    groups = heads // model.config.num_key_value_heads
    at = torch.arange(length)
    causal = at <= at[:, None]
    near = causal & ((at < TINY.sinks) | (at[:, None] - at < TINY.recent))
    outputs = []
    for head in (None, *range(heads // groups)):
        visible = causal.expand(1, heads, -1, -1).clone()
        if head is not None:
            visible[:, head * groups : (head + 1) * groups] = near
        bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        with torch.no_grad():
            out = module(*args, **(kwargs | {"attention_mask": bias, CACHE: None}))
        outputs.append(out[0][0, -QUERIES:].double())
    return outputs


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "gpt_oss"])
def test_scores(name, tmp_path) -> None:
    """The change of the module's own output under a mask that restricts one head; also with the
    attention sinks of gpt-oss."""
    model = tiny(name, **({"attention_bias": False} if name == "gpt_oss" else {}))
    found = measured(model, tmp_path / "heads")
    cache = PiKVCache(model)
    assert found.keys() == {layer.state.layer_idx for layer in paged(cache)}
    cache.detach()
    for idx, scores in found.items():
        changes, norm = 0, 0
        for piece in pieces_of(model, 3):
            full, *streams = streamed_outputs(model, piece, idx)
            changes = changes + torch.stack([(out - full).square().sum() for out in streams])
            norm = norm + full.square().sum()
        assert torch.allclose(scores.double(), (changes / norm).sqrt(), rtol=FITTED, atol=SUMS)
        assert scores.min() > VISIBLE
    assert {k: v.tolist() for k, v in read_profile(tmp_path / "heads").items()} == {
        k: v.tolist() for k, v in found.items()
    }


def with_heads(local: int) -> PreTrainedModel:
    """A layer with one KV head that attends to the token itself, and one that attends to all alike.

    All tokens have a large number in common; queries and keys of the local head read nothing else,
    so that only the rotary angle between them counts.
    """
    model = build("mixtral", num_hidden_layers=1)
    attention: nn.Module = model.model.layers[0].self_attn
    dim = attention.head_dim
    groups = model.config.num_attention_heads // 2
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 50 * model.model.embed_tokens.weight.std()
        attention.v_proj.weight[:, 0] = 0
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        attention.q_proj.weight.view(2, groups * dim, -1)[local, :, 0] = 10
        attention.k_proj.weight.view(2, dim, -1)[local, :, 0] = 10
    return model


@pytest.mark.parametrize("local", [0, 1])
def test_a_local_head_and_a_global_one(local, tmp_path) -> None:
    model = with_heads(local)
    job = Job(length=300, sinks=2, recent=30)
    scores = measured(model, tmp_path / "heads", 2, job)[0]
    assert scores[local] < VISIBLE and scores[1 - local] > 0.05
    duo = Duo(tmp_path / "heads", 0.5, sinks=2, recent=30)
    ids = pieces_of(model, 1, 300)[0]
    cache = PiKVCache(model, scheduler=duo, page_size=1, window=1)
    with torch.no_grad():
        model(ids, **with_cache(cache))
    held = held_by(paged(cache)[0], 0).tolist()
    assert held[local] == 31 and held[1 - local] == 299


def test_no_more_than_a_layer_is_held() -> None:
    """And of a text that was read nothing but sums."""
    model = tiny("mixtral")
    most = []

    class Watched(HeadEffect):
        def keep(self, tokens, budget):
            most.append(cache.nbytes)
            return super().keep(tokens, budget)

    effect = Watched(3, 20)
    cache = PiKVCache(model, scheduler=effect, budget=2, page_size=1, window=1)
    ids = pieces_of(model, 1, 2000)[0]
    with torch.no_grad():
        model(ids, **with_cache(cache))
    layer = (
        2 * model.config.num_key_value_heads * paged(cache)[0].state.tail.keys.shape[3] * 4 * 2000
    )
    queries = len(paged(cache)) * QUERIES * model.config.num_attention_heads * 16 * 4
    mask = 4 * 2000 * 2000  # the model's own, which the running forward pass refers to
    assert len(most) == len(paged(cache)) > 1
    assert max(most) < 1.2 * layer + queries + mask + 10_000
    assert cache.nbytes < 0.1 * layer + queries + 10_000
    cache.reset()
    assert sum(t.nbytes for e in effect.sums.values() for t in e) < 1000


def test_the_model_is_left_as_it_was(tmp_path) -> None:
    model = build("mixtral")  # not one that other tests have caches of
    before, config = dict(vars(model)), model.model.layers[0].self_attn.config
    measured(model, tmp_path / "heads")
    assert vars(model) == before and model.model.layers[0].self_attn.config is config


def test_interrupted_it_goes_on(tmp_path) -> None:
    """To the same file, without reading again; another call's work is not taken up."""
    model, pieces = tiny("mixtral"), pieces_of(tiny("mixtral"), 4)
    expected = profile(model, lambda done: pieces[done:], tmp_path / "whole", TINY)
    out, asked = tmp_path / "heads", []

    def broken(done):
        yield from islice(pieces, done, 2)
        raise KeyboardInterrupt

    def rest(done):
        asked.append(done)
        return pieces[done:]

    with pytest.raises(KeyboardInterrupt):
        profile(model, broken, out, TINY)
    assert not out.exists()
    with pytest.raises(ValueError, match="was left by a profile of another"):
        profile(model, rest, out, Job(length=100, sinks=4, recent=20))
    with pytest.raises(ValueError, match="was left by a profile of another"):
        profile(model, rest, out, TINY, source="other texts")
    found = profile(model, rest, out, TINY)
    assert asked == [2]
    assert all(torch.equal(found[idx], expected[idx]) for idx in expected)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "heads.partial").exists()


def test_an_interruption_within_a_text_counts_it_not(tmp_path, monkeypatch) -> None:
    model = tiny("mixtral")
    pieces = pieces_of(model, 3)
    expected = profile(model, lambda done: pieces[done:], tmp_path / "whole", TINY)
    real, calls = HeadEffect.keep, []

    def stopped(self, tokens, budget):
        calls.append(tokens.layer_idx)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, tokens, budget)

    monkeypatch.setattr(HeadEffect, "keep", stopped)
    for _ in range(2):
        try:
            found = profile(model, lambda done: pieces[done:], tmp_path / "heads", TINY)
        except KeyboardInterrupt:
            saved = load_file(tmp_path / "heads.partial")
            assert {name.partition(".")[0] for name in saved} == set("0123"[: len(paged_of(model))])
    assert all(torch.equal(found[idx], expected[idx]) for idx in expected)


def paged_of(model) -> list:
    cache = PiKVCache(model)
    cache.detach()
    return paged(cache)


def test_refusals(tmp_path, monkeypatch) -> None:
    out = tmp_path / "heads"
    with pytest.raises(ValueError, match="layer 0 caches latents"):
        measured(tiny("deepseek_v3"), out)
    with pytest.raises(ValueError, match="fewer than 100 tokens"):
        profile(tiny("mixtral"), lambda done: [], out, TINY)
    with pytest.raises(ValueError, match="`length` is 5000, but the model reads at most"):
        model = tiny("mixtral", max_position_embeddings=4096)
        profile(model, lambda done: [], out, Job(length=5000))
    with pytest.raises(ValueError, match="`length` is 383; it must be 384 or more"):
        Job(length=383)
    for name in ("length", "texts", "sinks", "recent"):
        with pytest.raises(ValueError, match=f"`{name}` is -1"):
            Job(**{name: -1})
    broken = copy.deepcopy(tiny("mixtral"))
    broken.model.layers[0].self_attn.v_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        measured(broken, out)
    assert [*tmp_path.iterdir()] == []


# ---- the bundled model, the command -------------------------------------------------------------


def test_needle_pieces(bundled) -> None:
    """All needles stand in the text and are asked for at its end; a call goes on where one stopped."""
    tokenizer = bundled[1]
    pieces = [*needle_pieces(tokenizer, 500, 3)]
    for piece in pieces:
        assert piece.shape == (1, 500)
        end = tokenizer.decode(piece[0, -QUERIES - 10 :])
        assert end.count("what is the magic number") == 4
    assert torch.equal(next(needle_pieces(tokenizer, 500, 3, first=2)), pieces[2])


def test_the_heads_that_retrieve(bundled, tmp_path) -> None:
    """Of the bundled model those of the second layer: answers are lost without them alone."""
    model, tokenizer = bundled
    path = tmp_path / "heads"
    job = Job(length=1024, texts=4, sinks=4, recent=60)
    scores = profile(model, lambda done: needle_pieces(tokenizer, 1024, 4, done), path, job)
    assert scores[1].min() > scores[0].max()
    stacks = [make_haystack(length=700, needles=4, seed=seed) for seed in range(8)]

    def exact(scheduler) -> int:
        right = 0
        for stack in stacks:
            with PiKVCache(model, scheduler=scheduler, page_size=8, window=8) as cache:
                inputs = loading.encode(model, tokenizer, stack.prompt())
                out = model.generate(**inputs, **with_cache(cache), max_new_tokens=3)
                reply = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
                right += stack.is_exact(reply)
        return right

    duo = Duo(path, 0.5, sinks=4, recent=60)
    turned = copy.copy(duo)
    object.__setattr__(turned, "_streams", {layer: ~s for layer, s in duo._streams.items()})
    assert exact(duo) >= 7
    assert exact(turned) <= 4


def test_command(tmp_path) -> None:
    out, text = tmp_path / "a" / "heads.safetensors", tmp_path / "text.txt"
    options = ("--length", 400, "--sinks", 4, "--recent", 60)
    result = pikv("profile", "--out", out, "--texts", 2, *options)
    assert result.exit_code == 0, result.output
    assert f"Written: {out}" in result.stdout
    text.write_text(make_haystack(length=900, seed=3).prompt())
    other = tmp_path / "other.safetensors"
    assert pikv("profile", "--out", other, "--text", text, *options).exit_code == 0
    assert read_profile(other)[0].tolist() != read_profile(out)[0].tolist()
    cache = f"scheduler=duo('{out}', recent=60)"
    result = pikv("generate", "--prompt-file", text, "--cache", cache, "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert "tokens seen" in result.stdout


def test_command_says_what_is_wrong(tmp_path, monkeypatch) -> None:
    out = tmp_path / "heads"
    short = tmp_path / "short.txt"
    short.write_text("the cat waits .")
    for args, says in (
        (("--length", 100), "`length` is 100; it must be 384 or more"),
        (("--length", 4096), "the model reads at most 2048 tokens"),
        (("--text", short), "the texts have fewer than 2048 tokens"),
        (("--out", "/dev/null/x/heads"), "cannot be made"),
    ):
        result = pikv("profile", "--out", out, *args)
        assert result.exit_code == 2 and says in result.stderr
        assert "Traceback" not in result.output

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(HeadEffect, "keep", stopped)
    result = pikv("profile", "--out", out)
    assert result.exit_code == 130 and "the same command goes on" in result.stderr
