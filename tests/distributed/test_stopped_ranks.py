"""A rank that fails or stops lets all others raise an error that names it."""

from pathlib import Path

import pytest
from launch import run_ranks

SCRIPT = """
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from helpers import SMALL, forward
from zoo import build, prompt

from pikv_hf import PiKVCache

how, victim = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=4))
model = build("mixtral", num_hidden_layers=2)
torch.manual_seed(dist.get_rank())
cache = PiKVCache(model, placement="spread", **SMALL)
ids = prompt(model, (30,))["input_ids"]
forward(model, ids, torch.ones_like(ids), cache)
for step in range(12):
    if step == 5 and dist.get_rank() == victim:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stops":
            raise KeyError("an error of the user")
        if how == "fails":
            model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        token = torch.randint(5, 50, (1, 1)) if how == "drifts" else ids[:, :1]
        forward(model, token, torch.ones(1, ids.shape[1] + step + 1), cache)
    except ZeroDivisionError:
        time.sleep(15)  # the process goes on, as in a notebook
        raise
"""
WORDS = {"killed": "has stopped", "stops": "has stopped", "fails": "has failed"}


@pytest.mark.parametrize(("how", "victim"), [("killed", 0), ("stops", 2), ("fails", 1)])
def test_others_name_the_rank(how, victim, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = run_ranks(script, 3, how, str(victim))
    for rank, one in enumerate(ended):
        if rank != victim:
            assert one.code == 1
            assert f"because rank {victim} {WORDS[how]}" in one.last_lines


def test_different_seeds_raise_on_all_ranks(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for one in run_ranks(script, 3, "drifts", "-1"):
        assert one.code == 1
        assert "ranks [0, 1, 2] see different tokens" in one.last_lines
