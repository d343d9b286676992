"""Which ids a cache knows: all of them, or, where tokens are dropped, the newest in bounded memory."""

import pytest
import torch
from helpers import tiny

from pikv_hf import PiKVCache
from pikv_hf.cache.token_log import MAX_IDS, TokenLog


@pytest.mark.parametrize("most", [None, 50])
@pytest.mark.parametrize("pieces", [[1] * 400, [30, 1, 1, 200, 49, 50, 51, 1, 1, 70]])
def test_starts(most, pieces) -> None:
    """A continuation is known as one; a change among the newest `most` ids is noticed, always."""
    text, log = torch.randint(0, 1000, (3, sum(pieces) + 5)), TokenLog(most)
    end = 0
    for piece in pieces:
        log.append(text[:, end : end + piece])
        end += piece
        assert log.length == end
        assert log.starts(text[:, : end + 5]) and log.starts(text[:, :end])
        assert not log.starts(text[:, : end - 1])
        for back in (1, 7, 49):
            if back <= end:
                other = text.clone()
                other[1, end - back] += 1
                assert not log.starts(other)
    other = text.clone()
    other[0, 0] += 1
    assert log.starts(other) == (most is not None)
    log.crop(end - 5)
    assert log.length == end - 5 and log.starts(text[:, : end - 5])
    log.append(text[:, end - 5 : end])
    log.map_rows(torch.tensor([2, 2, 0]))
    assert log.starts(text[[2, 2, 0]]) and not log.starts(text)


def test_memory_is_bounded() -> None:
    log = TokenLog(100)
    for piece in (5000, *[1] * 2000, 300, *[7] * 300):
        log.append(torch.ones(2, piece, dtype=torch.int64))
        assert log.ids.shape[1] <= 100 + max(300, 1) + (100 + 300) // 8 + 64
    assert log.length == 9400


def test_only_caches_that_drop_tokens_forget() -> None:
    model = tiny("mixtral")
    assert PiKVCache(model).log.max_ids is None
    cache = PiKVCache(model, scheduler="streaming_llm")
    assert cache.log.max_ids == MAX_IDS
    cache.reset()
    assert cache.log.max_ids == MAX_IDS
