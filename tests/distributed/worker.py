"""One rank: runs the jobs in a folder and writes what each returned, a line of JSON each.

Started by torchrun (see launch.py): `worker.py FOLDER`.
"""

import importlib
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, Job, Side
from launch import MEET, WAIT
from loadings import load


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=WAIT))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store = dist.FileStore(str(folder / "met"), ranks)
    jobs = [Job(*job) for job in json.loads((folder / "jobs.json").read_text())]
    model, loaded = None, None
    with (folder / f"rank-{rank}.jsonl").open("a") as results:
        for number, job in enumerate(jobs):
            outcome: dict[str, Any] = {"job": job}
            try:
                if loaded != (job.family, job.loading):
                    model = load(job.family, job.loading, folder.parent / job.family)
                    loaded = job.family, job.loading
                importlib.import_module(job.module)
                outcome["result"] = CASES[job.case].run(Side(model, rank, ranks))
            except Exception:  # noqa: BLE001 - any error of a case is told
                outcome["error"] = traceback.format_exc(limit=-4)
            print(json.dumps(outcome), file=results, flush=True)
            meet(store, number, "error" in outcome)


def meet(store: dist.Store, number: int, has_failed: bool) -> None:
    """Wait for the other ranks; if one has failed, end, since collectives may no longer match."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store.set(f"{number}/{rank}", str(has_failed))
    keys = [f"{number}/{other}" for other in range(ranks)]
    try:
        store.wait(keys, timedelta(seconds=MEET))
    except RuntimeError:  # some rank has not come
        os._exit(1)
    if any(store.get(key) == b"True" for key in keys):
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
