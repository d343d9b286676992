"""Low-rank compressors on the bundled model: attention output and answers, by rank and training."""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from common import Result, start
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pikv_hf.compressors import Compressor, Int2, Int4, Svd
from pikv_hf.fitting.calibrate import calibrate, text_pieces
from pikv_hf.fitting.calibration_job import METHODS, Job
from pikv_hf.fitting.capture import Capture, Observer
from pikv_hf.model import loading
from pikv_hf.needles.haystack import NEEDLE_MODEL, make_haystack

CONTEXT, PAGE, NEWEST = 895, 64, 127  # tokens, of which the newest stay as they are
TRAIN, TEST = range(1000, 1080), range(900_000, 900_020)  # seeds of haystacks


def text(seeds: Iterable[int], path: Path) -> Path:
    stacks = (make_haystack(length=1024, needles=8, seed=seed) for seed in seeds)
    lines = (f"{stack.prompt()} {stack.answers[0]} ." for stack in stacks)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def captured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path
) -> dict[int, Capture]:
    """Every window of the text, by layer."""
    observer = Observer(model, CONTEXT, windows=10**6)
    for piece in text_pieces(tokenizer, [path], Job(length=CONTEXT).piece_tokens):
        observer.read(piece)
    observer.close()
    return observer.captured.layers


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return (query @ keys.mT * scale).softmax(-1) @ values


def output_error(capture: Capture, compressor: Compressor) -> float:
    """Squared change of the attention output over its squared norm, in float64."""
    change = size = 0.0
    for window in (*capture.fitted, *capture.held_out):
        query, *states = (t.double()[None] for t in window)
        sealed = states[0].shape[2] - NEWEST
        pages = [t[:, :, :sealed].unflatten(2, (-1, PAGE)) for t in states]
        near = [
            torch.cat([page.flatten(2, 3), exact[:, :, sealed:]], dim=2)
            for page, exact in zip(
                compressor.decode(compressor.encode(*pages)), states, strict=True
            )
        ]
        exact, changed = (attention(query, *kv, capture.scale) for kv in (states, near))
        change += (changed - exact).square().sum().item()
        size += exact.square().sum().item()
    return change / size


def main() -> None:
    quick = start(__doc__ or "")
    result = Result(
        name="lowrank_cpu",
        claim="Low rank: error of the attention output on text that was not calibrated with",
        setting=f"bundled model, contexts of {CONTEXT} tokens, the newest {NEWEST} as they are, pages "
        f"of {PAGE}; calibrated on {len(TRAIN)} haystacks, measured on {len(TEST)} others; relative "
        "error, root mean square of both layers; bytes of bfloat16",
        columns=["compressor", "rank", "bytes / element", "untrained", "trained"],
    )
    model, tokenizer = loading.load(str(NEEDLE_MODEL))
    folder = Path(tempfile.mkdtemp())
    train = text(TRAIN[:16] if quick else TRAIN, folder / "train.txt")
    layers = captured(model, tokenizer, text(TEST, folder / "test.txt"))

    def measured(compressor: Compressor) -> tuple[float, float]:
        bound = {idx: compressor.bind(model.config, idx) for idx in layers}
        squares = [output_error(capture, bound[idx]) for idx, capture in layers.items()]
        dim = model.config.head_dim
        return bound[0].bytes_per_token(dim, dim, 2, 64) / (2 * dim), math.sqrt(
            sum(squares) / len(squares)
        )

    for rank in (4, 8, 16):
        result.add("svd", rank, *measured(Svd(rank=rank)), "-")
        files = []
        for steps in (0, 50 if quick else 500):
            job = Job(rank=rank, length=CONTEXT, steps=steps)
            files.append(folder / f"{rank}_{steps}.safetensors")
            with torch.enable_grad():
                calibrate(model, text_pieces(tokenizer, [train], job.piece_tokens), files[-1], job)
        for name, kind in METHODS.items():
            (size, before), (_, after) = (measured(kind(calibration=file)) for file in files)
            result.add(name, rank, size, before, after)
            result.goal(
                f"{name}, rank {rank}: trained error over untrained < 1",
                after / before,
                after < before,
            )
    for compressor in (Int4(), Int2()):
        result.add(compressor.title, "-", *measured(compressor), "-")
    result.publish(quick)


if __name__ == "__main__":
    main()
