"""Two launchers, as on two nodes: equal tokens, and messages between nodes by their number alone."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch import environment

SCRIPT = """
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import PADDED, SMALL, forward, generate
from torch.distributed.device_mesh import init_device_mesh
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.placements import ranks

torch.set_num_threads(1)
dist.init_process_group("gloo")
model, per_node = build("mixtral", num_hidden_layers=2), dist.get_world_size() // 2
mesh = init_device_mesh("cpu", (2, per_node), mesh_dim_names=("node", "rank"))
inputs = prompt(model, PADDED)
expected = generate(model, inputs, PiKVCache(model, **SMALL)).tokens
cache = PiKVCache(model, process_group=mesh, **SMALL)
found = {"same": torch.equal(generate(model, inputs, cache).tokens, expected), "between": 0}
gather = ranks._all_gather


def counted(received, message, group):
    gather(received, message, group=group)
    if group is mesh.get_group("node"):
        found["between"] += (received.numel() // message.numel() - 1) * message.nbytes


ranks._all_gather = counted
mask = torch.cat([inputs["attention_mask"], torch.ones(3, 11, dtype=torch.long)], dim=1)
forward(model, inputs["input_ids"][:, :1], mask, cache)
found["pages"] = [place.pages for place in cache.report().places]
Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


def nodes(folder: Path, per_node: int) -> list[dict]:
    """What each rank has found, of two launchers with `per_node` ranks each."""
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", str(per_node), "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(port)]
    launchers = [
        subprocess.Popen(
            [*command, "--node-rank", str(node), str(folder / "script.py"), str(folder)],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    for launcher in launchers:
        _, text = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, text[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2 * per_node)]


@pytest.mark.parametrize("per_node", [1, 2])
def test_two_launchers_give_the_tokens_of_one_process(per_node: int, tmp_path: Path):
    found = nodes(tmp_path / "ranks", per_node)
    assert all(one["same"] for one in found)
    assert all(len(one["pages"]) == 2 * per_node and min(one["pages"]) > 0 for one in found)
    rows, heads, dim, layers = 3, 4, 16, 2
    check = 4  # the sum of the newest keys
    message = layers * rows * heads * (dim + 1) * 4 + check
    assert {one["between"] for one in found} == {message}, "whatever the ranks of a node"
