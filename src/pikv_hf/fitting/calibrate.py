"""Make a calibration file from a model and texts: capture what attention reads, fit, write.

An interrupted run leaves its state in a file beside the result. Repeating the call resumes it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attach.binding import LOCK, binding_of
from ..model.loading import check_length
from ..model.rotary import Rotary
from ..model.wrappers import unwrap
from .calibration_job import METHODS, PIKV_QUEST, Job
from .calibration_state import Progress
from .capture import Observer
from .progress_bar import bar
from .projections import Fit, fit
from .utility_networks import fit_utility

BLOCK = 2**16  # characters of a text that are read and tokenized at a time


def calibrate(
    model: PreTrainedModel,
    pieces: Iterable[Tensor],
    out: Path,
    job: Job,
    source: str = "",
) -> dict[str, dict[int, Fit]]:
    """Fit the methods of `job` to the attention of `model` in `pieces`, and write them to `out`.

    Three of four pieces are for training, the fourth judges the result. An interrupted call
    (an exception, Ctrl-C) writes its state to `out` + ".partial". Calling again with equal
    arguments resumes it and leads to the file that an uninterrupted call writes.

    Args:
        pieces: token ids [1, job.piece_tokens], at least two pieces; equal in repeated calls.
        source: identifies the texts, so that a call with other texts is not resumed.

    Returns:
        The fits by method and layer. `model` is left as it was.

    Raises:
        ValueError: too little text; a model whose attention cannot be captured; or the partial
            file was written by a call with other arguments.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"`model` is {type(model).__name__}: encoder-decoders are not calibrated.")
    more = f"and {job.piece_tokens - job.length} more tokens for queries are added"
    check_length(model, job.piece_tokens, f"`length` is {job.length}, {more}")
    rotaries: dict[int, Rotary] = {}
    if PIKV_QUEST in job.methods:
        with LOCK:
            rotaries = binding_of(unwrap(model)).rotaries
    progress = Progress(model, out, job, source)
    with progress.saved_if_interrupted():
        _capture(model, pieces, job, progress)
        _fit(model, job, progress, rotaries)
    progress.finish(progress.factors(), progress.errors())
    return progress.fits


def text_pieces(
    tokenizer: PreTrainedTokenizerBase, paths: Sequence[Path], tokens: int
) -> Iterator[Tensor]:
    """Yield the texts, one after the other, as pieces [1, tokens] of token ids.

    Each piece begins with the tokenizer's BOS token, if it has one. A last piece that is shorter
    is dropped. A progress bar shows how many bytes were read.
    """
    first = tokenizer("").input_ids[:1]
    start = first if first == [tokenizer.bos_token_id] else []
    ids: list[int] = []
    total = sum(path.stat().st_size for path in paths)
    with bar(total=total, unit="B", unit_scale=True, desc="reading") as shown:
        for path in paths:
            for block in _blocks(path):
                ids += tokenizer(block, add_special_tokens=False, verbose=False).input_ids
                shown.update(len(block.encode()))
                while len(start) + len(ids) >= tokens:
                    taken = tokens - len(start)
                    yield torch.tensor([start + ids[:taken]])
                    ids = ids[taken:]


def _blocks(path: Path) -> Iterator[str]:
    """Yield the text of a file in blocks that end before white space, if a block has any."""
    rest = ""
    try:
        with path.open(encoding="utf-8") as file:
            while new := file.read(BLOCK):
                text = rest + new
                cut = max(text.rfind(" "), text.rfind("\n"))
                cut = cut if cut > 0 else len(text)
                yield text[:cut]
                rest = text[cut:]
    except UnicodeDecodeError:
        raise ValueError(f"`text` {str(path)!r} is not UTF-8 text.") from None
    yield rest


def _capture(
    model: PreTrainedModel, pieces: Iterable[Tensor], job: Job, progress: Progress
) -> None:
    if progress.has_read_all:
        return
    with contextlib.closing(Observer(model, job.length, job.windows)) as observer:
        observer.captured = progress.captured
        for piece in islice(pieces, observer.captured.pieces, None):
            observer.read(piece)
            progress.captured = observer.captured
            progress.save_sometimes()
    if progress.captured.pieces < 2:
        raise ValueError(
            f"the texts have fewer than {2 * job.piece_tokens} tokens, two pieces of "
            f"{job.piece_tokens}: give more text, or a smaller `length`."
        )
    if not progress.captured.layers:
        raise ValueError(f"`model` is {type(model).__name__}, of which no layer can be paged.")
    progress.has_read_all = True


def _fit(model: PreTrainedModel, job: Job, progress: Progress, rotaries: dict[int, Rotary]) -> None:
    layers = progress.captured.layers
    todo = [(method, idx) for method in job.methods for idx in layers]
    for method, idx in bar(todo, desc="fitting"):
        fits = progress.fits[method]
        if idx not in fits:
            if not layers[idx].is_finite:
                raise ValueError(
                    f"layer {idx}: the model made keys or values that are NaN or infinite."
                )
            last = job.steps, idx, model.device
            if method == PIKV_QUEST:
                fits[idx] = fit_utility(layers[idx], rotaries[idx], *last)
            else:
                fits[idx] = fit(METHODS[method], layers[idx], job.rank, *last)
            progress.save_sometimes()
