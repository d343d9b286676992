"""What the tests of commands share."""

from typer.testing import CliRunner, Result

from pikv_hf.commands.app import app

# A demo that answers in a moment.
SMALL = ("--length", "384", "--needles", "2", "--questions", "2")


def pikv(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
