"""The command `pikv`, which imports a subcommand only when it is called."""

import importlib
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from ..requirements import VERSION


class Listed(NamedTuple):
    """A subcommand: `function` of `module`, and the `help` that `pikv --help` shows."""

    module: str
    function: str
    help: str


COMMANDS = {
    "calibrate": Listed(
        ".calibrate",
        "calibrate_command",
        "Fit compressors, or pikv_quest, to a model; the same command resumes an interrupted run.",
    ),
    "profile": Listed(
        ".profile",
        "profile_command",
        "Find KV heads that need all tokens, for duo; the same command resumes an interrupted run.",
    ),
    "demo": Listed(
        ".demo",
        "demo_command",
        "Hide needles in a haystack and find them with several caches: accuracy, memory, speed.",
    ),
    "generate": Listed(
        ".generate",
        "generate_command",
        "Continue the text of a file greedily, and report what the cache holds afterwards.",
    ),
    "methods": Listed(
        ".methods",
        "methods_command",
        "List compressors, schedulers, routers and placements, with a sentence on each.",
    ),
}


class Commands(TyperGroup):
    """Lists commands without importing them, which would take seconds."""

    def __init__(self, **options: Any) -> None:
        listed = {name: TyperCommand(name, help=found.help) for name, found in COMMANDS.items()}
        super().__init__(**options)
        self.commands.update(listed)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, command(str(name)), rest


def command(name: str) -> Any:
    """Import the command `name` and return it, ready to run."""
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
