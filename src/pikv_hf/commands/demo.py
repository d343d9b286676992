"""`pikv demo`: needles in a haystack, found with several caches."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .terminal import (
    CACHES,
    DeviceMap,
    Dtype,
    Model,
    Probe,
    distinct,
    err,
    fail,
    load,
    make_folder,
    one_sentence,
    out,
    parse_caches,
    table,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..cache.from_text import CacheOption
    from ..model.loading import GenerativeModel
    from ..needles.haystack import Haystack
    from ..needles.trials import Row, Trial

EPILOG = CACHES
HEADINGS = (
    "exact\nanswers",
    "KV held\nMiB",
    "bytes/\ntoken",
    "bf16/\nheld",
    "decode\ntok/s",
    "first\nms",
)
KEYDIFF = "scheduler=keydiff,budget=0.25"
CACHES_COMPARED = [
    "lossless",
    "compressor=int8",
    "compressor=int4",
    "scheduler=streaming_llm,budget=0.25",
    KEYDIFF,
    f"{KEYDIFF},compressor=int4",
]


def demo_command(
    model: Model = None,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a haystack.")] = 2048,
    needles: Annotated[int, typer.Option(min=1, help="Facts hidden in each haystack.")] = 8,
    questions: Annotated[int, typer.Option(min=1, help="Haystacks, one question each.")] = 20,
    seed: int = 0,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help="A cache to compare with DynamicCache; repeatable. Default: lossless, int8, int4, "
            "streaming_llm and keydiff with a budget of 25 %, and keydiff with int4."
        ),
    ] = None,
    compressor: Annotated[
        list[str] | None, typer.Option(help="Short for --cache compressor=...; repeatable.")
    ] = None,
    probe: Probe = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    output: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path(
        "pikv_demo"
    ),
) -> None:
    """Hide needles in a haystack and find them with several caches: accuracy, memory, speed."""
    from ..model.loading import check_length
    from ..needles import trials

    named = parse_caches(cache or (CACHES_COMPARED if not compressor else ()), compressor or ())
    caches = distinct([*parse_caches(["dynamic"]), *named], probe)
    make_folder(output)
    loaded, tokenizer = load(model, dtype, device_map)
    with one_sentence():
        check_length(loaded, length, f"--length is {length}")
        stacks = trials.haystacks(
            tokenizer, length=length, needles=needles, questions=questions, seed=seed
        )
        for option in caches:  # options that the model refuses fail before the long run
            option.make(loaded)
    answers, interrupted = _collect(loaded, tokenizer, caches, stacks)
    rows = trials.summarize(answers, caches)
    if not rows:
        fail("interrupted before the first question was answered with every cache.", code=130)
    done = (
        f"{rows[0].questions} of {questions} questions" if interrupted else f"{questions} questions"
    )
    title = f"{model or 'bundled model'}: {needles} needles in {length} tokens, {done}"
    labels = [option.label for option in caches]
    out.print(_table(rows, labels, title))
    out.print(_speed_note(loaded, bundled=model is None), style="dim")
    job = {"model": model or "bundled", "length": length, "needles": needles}
    job |= {"questions": questions, "seed": seed, "interrupted": interrupted}
    results = trials.to_dict(loaded, job, rows, answers)
    _write(output, results, rows, labels, title)
    raise typer.Exit(130 if interrupted else 0)


def _collect(
    model: "GenerativeModel",
    tokenizer: "PreTrainedTokenizerBase",
    caches: Sequence["CacheOption"],
    stacks: Sequence["Haystack"],
) -> tuple[list["Trial"], bool]:
    """Run all trials; return the completed ones, and True if Ctrl-C ended the run."""
    from ..layer.loss_guard import LossWarning
    from ..needles.trials import run

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    trials: list[Trial] = []
    with (
        Progress(TextColumn("answering"), *columns, console=err) as progress,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", LossWarning)  # the table shows the loss
        task = progress.add_task("", total=len(caches) * len(stacks))
        try:
            with one_sentence():
                for trial in run(model, tokenizer, caches, stacks):
                    trials.append(trial)
                    progress.advance(task)
                    if not err.is_terminal and len(trials) % len(caches) == 0:
                        done = len(trials) // len(caches)  # no bar is shown in a file or a pipe
                        err.print(f"answered {done} of {len(stacks)} questions with every cache")
        except KeyboardInterrupt:
            return trials, True
    return trials, False


def _table(rows: Sequence["Row"], labels: Sequence[str], title: str) -> Table:
    has_error = any(row.error is not None for row in rows)
    made = table(title, ["cache"], (*HEADINGS, "error") if has_error else HEADINGS)
    for label, row in zip(labels, rows, strict=True):
        speed = row.decode_tokens_per_s
        cells = [
            label,
            f"{row.exact}/{row.questions}",
            f"{row.nbytes / 2**20:.2f}",
            f"{row.bytes_per_token:.0f}",
            f"{row.bf16_ratio:.2f}",
            "-" if speed is None else f"{speed:.1f}",
            f"{1000 * row.first_token_s:.0f}",
        ]
        if has_error:
            cells.append("-" if row.error is None else f"{row.error:.2g}")
        made.add_row(*cells)
    return made


def _speed_note(model: "PreTrainedModel", bundled: bool) -> str:
    note = (
        "exact: answers right to the word; KV held: after the answer; bytes/token: of one held; "
        "bf16/held: a full cache in bfloat16 is this many times larger; error: of attention over "
        "sealed tokens; times: medians, which include the time of --probe."
    )
    if bundled:
        note += (
            f" The bundled model has {model.num_parameters() / 1e6:.1f} million parameters: its "
            "times show the overhead of each cache, not the speed of a real model (--model)."
        )
    return note


def _write(
    folder: Path, results: dict[str, Any], rows: Sequence["Row"], labels: list[str], title: str
) -> None:
    from ..needles.plot import accuracy_against_memory

    data, picture = folder / "results.json", folder / "accuracy_vs_memory.png"
    data.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    accuracy = [100 * row.exact / row.questions for row in rows]
    accuracy_against_memory(labels, [r.nbytes / 2**20 for r in rows], accuracy, title, picture)
    out.print(f"Results: {data}\nPicture: {picture}", soft_wrap=True)
