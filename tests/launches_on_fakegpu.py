"""Run by test_launches.py in a process of its own: the counter of benchmarks/launches."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "launches"))

import census  # first: before any model is built
import torch
import torch.nn.functional as F
from decoding import Decoding, layer_kernels, new_cache, tiny_model

HERE = census.DEVICE


def counts(run) -> tuple[int, int, int]:
    """Kernels, synchronizations and uploads of `run`."""
    with census.Census() as counted:
        run()
    return counted.count("kernel"), counted.count("sync"), counted.count("upload")


def check_operators() -> None:
    x, y = (census.on_device(torch.rand(2, 3, 8, 8)) for _ in range(2))
    host, row, index = torch.ones(8), x[0, 0, 0], torch.tensor([0, 2])
    expected = {
        "one kernel": (lambda: x.softmax(-1), (1, 0, 0)),
        "composed of others": (lambda: x.isfinite(), (4, 0, 0)),
        "many in one operator": (lambda: x.logsumexp(-1), (9, 0, 0)),
        "in place": (lambda: x.copy_(y), (1, 0, 0)),
        "fused attention": (lambda: F.scaled_dot_product_attention(x, x, x), (1, 0, 0)),
        "a factory": (lambda: torch.zeros(3, device=HERE), (1, 0, 0)),
        "views": (lambda: x.view(6, 8, 8).transpose(1, 2)[:, None].expand(-1, 4, 8, 8), (0, 0, 0)),
        "no copy": (lambda: x.contiguous().to(HERE), (0, 0, 0)),
        "uninitialized": (lambda: x.new_empty(3), (0, 0, 0)),
        "the CPU alone": (lambda: host.softmax(-1).tolist(), (0, 0, 0)),
        "item": (lambda: row.sum().item(), (1, 1, 0)),
        "a condition": (lambda: bool((row > 2).any()), (2, 1, 0)),
        "tolist": (lambda: row.tolist(), (0, 1, 0)),
        "cpu": (lambda: row.cpu(), (0, 1, 0)),
        "copied behind": (lambda: row.to("cpu", non_blocking=True), (0, 0, 0)),
        "nonzero": (lambda: row.nonzero(), (1, 1, 0)),
        "index by bool": (lambda: row[row > 2], (2, 1, 0)),
        "upload": (lambda: host.to(HERE), (0, 0, 1)),
        "upload in place": (lambda: row.copy_(host), (0, 0, 1)),
        "upload of a list": (lambda: torch.tensor([1.0, 2.0], device=HERE), (0, 0, 1)),
        "index of the CPU": (lambda: row[index], (1, 0, 1)),
        "number of the CPU": (lambda: row + torch.tensor(1.0), (1, 0, 0)),
    }
    for name, (run, wanted) in expected.items():
        assert counts(run) == wanted, f"{name}: {counts(run)}"


def check_bytes() -> None:
    x = census.on_device(torch.rand(4, 8))
    with census.Census() as counted:
        x + x[:1].expand(4, 8)
    assert counted.nbytes == 4 * (32 + 8 + 32), "an expanded tensor is read once"


def check_steps() -> None:
    """Steps are told apart, and equal conversations have equal counts."""
    found: dict[str | None, list] = {}
    expected = {None: {"plain"}, "int8": {"plain", "seal"}, "keydiff": {"plain", "evict"}}
    for method in (None, "int8", "keydiff", "keydiff"):
        model = tiny_model(2)
        decoding = Decoding(model, new_cache(model, method))
        decoding.read((torch.arange(1084) >= torch.tensor([[0], [5]])).long())
        counted = [
            (kind, layer_kernels(step, 2), step.count("kernel"), step.count("sync"))
            for kind, step in (decoding.step() for _ in range(66))
        ]
        assert found.setdefault(method, counted) == counted
        assert {kind for kind, *_ in counted} == expected[method]
    plain = {step[1:] for step in found[None]}
    assert len(plain) == 1, "steps of DynamicCache are alike"
    assert found[None][0][1] < found["int8"][0][1]


torch.set_num_threads(1)
torch.set_grad_enabled(False)
check_operators()
check_bytes()
check_steps()
