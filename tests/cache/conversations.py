"""What the tests of `generate` share: families, rows with padding, and a next turn."""

import pytest
import torch
from helpers import FAMILIES, ONE_ROW, PADDED, tiny
from zoo import prompt

STATELESS = [name for name in FAMILIES if name != "qwen3_next"]  # those that may draft
padding = pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
families = pytest.mark.parametrize("name", FAMILIES)


def continued(inputs, tokens, turn):
    said = prompt(tiny("mixtral"), (5,) * len(tokens), seed=turn + 10)["input_ids"]
    ids = torch.cat([tokens, said], dim=1)
    new = torch.ones(len(ids), ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1)}
