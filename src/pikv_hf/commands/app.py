"""The command `pikv`, which imports a subcommand only when it is called."""

import importlib
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from ..requirements import VERSION

# The help of each subcommand NAME, which is the function `NAME_command` of the module `NAME`.
COMMANDS = {
    "calibrate": "Fit compressors, or pikv_quest, to a model; the same command resumes an "
    "interrupted run.",
    "profile": "Find KV heads that need all tokens, for duo; the same command resumes an "
    "interrupted run.",
    "demo": "Hide needles in a haystack and find them with several caches: accuracy, memory, "
    "speed.",
    "generate": "Continue the text of a file greedily, and report what the cache holds afterwards.",
    "plan": "Spread the weights of a model and its KV cache over GPUs; no weights are loaded.",
    "methods": "List compressors, schedulers, routers and placements, with a sentence on each.",
}


class Commands(TyperGroup):
    """Lists commands without importing them, which would take seconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands.update({name: TyperCommand(name, help=COMMANDS[name]) for name in COMMANDS})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, command(str(name)), rest


def command(name: str) -> Any:
    """Import the command `name` and return it, ready to run."""
    module = importlib.import_module(f".{name}", __package__)
    alone = typer.Typer(add_completion=False)
    function = getattr(module, f"{name}_command")
    alone.command(name, epilog=getattr(module, "EPILOG", None))(function)
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
