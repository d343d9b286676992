"""What the ranks returned: one launch for each model family and number of ranks."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from cases import JOBS, Job
from filelock import FileLock
from launch import launch
from loadings import save

from pikv_hf.requirements import minor

Outcomes = dict[Job, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def returned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], list[dict[str, Any]]]:
    """What a job returned on each rank, a dict each; a failure on a rank fails the test.

    The jobs are those of all case modules that the collected tests import. Processes of
    pytest-xdist share the launches.
    """
    if minor(transformers.__version__) < (5, 23):
        pytest.skip("before transformers 5.23 plans have other names")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    outcomes = functools.cache(functools.partial(_outcomes, shared / "launches"))

    def of(job: Job) -> list[dict[str, Any]]:
        found = outcomes(job.family, job.ranks)[job]
        failed = {rank: one["error"] for rank, one in enumerate(found) if "error" in one}
        assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
        return [one["result"] for one in found]

    return of


def _outcomes(shared: Path, family: str, ranks: int) -> Outcomes:
    folder = shared / f"{family}-{ranks}"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "outcomes.json"
    with FileLock(folder / "lock"):
        if not done.exists():
            save(family, folder / family)
            jobs = sorted(job for job in JOBS if (job.family, job.ranks) == (family, ranks))
            jobs.sort(key=lambda job: job.loading)
            done.write_text(json.dumps(list(launch(jobs, ranks, folder).items())))
    return {Job(*job): outcomes for job, outcomes in json.loads(done.read_text())}
