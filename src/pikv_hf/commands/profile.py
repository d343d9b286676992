"""`pikv profile`: measure the KV heads of a model, for `duo`."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..fitting.defaults import PROFILE_LENGTH, RECENT, SINKS, TEXTS
from .terminal import (
    DeviceMap,
    Dtype,
    Model,
    Output,
    identity,
    load,
    make_folder,
    one_sentence,
    out,
    resumable,
    table,
    text_files,
)

if TYPE_CHECKING:
    from torch import Tensor

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def profile_command(
    text: Annotated[list[Path] | None, text_files(" Default: needles in a haystack.")] = None,
    model: Model = None,
    output: Output = Path("heads.safetensors"),
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = PROFILE_LENGTH,
    texts: Annotated[int, typer.Option(help="Haystacks to make if there is no --text.")] = TEXTS,
    sinks: Annotated[int, typer.Option(help="First tokens a streaming head reads.")] = SINKS,
    recent: Annotated[int, typer.Option(help="Newest tokens a streaming head reads.")] = RECENT,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Find KV heads that need all tokens, for duo; the same command resumes an interrupted run."""
    from ..fitting.calibrate import text_pieces
    from ..fitting.needle_texts import needle_pieces
    from ..fitting.profile import profile
    from ..fitting.profile_job import Job
    from ..fitting.progress_bar import bar

    with one_sentence():
        job = Job(length, texts, sinks, recent)
    make_folder(output.parent)
    loaded, tokenizer = load(model, dtype, device_map)

    def pieces(done: int) -> Iterable["Tensor"]:
        if text:
            return islice(text_pieces(tokenizer, text, length), done, None)
        made = needle_pieces(tokenizer, length, texts, done)
        return bar(made, total=texts, initial=done, desc="reading")

    with resumable(output):
        scores = profile(loaded, pieces, output, job, identity(text or ()))
    out.print(_table(scores))
    out.print(f"Written: {output}", soft_wrap=True)


def _table(scores: dict[int, "Tensor"]) -> Table:
    import torch

    title = "relative change of the output of attention when one KV head streams"
    shares = [f"{share:.0%}" for share in SHARES[1:-1]]
    made = table(title, [], ("layers", "KV heads", "min", *shares, "max"))
    all_scores = torch.cat(list(scores.values())).double()
    found = all_scores.quantile(torch.tensor(SHARES, dtype=torch.float64)).tolist()
    made.add_row(str(len(scores)), str(len(all_scores)), *(f"{value:.3f}" for value in found))
    return made
