"""Expected attention against its published formula, written out for one row and query head."""

import pickle

import pytest
import torch
from helpers import forward, paged, queries_of, tail_states, tiny
from test_observed import asked
from test_schedulers import assert_same_best, best, in_cached_space, kept
from tolerances import STATES
from torch import Tensor
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import Candidates, ExpectedAttention

OPEN, LAYERS, FUTURE = 9, 2, 40
LENGTHS = (50, 41, 33)
# The last dims that turn, in halves; the base of the angles.
TURNING = {"mixtral": (16, 1e6), "olmoe": (16, 1e4), "deepseek_v3": (8, 1e4), "jamba": (0, 0)}


def matrix(dims: int, turning: int, base: float, position: int) -> Tensor:
    """The rotation [dims, dims] at a position, in float64."""
    whole, half = torch.eye(dims, dtype=torch.float64), turning // 2
    for i in range(half):
        angle = torch.tensor(position * base ** (-i / half), dtype=torch.float64)
        a, b = dims - turning + i, dims - half + i
        whole[a, a] = whole[b, b] = angle.cos()
        whole[a, b], whole[b, a] = -angle.sin(), angle.sin()
    return whole


def expected_scores(method, queries, keys, values, scale, turning) -> Tensor:
    """Scores [H, K - OPEN] of one row from queries [H, G, T, D], keys and values [H, K, ...]."""
    heads, groups, length, dims = queries.shape
    sinks = method.sinks
    future = [matrix(dims, *turning, length + i) for i in range(method.future)]
    mean_rotation = torch.stack(future).mean(0)
    out = torch.zeros(keys.shape[:2], dtype=torch.float64)
    for head in range(heads):
        key = keys[head, sinks:].double()
        for group in range(groups):
            first = max(length - method.window_size, sinks)
            free = torch.stack(
                [
                    matrix(dims, *turning, at).T @ queries[head, group, at].double()
                    for at in range(first, length)
                ]
            )
            mean = mean_rotation @ free.mean(0)
            covariance = mean_rotation @ free.T.cov(correction=0) @ mean_rotation.T
            exponent = scale * key @ mean
            if method.use_covariance:
                exponent += scale**2 / 2 * torch.einsum("ti,ij,tj->t", key, covariance, key)
            out[head, sinks:] += exponent.softmax(0) / groups
    if method.use_vnorm:
        out = (out + method.epsilon) * values.double().norm(dim=-1)
    out[:, :sinks] = torch.inf
    return out[:, :-OPEN]


METHODS = {
    "whole_prompt": ExpectedAttention(1000, FUTURE),
    "newest": ExpectedAttention(12, FUTURE, sinks=2, epsilon=0.01),
    "mean_only": ExpectedAttention(20, 1, sinks=0, use_covariance=False),
    "keys_only": ExpectedAttention(20, FUTURE, use_vnorm=False),
}


@pytest.mark.parametrize("name", TURNING)
@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("method", METHODS)
def test_kept_set(name, lengths, method) -> None:
    """Of a prompt, those of the published scores; in every row what it would be alone."""
    scheduler = METHODS[method]
    model = tiny(name, num_hidden_layers=LAYERS)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=scheduler, budget=0.5, page_size=1, window=OPEN)
    forward(model, ids, mask, cache)
    numbers = [layer.state.layer_idx for layer in paged(cache)]
    order = []
    for row, length in enumerate(lengths):
        pad = ids.shape[1] - length
        alone = {"input_ids": ids[row : row + 1, pad:], "attention_mask": mask[row : row + 1, pad:]}
        whole = PiKVCache(model)
        forward(model, alone["input_ids"], alone["attention_mask"], whole)
        everything = asked(name, alone, num_hidden_layers=LAYERS)
        assert len(everything) == len(numbers)
        for layer, queries, found in zip(paged(whole), everything, kept(cache, row), strict=True):
            queries, keys = in_cached_space(model, layer, queries)
            values = layer.states()[layer.state.latent_rank is None][0]
            scale = paged(cache)[0].state.scale
            scores = expected_scores(scheduler, queries, keys, values, scale, TURNING[name])
            chosen = best(scores, int(length * 0.5) - OPEN)
            for head, best_head, score in zip(found, chosen, scores, strict=True):
                finite = score.masked_fill(score.isinf(), 0)
                assert_same_best({at - pad for at in head}, best_head, finite)
            order += [sorted(head) for head in chosen]
    assert any(head[scheduler.sinks + 2] > scheduler.sinks + 3 for head in order)


@pytest.mark.parametrize("missing", [0, 7], ids=["alike", "ragged"])
def test_scores(missing) -> None:
    """Scores themselves, also of a head that holds fewer tokens, whose queries all count."""
    model = tiny("mixtral", num_hidden_layers=LAYERS)
    inputs = prompt(model, LENGTHS[:1])
    scheduler = ExpectedAttention(future=FUTURE)
    cache = PiKVCache(model, scheduler=scheduler, budget=1000)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    layer = paged(cache)[1]
    (keys, values), queries = tail_states(layer), queries_of(layer)
    places = LENGTHS[0] - OPEN
    valid = torch.ones(1, 2, places, dtype=torch.bool)
    valid[:, 1, :missing] = False
    tokens = Candidates(
        positions=torch.arange(places).expand(1, 2, -1),
        keys=keys[:, :, :places],
        values=values[:, :, :places],
        open_keys=keys[:, :, places:],
        seen=LENGTHS[0],
        queries=queries,
        scale=layer.state.scale,
        valid=valid if missing else None,
        rotary=cache.states[1].rotary,
    )
    scores = scheduler.scores(tokens)[0]
    for head, first in enumerate((0, missing)):
        mine = queries[0, [head]], keys[0, [head], first:], values[0, [head], first:]
        expected = expected_scores(scheduler, *mine, layer.state.scale, TURNING["mixtral"])
        assert torch.allclose(scores[head, first:].double(), expected[0], rtol=STATES)


@pytest.mark.parametrize("wrong", [{"window_size": 0}, {"future": 0.5}, {"sinks": -1}])
def test_refused(wrong) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is .* whole number"):
        ExpectedAttention(**wrong)


def test_refused_where_keys_cannot_be_moved() -> None:
    """When the cache is made, and the model is left as it was."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build("mixtral", rope_parameters=rope)
    with pytest.raises(ValueError, match="'dynamic', whose angles change"):
        PiKVCache(model, scheduler="expected_attention", budget=0.5)
    assert not any("generate" in vars(module) for module in model.modules())
    PiKVCache(model, scheduler="snapkv", budget=0.5)


def test_saved_and_forked_caches_go_on() -> None:
    """A copy knows how keys turn, too: it keeps what the original keeps."""
    model = tiny("mixtral", num_hidden_layers=LAYERS)
    inputs = prompt(model, (60,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=METHODS["newest"], budget=24, page_size=1, window=OPEN)
    forward(model, ids[:, :40], mask[:, :40], cache)
    other = pickle.loads(pickle.dumps(cache)).attach(model)
    for each in (cache, other):
        forward(model, ids[:, 40:], mask, each)
    assert kept(cache, 0) == kept(other, 0)
