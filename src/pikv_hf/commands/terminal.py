"""Shared parts of the commands: consoles, options for a model, and errors."""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # `--help` must not load torch and transformers, which takes seconds
    from transformers import PreTrainedTokenizerBase

    from ..cache.from_text import CacheOption
    from ..model.loading import GenerativeModel

#: Help text on the values of `--cache`.
CACHES = (
    "A cache is 'dynamic' (transformers' own), 'lossless' (PiKVCache without options), or "
    "arguments of PiKVCache, such as 'compressor=int8,scheduler=streaming_llm(sinks=8),"
    "budget=25%'. A method may be given by its name alone: 'keydiff,budget=25%'. `pikv methods` "
    "lists the names."
)

out = Console()
err = Console(stderr=True)


DTYPES = ("auto", "float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _dtype(text: str) -> str:
    """Return the dtype that `text` names: `bf16` and `torch.bfloat16` are bfloat16, too."""
    name = text.lower().removeprefix("torch.")
    name = {**SHORT, "half": "float16"}.get(name, name)
    if name not in DTYPES:
        names = ", ".join([*DTYPES, *SHORT])
        raise typer.BadParameter(f"{text!r} is no dtype of weights; it must be one of {names}.")
    return name


Model = Annotated[
    str | None,
    typer.Option(help="A folder, or a name on the Hugging Face Hub. Default: the bundled model."),
]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights.", metavar="DTYPE", parser=_dtype)]
DeviceMap = Annotated[
    str | None, typer.Option(help="As in from_pretrained. Default: 'auto' on a GPU, else the CPU.")
]
Probe = Annotated[
    bool,
    typer.Option("--probe", help="Also measure the error of attention over compressed pages."),
]
Output = Annotated[Path, typer.Option("--out", help="The file to write.")]


def text_files(default: str = "") -> Any:
    """Return the option of files with text; `default` ends its help."""
    text = f"A UTF-8 file with text like that of your use; repeatable.{default}"
    return typer.Option(help=text, exists=True, dir_okay=False, readable=True)


def identity(texts: Sequence[Path]) -> str:
    """Return names and sizes of files, to tell whether a command is given the same ones again."""
    return json.dumps([[path.name, path.stat().st_size] for path in texts])


def table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return a table without rows, with columns for words and, after them, for numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in words:
        made.add_column(heading, overflow="fold")
    for heading in numbers:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def fail(message: str, code: int = 2) -> NoReturn:
    err.print(f"[red]Error:[/red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def one_sentence() -> Generator[None]:
    """End the command with the message of a ValueError, without its traceback."""
    try:
        yield
    except ValueError as error:
        fail(str(error))


@contextmanager
def resumable(output: Path) -> Generator[None]:
    """Guard work that writes `output` at its end; on Ctrl-C say how to resume it."""
    try:
        with one_sentence():
            yield
    except KeyboardInterrupt:
        err.print(f"\nInterrupted: the same command goes on from {output}.partial.")
        raise typer.Exit(130) from None
    except OSError as error:
        fail(f"--out: {output} cannot be written: {error.strerror}.")


def load(
    name: str | None, dtype: str, device_map: str | None
) -> tuple["GenerativeModel", "PreTrainedTokenizerBase"]:
    """Load the model and tokenizer `name`, or the bundled ones; a failure ends the command."""
    from ..model import loading
    from ..model.versions import logging
    from ..needles.haystack import NEEDLE_MODEL

    if name is None:
        logging.disable_progress_bar()
    else:
        err.print(f"Loading {escape(name)} ...")
    try:
        return loading.load(name or str(NEEDLE_MODEL), dtype, device_map)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        fail(f"--model: {name or NEEDLE_MODEL} could not be loaded: {reason}")
    except (AssertionError, RuntimeError) as error:  # the device does not exist
        if device_map is None:
            raise
        reason = str(error).strip().splitlines()[0]
        fail(
            f"--device-map: {device_map!r} cannot be used here: {reason}; "
            "leave it out, or give 'cpu'."
        )


def parse_caches(caches: Sequence[str], compressors: Sequence[str] = ()) -> list["CacheOption"]:
    """Parse the values of --cache, then the values of --compressor."""
    from ..cache.from_text import parse_cache

    texts = [("--cache", text) for text in caches]
    texts += [("--compressor", f"compressor={text}") for text in compressors]
    options = []
    for flag, text in texts:
        try:
            options.append(parse_cache(text))
        except ValueError as error:
            fail(f"{flag}: {error}")
    return options


def distinct(options: Sequence["CacheOption"], probe: bool) -> list["CacheOption"]:
    """Return `options` without repetitions; with `probe`, each measures its error."""
    once: dict[str, CacheOption] = {}
    for option in options:
        once.setdefault(option.name, option.probed() if probe else option)
    return list(once.values())


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out: {path} cannot be made: {error.strerror}.")
