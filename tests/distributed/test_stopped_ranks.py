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
model = build("mixtral", num_hidden_layers=2)
dist.init_process_group("gloo", timeout=timedelta(seconds=8))
cache = PiKVCache(model, placement="spread", **SMALL)
ids = prompt(model, (30,))["input_ids"]
forward(model, ids, torch.ones_like(ids), cache)
for step in range(12):
    if step == 5 and dist.get_rank() == victim:
        if how == "stops":
            os.kill(os.getpid(), signal.SIGKILL)
        model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        forward(model, ids[:, :1], torch.ones(1, ids.shape[1] + step + 1), cache)
    except ZeroDivisionError:
        time.sleep(20)  # the process goes on, as in a notebook
        raise
"""


@pytest.mark.parametrize(
    ("how", "victim", "said"), [("stops", 0, "stopped"), ("fails", 1, "failed")]
)
def test_others_name_the_rank(how, victim, said, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    other = run_ranks(script, 2, how, str(victim), seconds=150)[1 - victim]
    assert other.code == 1
    assert f"because rank {victim} has {said}" in other.last_lines
