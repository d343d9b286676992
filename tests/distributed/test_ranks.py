"""Every rank of a launch gives what the whole model gives alone."""

import functools

import pytest
import spread_cases  # noqa: F401  registers its cases
import torch
from cases import CASES, JOBS, Job, Result, Side
from helpers import assert_close
from loadings import whole

whole_model = functools.cache(whole)


@functools.cache
def alone(name: str, family: str, rank: int) -> Result:
    """What the whole model gives in this process."""
    return CASES[name].run(Side(whole_model(family), rank))


@pytest.mark.parametrize("job", [job for job in JOBS if CASES[job.case].compare], ids=str)
def test_a_rank_gives_what_one_process_gives(job: Job, returned):
    for rank, found in enumerate(returned(job)):
        if "refused" in found:
            continue  # test_division.py says which are
        expected = alone(job.case, job.family, rank if CASES[job.case].by_rank else 0)
        assert found["tokens"] == expected["tokens"], f"rank {rank}"
        assert_close(torch.tensor(found["logits"]), torch.tensor(expected["logits"]))
