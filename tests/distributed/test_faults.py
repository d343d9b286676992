"""Ranks that fail, started without a launcher that would end the others."""

from pathlib import Path

from launch import run_ranks

SCRIPT = """
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=timedelta(seconds=8))
if dist.get_rank() == 1:
    raise RuntimeError("this rank has failed")
if sys.argv[1] == "waits":
    time.sleep(600)
dist.all_reduce(torch.ones(1))
"""


def test_a_rank_outlives_another_and_tells_its_own_error(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    survivor, failed = run_ranks(script, 2, "reduces")
    assert failed.code == 1
    assert failed.last_lines.endswith("RuntimeError: this rank has failed")
    assert survivor.code == 1
    assert "RuntimeError" in survivor.last_lines
    assert "this rank has failed" not in survivor.last_lines


def test_a_rank_that_hangs_is_killed(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    hanging, failed = run_ranks(script, 2, "waits", seconds=12)
    assert (hanging.code, failed.code) == (-9, 1)
