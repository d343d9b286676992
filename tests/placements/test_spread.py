"""Pages dealt to devices of one process give what one device gives."""

import pytest
from test_placement import run_on_fakegpu

CASES = {
    "spread": "lossless int8 h2o adakv_int4 hash quest",
    "experts": "lossless adakv_int4",
    "pikv_xor": "lossless",
    "offload": "int8",
    "layers": "lossless h2o",
    "map": "adakv_int4",
    "model": "quest",
}


@pytest.mark.parametrize("placement", CASES)
def test_the_tokens_of_one_device(placement):
    methods = CASES[placement].split()
    run_on_fakegpu("spread_on_fakegpu.py", *(f"mixtral:{m}:{placement}" for m in methods))


def test_latents_and_sinks():
    run_on_fakegpu(
        "spread_on_fakegpu.py",
        "deepseek_v3:h2o:spread",
        "gpt_oss:int8:spread",
        "gpt_oss:quest:layers",
    )


def test_only_queries_and_results_travel():
    run_on_fakegpu("spread_on_fakegpu.py", "traffic")
