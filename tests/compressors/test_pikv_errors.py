"""`pikv` predicts the errors of pages: as one token after the other, in float64."""

from dataclasses import dataclass

import pytest
import torch
from random_pages import SEEDS, random_pages
from tolerances import FIRST_ORDER, FLOAT64
from torch import Tensor

from pikv_hf.compressors import Identity, Int2, Int4
from pikv_hf.compressors.observed_attention import output_errors


@dataclass(frozen=True)
class Nudged(Identity):
    """Adds a little, always the same, to keys and values."""

    by: float = 0.0

    def decode(self, fields):
        generator = torch.Generator().manual_seed(9)
        noise = [torch.randn(t.shape[-2:], generator=generator) for t in super().decode(fields)]
        return tuple(t + self.by * n for t, n in zip(super().decode(fields), noise, strict=True))


def attention(keys: Tensor, values: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and output over the tokens of pages [S, 4, D], of which the last is none."""
    tokens, values = (t.flatten(0, 1)[:-1] for t in (keys, values if values.shape[-1] else keys))
    weights = (tokens @ query).softmax(0)
    return weights, weights @ values


def predicted(original, again, queries: Tensor, shrink: float) -> list[float]:
    """`output_errors` of one row and head, token after token: [S].

    What all pages together do to outputs, shared out by what is predicted of each token.
    """
    parts, whole = [0.0] * original[0].shape[0], 0.0
    for query in queries[1:]:
        weights, output = attention(*original, query)
        whole += (attention(*again, query)[1] - output).square().sum().item()
        squares = (1 - shrink) * weights**2 + shrink * (weights**2).mean()
        for number, square in enumerate(squares):
            place = number // 4, number % 4
            key, key_again = original[0][place], again[0][place]
            is_latent = original[1].shape[-1] == 0
            value, value_again = (t[0 if is_latent else 1][place] for t in (original, again))
            logit = query @ (key_again - key)
            change = value_again - value + logit * (value - output)
            parts[place[0]] += (square * change.square().sum()).item()
    return [part * whole / sum(parts) for part in parts]


@SEEDS
@pytest.mark.parametrize("shrink", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("is_latent", [False, True], ids=["values", "latent"])
def test_errors_of_pages(seed, shrink, is_latent) -> None:
    keys, values, queries = random_pages(seed, is_latent)
    methods = Int4(), Nudged(by=0.1), Identity()
    errors = output_errors(methods, keys, values, queries, shrink)
    assert errors.shape == (3, 2, 2, 5) and (errors[2] == 0).all()
    for number, method in enumerate(methods[:2]):
        again = method.decode(method.encode(keys, values))
        for row in range(2):
            for head in range(2):
                pages = [(k[row, head], v[row, head]) for k, v in ((keys, values), again)]
                expected = predicted(*pages, queries[row, head], shrink)
                actual = errors[number, row, head].tolist()
                assert actual == pytest.approx(expected, rel=FLOAT64)


@SEEDS
@pytest.mark.parametrize("is_latent", [False, True], ids=["values", "latent"])
def test_small_changes_of_single_tokens_have_the_predicted_effects(seed, is_latent) -> None:
    """Shared out as the true changes of attention outputs, to first order, if nothing is shrunk."""
    keys, values, queries = random_pages(seed, is_latent)
    generator = torch.Generator()

    class OneToken(Identity):
        def decode(self, fields):
            noise = torch.randn(2, 8, generator=generator.manual_seed(seed)).double() * 1e-5
            for states, change in zip((pair := super().decode(fields)), noise, strict=True):
                if states.shape[-1]:
                    states[:, :, :, 2] += change
            return pair

        def encode(self, keys, values):
            return super().encode(keys.clone(), values.clone())

    errors = output_errors((OneToken(),), keys, values, queries, 0.0)[0]
    again = OneToken().decode(OneToken().encode(keys, values))

    def moved(row: int, head: int, pages: list[int]) -> float:
        """By the changes in `pages` alone."""
        mixed = [t[row, head].clone() for t in (keys, values)]
        for mine, changed in zip(mixed, again, strict=True):
            mine[pages] = changed[row, head, pages]
        before, after = (
            torch.stack([attention(*states, query)[1] for query in queries[row, head, 1:]])
            for states in ((keys[row, head], values[row, head]), mixed)
        )
        return (after - before).square().sum().item()

    for row in range(2):
        for head in range(2):
            whole, each = moved(row, head, [*range(5)]), [moved(row, head, [p]) for p in range(5)]
            assert errors[row, head].sum().item() == pytest.approx(whole, rel=FLOAT64)
            expected = [whole * part / sum(each) for part in each]
            assert errors[row, head].tolist() == pytest.approx(expected, rel=FIRST_ORDER)


def test_errors_of_many_pages_are_those_of_a_few_at_a_time() -> None:
    keys, values, queries = random_pages(0, pages=70)
    errors = output_errors((Int2(),), keys, values, queries, 0.5)[0, 1, 1]
    again = Int2().decode(Int2().encode(keys, values))
    pages = [(k[1, 1], v[1, 1]) for k, v in ((keys, values), again)]
    assert errors.tolist() == pytest.approx(predicted(*pages, queries[1, 1], 0.5), rel=FLOAT64)
