"""The command `pikv`: what it lists; a command is imported when it is called."""

import importlib
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from ..requirements import VERSION


class Listed(NamedTuple):
    """A command as `pikv --help` lists it, and where it is: `function` of `module`."""

    module: str
    function: str
    help: str


COMMANDS = {
    "calibrate": Listed(
        ".calibrate",
        "calibrate_command",
        "Fit compressors, or pikv_quest, to a model and texts; interrupted, the same command goes on.",
    ),
    "profile": Listed(
        ".profile",
        "profile_command",
        "Find the KV heads that must read everything, for duo; interrupted, the same command goes on.",
    ),
    "demo": Listed(
        ".demo",
        "demo_command",
        "Hide needles in a haystack and find them with several caches: accuracy, memory, speed.",
    ),
    "generate": Listed(
        ".generate",
        "generate_command",
        "Answer on one's own text, greedily, and say what the cache holds afterwards.",
    ),
    "methods": Listed(
        ".methods",
        "methods_command",
        "List compressors, schedulers, routers and placements, with a sentence on each.",
    ),
}


class Commands(TyperGroup):
    """Lists commands without importing them: that takes seconds."""

    def __init__(self, **options: Any) -> None:
        listed = {name: TyperCommand(name, help=found.help) for name, found in COMMANDS.items()}
        super().__init__(**options)
        self.commands.update(listed)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, command(str(name)), rest


def command(name: str) -> Any:
    """The command `name`, ready to run."""
    listed = COMMANDS[name]
    module = importlib.import_module(listed.module, __package__)
    alone = typer.Typer(add_completion=False)
    alone.command(name, epilog=getattr(module, "EPILOG", None))(getattr(module, listed.function))
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=Commands,
    help="PiKVCache: a paged KV cache for Mixture-of-Experts models in transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    if version:
        Console().print(f"pikv_hf {VERSION}")
        raise typer.Exit()
