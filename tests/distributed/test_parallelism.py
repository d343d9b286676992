"""What `parallelism` reads from models as transformers and torch really divide them."""

from typing import Any

import pytest
from cases import Job

from pikv_hf.model.parallel import Parallelism

ALONE = {"tp": 1, "ep": 1, "pp": 1, "dp": 1, "shards_heads": False, "shares_batch": True}
NOTHING = {**ALONE, "group": None, "experts": None, "layers": None}


def told(returned: Any, family: str, loading: str, ranks: int = 2) -> list[dict[str, Any]]:
    return returned(Job("cases", "told", family, loading, ranks))


def assert_told(found: dict[str, Any], refused: str, **expected: Any) -> None:
    assert refused in found.pop("refused") if refused else found.pop("refused") == ""
    assert found == {**NOTHING, **expected}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_expert_parallelism(family: str, returned):
    for rank, found in enumerate(told(returned, family, "ep")):
        own = [4 * rank + n for n in range(4)]
        assert_told(found, "", tp=2, ep=2, group=[0, 1], experts=own)


def test_tensor_parallelism(returned):
    for found in told(returned, "qwen3_moe", "tp"):
        assert_told(found, "divided over 2 ranks", tp=2, shards_heads=True)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_plans_that_leave_attention_whole(family: str, returned):
    for found in told(returned, family, "tp"):
        assert_told(found, "", tp=2, group=[0, 1])


def test_heads_that_share_latents(returned):
    for found in told(returned, "deepseek_v3", "tp_of_latents"):
        assert_told(found, "divided over 2 ranks", tp=2, shards_heads=True)


def test_tensor_and_expert_parallelism(returned):
    for rank, found in enumerate(told(returned, "qwen3_moe", "tp_ep")):
        own = [4 * rank + n for n in range(4)]
        assert_told(found, "divided over 2 ranks", tp=2, ep=2, shards_heads=True, experts=own)


def test_pipeline_parallelism(returned):
    for rank, found in enumerate(told(returned, "qwen3_moe", "pp")):
        assert_told(found, "runs other layers", pp=2, layers=[rank])


def test_data_parallel_attention_with_divided_experts(returned):
    for rank, found in enumerate(told(returned, "qwen3_moe", "dp_ep")):
        own = [4 * rank + n for n in range(4)]
        assert_told(found, "different batches", ep=2, dp=2, shares_batch=False, experts=own)


def test_ddp(returned):
    for found in told(returned, "qwen3_moe", "ddp"):
        assert_told(found, "different batches", dp=2, shares_batch=False)


def test_models_that_are_not_divided(returned):
    for found in told(returned, "qwen3_moe", "plain"):
        assert_told(found, "", group=[0, 1])


def test_data_and_tensor_parallelism(returned):
    for found in told(returned, "qwen3_moe", "dp_tp", ranks=4):
        assert_told(found, "divided over 2 ranks", tp=2, dp=2, shards_heads=True)


def test_one_process():
    assert Parallelism().group is None
    with pytest.raises(ValueError, match="`placement` is Spread.*the only rank: start several"):
        Parallelism().sharing_group("Spread()")


def test_a_stage_reports_layers_of_other_ranks(returned):
    sliding, other = "a sliding window, which is bounded already", "a layer of another rank"
    first, second = returned(Job("cases", "stage", "gpt_oss", "pp", 2))
    assert first["why"] == [sliding, None, other, other]
    assert second["why"] == [other, other, sliding, None]
    assert first["tokens_held"] == second["tokens_held"][2:] + second["tokens_held"][:2]
    assert first["tokens_held"][2:] == [0, 0]
