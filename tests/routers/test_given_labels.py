"""Labels that `update` is given, instead of the choice of the model's gates."""

import pytest
import torch
from helpers import (
    PADDED,
    SMALL,
    assert_same,
    exact_model,
    generate,
    paged,
    slabs_of,
    tail_labels,
    tiny,
)
from torch import Tensor
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.routers import TopK

EXPERTS = 8


def given(cache: PiKVCache, monkeypatch, *, weighted: bool) -> dict[int, list[Tensor]]:
    """Let `cache.update` be called with labels; returns them by layer as they are given."""
    found: dict[int, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    update = cache.update

    def updated(keys, values, layer_idx, *args, **kwargs):
        shape = keys.shape[0], keys.shape[2], 2
        labels = {"expert_ids": torch.randint(EXPERTS, shape, generator=generator)}
        if weighted:
            labels["expert_weights"] = torch.rand(shape, generator=generator).to(keys.dtype)
        found.setdefault(layer_idx, []).append(labels["expert_ids"])
        return update(keys, values, layer_idx, *args, **labels, **kwargs)

    monkeypatch.setattr(cache, "update", updated)
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_pages_and_tail_carry_them(weighted, monkeypatch) -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, router="all", **SMALL)
    found = given(cache, monkeypatch, weighted=weighted)
    generate(model, prompt(model, (41,)), cache)
    for layer in paged(cache):
        labels = torch.cat(found[layer.state.layer_idx], dim=1)
        sealed = [store.meta["experts"][:, 0, : store.length] for store in slabs_of(layer)]
        held = torch.cat([*sealed, tail_labels(layer)["experts"][:, 0]], dim=1)
        assert torch.equal(held.long(), labels)


def test_the_labels_of_the_gates_select_the_same_pages(monkeypatch) -> None:
    """What the hooks hear, given by hand, gives the same result."""
    model = exact_model("mixtral")
    inputs, options = (
        prompt(model, PADDED),
        {"router": TopK(top_pages=2, experts_from="previous_token")},
    )
    cache = PiKVCache(model, **options, **SMALL)
    heard: dict[int, list] = {}
    label = cache.label

    def recorded(layer_idx, experts, weights):
        heard.setdefault(layer_idx, []).append((experts, weights))
        label(layer_idx, experts, weights)

    monkeypatch.setattr(cache, "label", recorded)
    expected = generate(model, inputs, cache)
    again = PiKVCache(model, **options, **SMALL)
    update, passes = again.update, {idx: iter(labels) for idx, labels in heard.items()}

    def updated(keys, values, layer_idx, *args, **kwargs):
        experts, weights = (t.view(len(keys), keys.shape[2], -1) for t in next(passes[layer_idx]))
        kwargs |= {"expert_ids": experts, "expert_weights": weights}
        return update(keys, values, layer_idx, *args, **kwargs)

    monkeypatch.setattr(again, "update", updated)
    assert_same(generate(model, inputs, again), expected)


def test_without_need_they_are_ignored(monkeypatch) -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, router="quest", **SMALL)
    given(cache, monkeypatch, weighted=True)
    generate(model, prompt(model, (41,)), cache)
    assert all("experts" not in store.meta for layer in paged(cache) for store in slabs_of(layer))


IDS = torch.zeros(1, 5, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"expert_ids": IDS[0]}, r"`expert_ids` of shape \(5, 2\).*\(1, 5, 'k'\)"),
        ({"expert_ids": IDS[:, :4]}, r"`expert_ids` of shape \(1, 4, 2\)"),
        ({"expert_ids": IDS.float()}, "whole numbers"),
        ({"expert_ids": IDS + EXPERTS}, "from 8 to 8, but layer 0 has 8 experts"),
        ({"expert_ids": IDS - 1}, "from -1 to -1"),
        (
            {"expert_ids": IDS, "expert_weights": IDS[..., :1]},
            r"`expert_weights` of shape \(1, 5, 1\)",
        ),
        ({"expert_weights": IDS.float()}, "`expert_weights` were given without `expert_ids`"),
    ],
    ids=["dims", "tokens", "dtype", "large", "negative", "weights", "alone"],
)
def test_labels_that_do_not_fit(labels, message) -> None:
    """One sentence, before anything is stored."""
    cache = PiKVCache(tiny("mixtral"), router="topk", **SMALL)
    states = torch.zeros(1, 2, 5, 16)
    with pytest.raises(ValueError, match=message):
        paged(cache)[0].update(states, states, **labels)
    assert not cache.get_seq_length()
    cache.detach()


def test_a_layer_without_a_gate_takes_none() -> None:
    cache = PiKVCache(tiny("deepseek_v3"), router="topk", **SMALL)
    latents = torch.zeros(1, 1, 5, 16)
    with pytest.raises(ValueError, match="layer 0.*without a gate"):
        cache.layers[0].update(latents, latents, expert_ids=IDS)
    cache.detach()


def test_labels_given_twice(monkeypatch) -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, router="topk", **SMALL)
    generate(model, prompt(model, (9,)), cache)
    with pytest.raises(ValueError, match="layer 0: the newest tokens have their experts already"):
        paged(cache)[0].label(IDS[:, :1], IDS[:, :1].float())
