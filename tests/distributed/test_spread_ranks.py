"""What ranks that share a cache hold and send; tokens and logits are compared in test_ranks.py."""

import pytest
from cases import JOBS
from spread_cases import balance_by_experts, other_arguments, other_tokens, spread_refused, traffic


def jobs(run):
    return pytest.mark.parametrize("job", [j for j in JOBS if j.case == run.__name__], ids=str)


@jobs(traffic)
def test_a_step_sends_one_message_a_layer_whatever_the_length(job, returned):
    for rank, found in enumerate(returned(job)):
        short, long = found["256"], found["2048"]
        check = 4 * (job.ranks - 1)  # the sum of the newest keys, once a step
        for one in (short, long):
            assert one["messages"] == one["layers"] > 0
            assert one["sent"] == one["layers"] * found["formula"] + check
            assert one["sent"] <= 1.01 * one["layers"] * found["formula"]
            assert one["reported"] >= one["sent"]
            assert one["own"] == one["held"][rank], "a rank holds what it reports"
            assert one["held"][rank] <= 1.1 / job.ranks * sum(one["held"])
        assert max(long["pages"]) * job.ranks <= 1.01 * sum(long["pages"]), "over 100 pages a rank"
        assert short["sent"] == long["sent"]


@jobs(balance_by_experts)
def test_no_rank_holds_more_than_its_capacity(job, returned):
    for found in returned(job):
        assert 1 <= found["imbalance"] <= 1.10
        assert found["experts"] == found["pages"]


REFUSALS = {
    "tp": "the attention heads of the model are divided over 2 ranks",
    "pp": "each of 2 ranks runs other layers",
    "dp_ep": "2 ranks read different batches",
    "ddp": "2 ranks read different batches",
}


@jobs(spread_refused)
def test_ranks_that_cannot_share_a_cache_are_refused(job, returned):
    for found in returned(job):
        assert REFUSALS[job.loading] in found["refusal"]


@jobs(other_arguments)
def test_ranks_agree_on_their_arguments(job, returned):
    for rank, found in enumerate(returned(job)):
        assert "the ranks of this PiKVCache differ: rank 1 has" in found["differ"]
        assert "page_size=5" in found["differ"]
        assert "page_size=4" in found["differ"]
        wrong = (
            "`window` is 0" if rank else "rank 1 cannot make its part of this PiKVCache: `window`"
        )
        assert found["wrong"].startswith(wrong)
        assert found["strange"].startswith("`process_group` is given, but `placement` is Local()")
        assert found["made"] == "2"


@jobs(other_tokens)
def test_ranks_that_read_other_texts_raise_in_one_step(job, returned):
    for found in returned(job):
        assert "have drifted apart: ranks [0, 1] see different tokens" in found["error"]
