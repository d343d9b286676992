"""LagKV against its published algorithm, written out for one row and head."""

import pytest
import torch
from helpers import forward, paged, tiny
from test_schedulers import kept
from torch import Tensor
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import Candidates, LagKV

OPEN, LAG, SINKS = 9, 8, 3
LENGTHS = (61, 46, 30)


def ranked(states: list[Tensor], sinks: int, lag: int) -> list[int]:
    """Tokens of one head, `states` [T, D] each, from the first to go to the last."""
    length = len(states[0])
    partitions = (length - sinks) // lag
    order = []
    for token in range(length):
        number, place = divmod(token - sinks, lag)
        if token < sinks:
            order.append((2, 0, token))
        elif number >= max(partitions - 1, 0):
            order.append((1, 0, token))
        else:
            start = sinks + number * lag
            scores = torch.zeros(lag, dtype=torch.float64)
            for each in states:
                part, reference = each[start : start + lag], each[start + lag : start + 2 * lag]
                low, high = reference.min(0).values, reference.max(0).values
                deviation = ((part - low) / (high - low)).double().std(-1)
                scores += deviation.softmax(-1) / len(states)
            order.append((0, int((scores < scores[place]).sum()), token))
    return [token for *_, token in sorted(order)]


def states_of(layer) -> list[Tensor]:
    """Keys and values [H, T, D] of one row; latents are keys alone."""
    keys, values = (each[0] for each in layer.states())
    return [keys, values] if layer.state.latent_rank is None else [torch.cat([keys, values], -1)]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("budget", [27, 0.5])
def test_kept_set(name, lengths, budget) -> None:
    """Open tokens are a part of the sequence: with a window, too, those of the whole prompt stay."""
    model = tiny(name)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    scheduler = LagKV(sinks=SINKS, lag_size=LAG)
    cache = PiKVCache(model, scheduler=scheduler, budget=budget, page_size=1, window=OPEN)
    forward(model, ids, mask, cache)
    chosen = set()
    for row, length in enumerate(lengths):
        whole, pad = PiKVCache(model), ids.shape[1] - length
        forward(model, ids[row : row + 1, pad:], mask[row : row + 1, pad:], whole)
        count = budget if isinstance(budget, int) else int(budget * length)
        for layer, found in zip(paged(whole), kept(cache, row), strict=True):
            for head, held in enumerate(found):
                order = ranked([each[head] for each in states_of(layer)], SINKS, LAG)
                candidates = [token for token in order if token < length - OPEN]
                expected = candidates[-(count - OPEN) :]
                assert {token - pad for token in held} == set(expected)
                chosen |= {token for token in held if SINKS + pad <= token < SINKS + pad + LAG}
    assert len(chosen) > 2, "of the first partition some tokens stay"


@pytest.mark.parametrize("cross", [False, True])
def test_heads_with_different_numbers_of_tokens(cross) -> None:
    """Each head is scored as if it stood alone, wherever its tokens begin."""
    generator = torch.Generator().manual_seed(0)
    held = torch.tensor([[40, 33, 2], [21, 40, 18]])
    keys, values = (torch.randn(2, 3, 45, 4, generator=generator) for _ in range(2))
    valid = torch.arange(40) >= 40 - held[..., None]
    scheduler = LagKV(sinks=SINKS, lag_size=LAG, cross_scoring=cross)

    def asked(rows, heads, first) -> Tensor:
        k, v = (t[rows, heads] for t in (keys, values))
        whole = first is None
        start = 0 if whole else first
        tokens = Candidates(
            positions=torch.arange(start, 40).expand(*k.shape[:2], -1),
            keys=k[:, :, start:40],
            values=v[:, :, start:40],
            open_keys=k[:, :, 40:],
            open_values=v[:, :, 40:],
            seen=45,
            valid=valid if whole else None,
        )
        return scheduler.scores(tokens)

    together = asked(slice(None), slice(None), None)
    for row in range(2):
        for head in range(3):
            first = 40 - int(held[row, head])
            alone = asked(slice(row, row + 1), slice(head, head + 1), first)[0, 0]
            order = together[row, head, first:].argsort(stable=True)
            assert torch.equal(order, alone.argsort(stable=True))


def test_dims_that_do_not_vary() -> None:
    """A dim that is constant in the next partition tells nothing, rather than everything or NaN."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 1, 40, 6, generator=generator)
    states[..., 2] = 1.0
    positions = torch.arange(40).view(1, 1, -1)
    options = {"open_keys": states[:, :, :0], "open_values": states[:, :, :0], "seen": 40}
    tokens = Candidates(positions=positions, keys=states, values=states, **options)
    scores = LagKV(sinks=0, lag_size=LAG, cross_scoring=True).scores(tokens)
    assert not scores.isnan().any()
    assert scores[0, 0, :LAG].min() > 0 and scores[0, 0, :LAG].sum() == pytest.approx(1)


@pytest.mark.parametrize("wrong", [{"sinks": -1}, {"lag_size": 1}, {"lag_size": 2.0}])
def test_refused(wrong) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is .* whole number"):
        LagKV(**wrong)
