"""`pikv demo` compares caches, `pikv generate` answers on one's own text."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..cache.from_text import DYNAMIC, LOSSLESS, METHODS, CacheOption, parse_cache
from ..cache.pikv_cache import PiKVCache
from ..layer.loss_guard import LossWarning
from ..model.versions import cache_in, with_cache
from ..needles import trials as demo
from ..needles.haystack import Haystack
from ..needles.plot import accuracy_against_memory
from .terminal import (
    DeviceMap,
    Dtype,
    DtypeOption,
    Model,
    distinct,
    err,
    fail,
    load,
    make_folder,
    one_sentence,
    out,
    parse_caches,
)

EPILOG = (
    f"A cache is '{DYNAMIC}' (transformers' own), '{LOSSLESS}' (PiKVCache as it is), or arguments of "
    "PiKVCache, such as 'compressor=int8,scheduler=streaming_llm(sinks=8),budget=25%', where the name "
    "of a method alone stands for it: 'keydiff,budget=25%'.  \n"
    + "  \n".join(f"{name}: {', '.join(registry)}." for name, (registry, _) in METHODS.items())
)
HEADINGS = (
    "exact\nanswers",
    "KV held\nMiB",
    "bytes/\ntoken",
    "bf16/\nheld",
    "decode\ntok/s",
    "first\nms",
)
Probe = Annotated[
    bool,
    typer.Option("--probe", help="Measure the error of attention over compressed pages, too."),
]
KEYDIFF = "scheduler=keydiff,budget=0.25"
DEFAULTS = [
    LOSSLESS,
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
            help="A cache to compare with DynamicCache; repeatable. "
            "Default: lossless, int8, int4, streaming_llm and keydiff at 25 %, and keydiff with int4."
        ),
    ] = None,
    compressor: Annotated[
        list[str] | None, typer.Option(help="As --cache compressor=...; repeatable.")
    ] = None,
    probe: Probe = False,
    dtype: DtypeOption = Dtype.auto,
    device_map: DeviceMap = None,
    output: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path(
        "pikv_demo"
    ),
) -> None:
    """Hide needles in a haystack and find them with several caches: accuracy, memory, speed."""
    named = parse_caches(cache or (DEFAULTS if not compressor else ()), compressor or ())
    caches = distinct([parse_cache(DYNAMIC), *named], probe)
    make_folder(output)
    loaded, tokenizer = load(model, dtype, device_map)
    _check_length(loaded, length)
    with one_sentence():
        stacks = demo.haystacks(
            tokenizer, length=length, needles=needles, questions=questions, seed=seed
        )
        for option in caches:  # refuse what does not suit this model before the long work
            option.make(loaded)
    trials, interrupted = _collect(loaded, tokenizer, caches, stacks)
    rows = demo.summarize(trials, caches)
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
    results = demo.to_dict(loaded, job, rows, trials)
    _write(output, results, rows, labels, title)
    raise typer.Exit(130 if interrupted else 0)


def generate_command(
    prompt_file: Annotated[
        typer.FileText, typer.Option(encoding="utf-8", help="The prompt; - for standard input.")
    ],
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    cache: Annotated[
        str | None, typer.Option(help=f"The cache to use. Default: {LOSSLESS}.")
    ] = None,
    compressor: Annotated[str | None, typer.Option(help="As --cache compressor=...")] = None,
    probe: Probe = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a chat message of the user.")
    ] = False,
    dtype: DtypeOption = Dtype.auto,
    device_map: DeviceMap = None,
) -> None:
    """Answer on one's own text, greedily, and say what the cache holds afterwards."""
    if cache is not None and compressor is not None:
        fail("--cache and --compressor: only one of them can be given.")
    named = parse_caches([cache] if cache else [], [compressor] if compressor else [])
    option = distinct(named or [parse_cache(LOSSLESS)], probe)[0]
    text = _read(prompt_file)
    loaded, tokenizer = load(model, dtype, device_map)
    text = _as_chat(tokenizer, text) if chat else text
    with one_sentence():
        made = option.make(loaded)
    inputs = demo.encode(loaded, tokenizer, text, special_tokens=not chat)
    if not inputs["input_ids"].numel():
        fail("the prompt has no tokens.")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with one_sentence():
            result = loaded.generate(
                **inputs,
                **with_cache(made),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                return_dict_in_generate=True,
            )
    except KeyboardInterrupt:
        err.print("\nInterrupted.")
        _report(made)
        raise typer.Exit(130) from None
    _report(cache_in(result) if made is None else made)


def _check_length(model: PreTrainedModel, length: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        fail(f"--length is {length}, but the model reads at most {most} tokens.")


def _collect(
    model: "demo.GenerativeModel",
    tokenizer: PreTrainedTokenizerBase,
    caches: Sequence[CacheOption],
    stacks: Sequence[Haystack],
) -> tuple[list[demo.Trial], bool]:
    """All trials, and whether Ctrl-C cut them short."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    trials: list[demo.Trial] = []
    with (
        Progress(TextColumn("answering"), *columns, console=err) as progress,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", LossWarning)  # the table says what the loss costs
        task = progress.add_task("", total=len(caches) * len(stacks))
        try:
            with one_sentence():
                for trial in demo.run(model, tokenizer, caches, stacks):
                    trials.append(trial)
                    progress.advance(task)
                    if not err.is_terminal and len(trials) % len(caches) == 0:
                        _tell(len(trials) // len(caches), len(stacks))
        except KeyboardInterrupt:
            return trials, True
    return trials, False


def _tell(done: int, questions: int) -> None:
    """A line where no progress bar is shown: in a file, or a pipe."""
    err.print(f"answered {done} of {questions} questions with every cache")


def _table(rows: Sequence[demo.Row], labels: Sequence[str], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("cache", overflow="fold")
    has_error = any(row.error is not None for row in rows)
    for heading in (*HEADINGS, "error") if has_error else HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
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
        table.add_row(*cells)
    return table


def _speed_note(model: PreTrainedModel, bundled: bool) -> str:
    note = (
        "exact: answers right to the word. KV held: after the answer; bytes/token: of one held; "
        "bf16/held: times that a full cache in bfloat16 is larger; error: of attention over sealed "
        "tokens; times: medians, those of --probe included."
    )
    if bundled:
        note += (
            f" The bundled model has {model.num_parameters() / 1e6:.1f} million parameters: its "
            "times show the overhead of each cache, not the speed of a real model (--model)."
        )
    return note


def _write(
    folder: Path, results: dict[str, Any], rows: Sequence[demo.Row], labels: list[str], title: str
) -> None:
    data, picture = folder / "results.json", folder / "accuracy_vs_memory.png"
    data.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    accuracy = [100 * row.exact / row.questions for row in rows]
    accuracy_against_memory(labels, [r.nbytes / 2**20 for r in rows], accuracy, title, picture)
    out.print(f"Results: {data}\nPicture: {picture}", soft_wrap=True)


def _read(file: Any) -> str:
    try:
        text = file.read()
    except UnicodeDecodeError:
        fail("--prompt-file is not UTF-8 text.")
    if not text.strip():
        fail("--prompt-file is empty.")
    return text


def _as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    if tokenizer.chat_template is None:
        fail("--chat: the tokenizer of this model has no chat template.")
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)  # one conversation, not tokenized
    return prompt


def _report(cache: Cache | None) -> None:
    if isinstance(cache, PiKVCache):
        out.print(cache.report())
    elif cache is not None:
        held = f"{demo.held_bytes(cache) / 2**20:.2f} MiB"
        out.print(f"{type(cache).__name__}: {cache.get_seq_length()} tokens seen, {held}")
