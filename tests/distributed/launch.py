"""Starts the ranks of a launch, and gathers what they return."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

WORKER = Path(__file__).with_name("worker.py")
# Seconds that a collective waits for other ranks, that a rank waits for others at the end of a job,
# and after which ranks that have returned nothing are ended.
WAIT, MEET, IDLE = 15, 20, 60
# Launches until all jobs have run, if some fail.
MOST_LAUNCHES = 4
LAST_LINES = 25


class Ended(NamedTuple):
    """How a rank has ended: its exit code, and the last lines that it wrote to stderr."""

    code: int
    last_lines: str


def environment(**more: str) -> dict[str, str]:
    """The environment of a rank, which imports what this process can import."""
    paths = os.pathsep.join(path for path in sys.path if path)
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **quiet, "PYTHONPATH": paths, **more}


def launch(jobs: Sequence[Any], ranks: int, folder: Path) -> dict[Any, list[dict[str, Any]]]:
    """Run `jobs` under torchrun; return, by job, a dict of each rank: its `result` or `error`.

    A job that fails ends the launch: the jobs after it get another one.
    """
    found: dict[Any, list[dict[str, Any]]] = {}
    left = list(jobs)
    for number in range(MOST_LAUNCHES):
        home = folder / f"launch-{number}"
        home.mkdir(parents=True)
        (home / "jobs.json").write_text(json.dumps(left))
        ended = _torchrun(ranks, home)
        returned = [_returned(home / f"rank-{rank}.jsonl") for rank in range(ranks)]
        for job in left:
            if any(job in one for one in returned):
                found[job] = [one.get(job) or _missing(ended) for one in returned]
        left = [job for job in left if job not in found]
        if not left:
            return found
        if not any(map(len, returned)):
            break
    return found | {job: [_missing(ended)] * ranks for job in left}


def _missing(ended: Ended) -> dict[str, Any]:
    return {"error": f"returned nothing; the launch ended with {ended.code}:\n{ended.last_lines}"}


def _returned(file: Path) -> dict[Any, dict[str, Any]]:
    lines = file.read_text().splitlines() if file.exists() else []
    outcomes = [json.loads(line) for line in lines]
    return {tuple(outcome.pop("job")): outcome for outcome in outcomes}


def _torchrun(ranks: int, home: Path) -> Ended:
    """Start the worker on `ranks` ranks and wait; end them if nothing comes for `IDLE` seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(WORKER), str(home)]
    with (home / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command, env=environment(), stdout=stderr, stderr=stderr, start_new_session=True
        )
        heard, size = time.monotonic(), 0
        while process.poll() is None and time.monotonic() - heard < IDLE:
            time.sleep(0.1)
            now = sum(file.stat().st_size for file in home.glob("rank-*.jsonl"))
            if now > size:
                heard, size = time.monotonic(), now
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Ended(process.wait(), _last_lines((home / "stderr").read_text()))


def run_ranks(script: Path, ranks: int, *arguments: str, seconds: float = IDLE) -> list[Ended]:
    """Run a Python `script` on ranks that nothing ends when another one fails.

    Each finds `RANK`, `WORLD_SIZE` and the address to meet at in its environment. A rank that runs
    for longer than `seconds` is killed: its code is -9.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    end, ended = time.monotonic() + seconds, []
    for process in processes:
        try:
            _, text = process.communicate(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            _, text = process.communicate()
        ended.append(Ended(process.returncode, _last_lines(text)))
    return ended


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LAST_LINES:])
