"""The ``subspec`` command: the commands together, and users' errors as one line and an exit status.

Status 0 is success, 1 a check that failed, 2 an error the user can mend, 130 an interruption.  Nothing here
or in the command modules imports torch before a command runs, so ``subspec --help`` is quick.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from subspec.cli import bench, chat, demo, doctor, generate, prepare, verify
from subspec.errors import SubspecError


class _Group(TyperGroup):
    """The group of commands, with the exit statuses of this module's docstring."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; a bug's exception passes through and keeps its traceback."""
        try:
            return super().invoke(ctx)
        except SubspecError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader has gone; without this the interpreter complains once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None


app = typer.Typer(
    name="subspec",
    cls=_Group,
    help="Run a language model that does not fit in memory: exact, streamed, and several times faster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("prepare")(prepare.prepare)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"subspec {version('subspec')}")
        raise typer.Exit()


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the entry point of the ``subspec`` script."""
    app()
