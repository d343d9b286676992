"""`pikv calibrate`: fit calibrated methods to a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..fitting.defaults import CALIBRATION_LENGTH, STEPS, WINDOWS
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
    from ..fitting.projections import Fit


def calibrate_command(
    text: Annotated[list[Path], text_files()],
    model: Model = None,
    output: Output = Path("cal.safetensors"),
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="lowrank, lowrank_affine, distill or pikv_quest; repeatable. Default: the first 3."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Numbers stored per key or value. Default: dim / 4.")
    ] = None,
    length: Annotated[int, typer.Option(help="Context tokens per piece.")] = CALIBRATION_LENGTH,
    windows: Annotated[int, typer.Option(help="Pieces kept for training.")] = WINDOWS,
    steps: Annotated[int, typer.Option(help="Training steps; 0 = principal axes.")] = STEPS,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Fit compressors, or pikv_quest, to a model; the same command resumes an interrupted run."""
    from ..fitting.calibrate import calibrate, text_pieces
    from ..fitting.calibration_job import METHODS, PIKV_QUEST, Job

    methods = tuple(dict.fromkeys(method)) if method else tuple(METHODS)
    with one_sentence():
        job = Job(methods, rank, length, windows, steps)
    make_folder(output.parent)
    loaded, tokenizer = load(model, dtype, device_map)
    pieces = text_pieces(tokenizer, text, job.piece_tokens)
    with resumable(output):
        fits = calibrate(loaded, pieces, output, job, identity(text))
    scored = {name: fits.pop(name) for name in [*fits] if name == PIKV_QUEST}
    if fits:
        title = "error of the attention output on held-out text"
        out.print(_table(title, "compressor", "principal axes", fits))
    if scored:
        title = "divergence from later queries' attention on held-out text, in nats"
        out.print(_table(title, "scheduler", "equal shares", scored))
    out.print(f"Written: {output}", soft_wrap=True)


def _table(title: str, kind: str, before: str, fits: dict[str, dict[int, "Fit"]]) -> Table:
    from ..fitting.projections import mean_errors

    made = table(title, [kind], ("layers", before, "trained"))
    for name, layers in fits.items():
        errors = (f"{error:.3f}" for error in mean_errors([*layers.values()]))
        made.add_row(name, str(len(layers)), *errors)
    return made
