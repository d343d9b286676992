"""`pikv methods`: the names that `--cache` and `PiKVCache` take."""

import re

from rich import box
from rich.table import Table

from .terminal import out


def methods_command() -> None:
    """List compressors, schedulers, routers and placements, with a sentence on each."""
    from ..cache.from_text import METHODS

    for kind, (registry, _) in METHODS.items():
        table = Table(title=kind, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for name, method in registry.items():
            table.add_row(name, _first_sentence(method))
        out.print(table)


def _first_sentence(method: type) -> str:
    text = " ".join((method.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<!sec)\. ", text)[0].rstrip(".") + "."
