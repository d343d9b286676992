"""What attention returns has the layout of transformers' own functions: models reshape it in place."""

import pytest
import torch
from helpers import FAMILIES, PADDED, SMALL, assert_close, chunks, dynamic, forward, padded_prompt
from zoo import build

import pikv_hf.attention.function
from pikv_hf import PiKVCache


@pytest.mark.parametrize(
    ("name", "attn"),
    [*((name, "eager") for name in FAMILIES), ("afmoe", "eager"), ("afmoe", "sdpa")],
)
def test_several_tokens_over_a_filled_cache(name, attn, monkeypatch) -> None:
    model = build(name, attn)
    ids, mask = padded_prompt(model, PADDED)
    outputs = []

    def attend(*args):
        outputs.append(attention(*args))
        return outputs[-1]

    attention = pikv_hf.attention.function.attend
    monkeypatch.setattr(pikv_hf.attention.function, "attend", attend)
    cache, reference = PiKVCache(model, **SMALL), dynamic(model)
    for start, end in [*chunks(28, 12, 4), (28, 29), (29, 30)]:
        ours, theirs = (
            forward(model, ids[:, start:end], mask[:, :end], c) for c in (cache, reference)
        )
        visible = mask[:, start:end].bool()
        assert_close(ours[visible], theirs[visible])
    assert outputs and all(out.is_contiguous() for out in outputs)
    assert {out.dtype for out in outputs} == {torch.float32}
    assert {out.shape[1] for out in outputs} == {1, 4}
