"""Every rank of a launch gives what the whole model gives alone."""

import functools

import pytest
import torch
from cases import CASES, JOBS, Job, Side
from helpers import assert_close
from loadings import whole

whole_model = functools.cache(whole)


@pytest.mark.parametrize("job", [job for job in JOBS if CASES[job.case].compare], ids=str)
def test_a_rank_gives_what_one_process_gives(job: Job, returned):
    for rank, found in enumerate(returned(job)):
        expected = CASES[job.case].run(Side(whole_model(job.family), rank))
        assert found["tokens"] == expected["tokens"], f"rank {rank}"
        assert_close(torch.tensor(found["logits"]), torch.tensor(expected["logits"]))
