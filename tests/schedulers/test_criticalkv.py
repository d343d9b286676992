"""CriticalKV: two stages of choice, against the published algorithm token by token."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from helpers import forward, paged, tiny
from test_schedulers import OPEN, in_cached_space, kept, read_alone, snapkv
from tolerances import NORMS, SUMS
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import (
    AdaKV,
    Candidates,
    ChunkKV,
    CriticalKV,
    KeyDiff,
    Knorm,
    Needs,
    PyramidKV,
    SnapKV,
    Tova,
    criticalkv,
)

BUDGET, RATIO, EPSILON, ALPHA = 24, 0.5, 1e-4, 0.2
SNAP = SnapKV(window_size=6, kernel_size=3)


def norms(model, layer) -> torch.Tensor:
    """[H, T]: the mean over a KV head's query heads of the L1 norm of W_o v, head by head."""
    module = model.model.layers[layer.state.layer_idx].self_attn
    keys, values = (t[0].double() for t in layer.states())
    output = module.o_proj.weight.double()
    if layer.state.latent_rank is not None:
        dims = module.qk_nope_head_dim, module.v_head_dim
        up = module.kv_b_proj(keys[0].float()).double().unflatten(-1, (-1, sum(dims)))
        values = up[..., dims[0] :].transpose(0, 1)  # of each query head
    length, dim = values.shape[1:]
    heads = output.shape[1] // dim
    found = torch.zeros(heads, length, dtype=torch.float64)
    for head in range(heads):
        value = values[head * len(values) // heads]
        for token in range(length):
            projected = output[:, head * dim : (head + 1) * dim] @ value[token]
            found[head, token] = projected.abs().sum()
    return found.unflatten(0, (len(keys), -1)).mean(1)


def two_stages(scores, norm, budget: int, safe=()) -> set[int]:
    """What one head keeps of T tokens: algorithm 1; `safe` tokens in any case."""
    order = sorted(range(len(scores)), key=lambda t: -scores[t])
    chosen = set(order[: int(budget * RATIO)]) | set(safe)
    rest = sorted(
        (t for t in order if t not in chosen), key=lambda t: -(scores[t] + EPSILON) * norm[t]
    )
    return chosen | set(rest[: budget - len(chosen)])


def one_budget(scores, norm, budget: int) -> list[set[int]]:
    return [two_stages(s, n, budget) for s, n in zip(scores.tolist(), norm.tolist(), strict=True)]


def shared_budget(scores, norm, budget: int) -> list[set[int]]:
    """The scores share the budget as AdaKV does; then each head chooses for itself."""
    safe = int(ALPHA * budget)
    orders = [sorted(range(len(s)), key=lambda t, s=s: -s[t]) for s in scores.tolist()]
    rest = [(float(scores[h, t]), h) for h, order in enumerate(orders) for t in order[safe:]]
    rest = sorted(rest, reverse=True)[: len(scores) * (budget - safe)]
    counts = [safe + sum(head == h for _, head in rest) for h in range(len(scores))]
    heads = zip(scores.tolist(), norm.tolist(), counts, orders, strict=True)
    return [two_stages(s, n, count, order[:safe]) for s, n, count, order in heads]


CRITICAL = CriticalKV(SNAP, RATIO, EPSILON)
METHODS = {
    "criticalkv": (CRITICAL, one_budget),
    "adakv": (AdaKV(CRITICAL, alpha=ALPHA), shared_budget),
}


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("lengths", [(60,), (60, 51, 43)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("method", METHODS)
def test_kept_set(name, lengths, method) -> None:
    """As published; in every row what it would be alone; not what the scores alone would keep."""
    scheduler, oracle = METHODS[method]
    model = tiny(name, num_hidden_layers=2)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"page_size": 1, "window": OPEN, "budget": BUDGET}
    cache = PiKVCache(model, scheduler=scheduler, **options)
    forward(model, ids, mask, cache)
    by_scores_alone = []
    for row, length in enumerate(lengths):
        whole, everything = read_alone(name, model, ids[row : row + 1, -length:])
        for layer, queries, found in zip(paged(whole), everything, kept(cache, row), strict=True):
            queries, keys = in_cached_space(model, layer, queries)
            scores = snapkv(queries, keys, paged(cache)[0].state.scale)
            norm = norms(model, layer)[:, :-OPEN]
            expected = oracle(scores, norm, BUDGET - OPEN)
            pad = ids.shape[1] - length
            assert [{at - pad for at in head} for head in found] == expected
            assert sum(map(len, found)) == (BUDGET - OPEN) * len(found)
            by_scores_alone.append(expected == oracle(scores, torch.ones_like(norm), BUDGET - OPEN))
    assert not all(by_scores_alone), "norms make no difference"


@pytest.mark.parametrize("dtype", NORMS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_norms_in_blocks(seed, dtype, monkeypatch) -> None:
    """The same in blocks of any size, with several rows and GQA."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    keys, values, output = draw(2, 3, 17, 8), draw(2, 3, 17, 5), draw(32, 3 * 2 * 5)
    positions = torch.arange(17).expand(2, 3, -1)
    tokens = Candidates(positions, keys, values, keys[:, :, :0], 17, output=output)
    weights = output.double().T.unflatten(0, (3, 2, 5))
    expected = torch.einsum("rhtd,hgdo->rhgto", values.double(), weights).abs().sum(-1).mean(2)
    for block in (1, 5 * 2 * 32, 2**24):
        monkeypatch.setattr(criticalkv, "BLOCK", block)
        found = criticalkv.projected_norms(tokens).double()
        assert torch.allclose(found, expected, rtol=NORMS[dtype])


def test_sinks_and_places_without_a_token() -> None:
    """Sinks stay though their values vanish, and what is no token never stays."""
    torch.manual_seed(0)
    keys, queries = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 2, 6, 8)
    values = torch.randn(1, 2, 12, 4)
    valid = torch.arange(12).expand(1, 2, 12) >= torch.tensor([0, 5])[:, None]
    values[0, 0, :3] = values[0, 1, 5:8] = 0
    positions = torch.arange(12).expand(1, 2, 12)
    tokens = Candidates(
        positions, keys, values, keys[:, :, :0], 12, queries=queries, valid=valid, sinks=3,
        output=torch.randn(16, 16),
    )  # fmt: skip
    tokens = replace(tokens, constants=CRITICAL.constants(tokens))
    for scheduler in (CRITICAL, AdaKV(CRITICAL)):
        keep = scheduler.keep(tokens, 6)[0].tolist()
        assert set(range(3)) <= set(keep[0]) and {5, 6, 7} <= set(keep[1])
        assert all(at == -1 or valid[0, head, at] for head in (0, 1) for at in keep[head])


class Spy(CriticalKV):
    """Compares, whenever it decides, the norms that were kept with those of the values."""

    read: ClassVar[list[list[int]]] = []
    decided: ClassVar[list[int]] = []

    @property
    def needs(self) -> Needs:
        return super().needs | Needs(inputs=self.constant_inputs)

    def constants(self, tokens: Candidates) -> torch.Tensor:
        self.read.append([tokens.layer_idx, *tokens.positions[0, 0].tolist()])
        return super().constants(tokens)

    def keep(self, tokens: Candidates, budget: int) -> torch.Tensor:
        expected = criticalkv.projected_norms(tokens)
        assert tokens.constants is not None
        assert torch.allclose(tokens.constants[..., 0], expected, rtol=SUMS)
        self.decided.append(tokens.layer_idx)
        return super().keep(tokens, budget)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_each_norm_is_made_once(name, monkeypatch) -> None:
    """However often it is decided; also while everything is within the budget."""
    monkeypatch.setattr(Spy, "read", [])
    monkeypatch.setattr(Spy, "decided", [])
    model = tiny(name, num_hidden_layers=2)
    ids = prompt(model, (20,))["input_ids"]
    cache = PiKVCache(model, scheduler=Spy(SNAP), budget=32, page_size=4, window=4, interval=4)
    model.generate(ids, **with_cache(cache), max_new_tokens=40, do_sample=False)
    for layer in range(2):
        found = [at for idx, *places in Spy.read if idx == layer for at in places]
        assert found == list(range(cache.layers[layer].state.num_departed[0]))
        assert Spy.decided.count(layer) >= 5
    assert "values" not in CriticalKV().needs.inputs


def test_composition_and_refusals() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (80,))
    options = {"budget": 30, "page_size": 1, "window": 6}
    sets = []
    for scheduler in (SNAP, CriticalKV(SNAP, 1.0), CRITICAL, PyramidKV(CRITICAL, beta=1.5)):
        cache = PiKVCache(model, scheduler=scheduler, **options)
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        sets.append(kept(cache, 0))
    assert sets[0] == sets[1], "the first stage is all"
    assert sets[1] != sets[2] and len(sets[3][0][0]) > len(sets[2][0][0]) > len(sets[3][-1][0])
    for scorer in (Knorm(), KeyDiff(), Tova(), AdaKV(SNAP), CRITICAL):
        with pytest.raises(ValueError, match="the attention that each KV head pays"):
            CriticalKV(scorer)
    for scorer in (AdaKV(SNAP), CRITICAL):
        with pytest.raises(ValueError, match="chooses by more than its scores"):
            ChunkKV(scorer)
    for ratio in (-0.1, 1.1, True, "a"):
        with pytest.raises(ValueError, match="`first_stage_ratio` is"):
            CriticalKV(first_stage_ratio=ratio)
    for epsilon in (-1.0, float("nan"), "a"):
        with pytest.raises(ValueError, match="`epsilon` is"):
            CriticalKV(epsilon=epsilon)


@pytest.mark.parametrize("change", [lambda w: w.to("meta"), lambda w: w.to(torch.uint8)])
def test_a_projection_without_plain_weights_is_refused(change) -> None:
    from zoo import build

    model = build("mixtral", "eager")
    projection = model.model.layers[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(change(projection.weight.data), requires_grad=False)
    with pytest.raises(
        ValueError, match="none of .* that is a linear module with its weight at hand"
    ):
        PiKVCache(model, scheduler="criticalkv", budget=30)
