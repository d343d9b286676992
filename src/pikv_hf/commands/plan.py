"""`pikv plan`: spread a model and its KV cache over devices."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .terminal import CACHES, Dtype, Model, fail, one_sentence, out, parse_caches, table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..cache.device_plan import DevicePlan

EPILOG = CACHES
HEADINGS = ("layers", "weights\nGiB", "KV\nGiB", "sum\nGiB", "of limit\nGiB")


def plan_command(
    gpus: Annotated[
        str, typer.Option(help="Their memory: 4x80GiB, or 2x80GiB,40GiB if they differ.")
    ],
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of each row that the cache will hold.")
    ],
    model: Model = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the cache.")] = 1,
    cache: Annotated[str | None, typer.Option(help="The cache to use. Default: lossless.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Short for --cache scheduler=...")] = None,
    budget: Annotated[str | None, typer.Option(help="Short for --cache budget=...")] = None,
    compressor: Annotated[str | None, typer.Option(help="Short for --cache compressor=...")] = None,
    dtype: Dtype = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Also write a file.")] = None,
) -> None:
    """Spread the weights of a model and its KV cache over GPUs; no weights are loaded."""
    from ..cache.device_plan import plan_devices

    limits = _limits(gpus)
    short = {"scheduler": scheduler, "budget": budget, "compressor": compressor}
    parts = [f"{name}={value}" for name, value in short.items() if value is not None]
    parts = [*([] if cache is None else [cache]), *parts]
    (option,) = parse_caches([",".join(parts) or "lossless"])
    if option.arguments is None:
        fail("--cache: 'dynamic' is not planned; give a PiKVCache, such as 'lossless'.")
    empty = _from_config(model, dtype)
    with one_sentence():
        plan = plan_devices(
            empty, limits, max_cache_len=length, batch_size=batch, **option.arguments
        )
    rows = f"{batch} row{'s' if batch > 1 else ''} of {length} tokens"
    out.print(_table(plan, f"{model or 'bundled model'}: {rows}, {option.label}"))
    quantization = getattr(empty.config, "quantization_config", None)
    if quantization is not None:
        known = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = known.get("quant_method", "a method of its own")
        out.print(
            f"The config says that weights are quantized ({method}); here they are counted in "
            f"{str(empty.dtype).removeprefix('torch.')}.",
            style="dim",
        )
    out.print(f"device_map = {_python(plan.device_map)}", soft_wrap=True, markup=False)
    out.print(f"kv_device_map = {_python(plan.kv_device_map)}", soft_wrap=True, markup=False)
    if output is not None:
        job = {"model": model or "bundled", "length": length, "batch": batch, "cache": option.name}
        _write(output, job, plan)


def _limits(gpus: str) -> dict[int | str, int | str]:
    """Return the bytes of each GPU that a text such as "2x80GiB,40GiB" names."""
    from ..validation import parse_bytes

    limits: list[int] = []
    for part in gpus.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(.+)", part, re.IGNORECASE)
        nbytes = None if match is None else parse_bytes(match[2])
        count = 0 if match is None else int(match[1] or 1)
        if nbytes is None or not count:
            fail(f"--gpus: {gpus!r} is not understood; give 4x80GiB, or 2x80GiB,40GiB.")
        limits += [nbytes] * count
    return {number: nbytes for number, nbytes in enumerate(limits)}


def _from_config(name: str | None, dtype: str) -> "PreTrainedModel":
    from ..model.without_weights import from_config
    from ..needles.haystack import NEEDLE_MODEL

    try:
        return from_config(name or str(NEEDLE_MODEL), dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        fail(f"--model: {name or NEEDLE_MODEL} could not be loaded: {reason}")


def _table(plan: "DevicePlan", title: str) -> Table:
    from ..cache.device_plan import GIB
    from ..placements.kv_device_map import runs

    made = table(title, ["device"], HEADINGS)
    for load in plan.loads:
        layers = (f"{a}-{b}" if a < b else str(a) for a, b in runs(load.layers))
        sizes = (load.weight_bytes, load.kv_bytes, load.nbytes, load.max_bytes)
        made.add_row(
            str(load.device), ", ".join(layers) or "-", *(f"{size / GIB:.2f}" for size in sizes)
        )
    sums = (sum(getattr(x, n) for x in plan.loads) for n in ("weight_bytes", "kv_bytes", "nbytes"))
    limit = sum(load.max_bytes for load in plan.loads)
    made.add_section()
    made.add_row("all", "", *(f"{size / GIB:.2f}" for size in (*sums, limit)))
    return made


def _python(device_map: Mapping[str, Any]) -> str:
    """Return `device_map` as Python; numbered modules in a row, on one device, are a comprehension."""
    parts: list[str] = []
    run: list[
        tuple[str, int, Any]
    ] = []  # modules "model.layers.3": the name, the number, the device
    for name, device in [*device_map.items(), (None, None)]:
        stem, _, last = (name or "").rpartition(".")
        number = int(last) if last.isdigit() else -1
        if run and (stem, number, device) != (run[-1][0], run[-1][1] + 1, run[-1][2]):
            parts.append(_of_run(run))
            run = []
        if number >= 0:
            run.append((stem, number, device))
        elif name is not None:
            parts.append(f'"{name}": {device!r}')
    return "{" + ", ".join(parts) + "}"


def _of_run(run: list[tuple[str, int, Any]]) -> str:
    stem, first, device = run[0]
    if len(run) == 1:
        return f'"{stem}.{first}": {device!r}'
    return f'**{{f"{stem}.{{i}}": {device!r} for i in range({first}, {run[-1][1] + 1})}}'


def _write(path: Path, job: dict[str, Any], plan: "DevicePlan") -> None:
    from dataclasses import asdict

    maps = {"device_map": plan.device_map, "kv_device_map": plan.kv_device_map}
    results = {**job, **maps, "devices": [asdict(load) for load in plan.loads]}
    try:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        fail(f"--json: {path} cannot be written: {error.strerror}.")
    out.print(f"Written: {path}", soft_wrap=True)
