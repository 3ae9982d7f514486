"""The `fuyou` command: one small function a command, and one place where errors become a paragraph and a status."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from fuyou.core.errors import FuyouError

_INTERRUPTED = 130  # typer makes this status of Ctrl-C by itself, or an Abort in older versions

app = typer.Typer(
    help="Fine-tune models whose training state does not fit in memory.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fuyou {version('fuyou')}")
        raise typer.Exit()


@app.callback()
def fuyou(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune models whose training state does not fit in memory."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A flat YAML file of keys and values.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="key=value", help="Override a key of the file; repeatable.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Fine-tune as CONFIG.yaml says; the model, metrics and memory report are in its `output` folder."""
    from fuyou.train.config import read_config

    settings = read_config(config, set_ or ())
    from fuyou.train.job import run_job  # only now: a configuration that is refused need not wait for torch

    run_job(settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 2: a bad argument, configuration or input; 1: any other failure; 130: interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(args=given, prog_name="fuyou", standalone_mode=False)
        return _interrupted() if status == _INTERRUPTED else status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if "--debug" in given:
            traceback.print_exc()
        if isinstance(error, typer.Abort):
            return _interrupted()
        if hasattr(error, "format_message"):  # the command line itself, refused by typer's parser
            return _fail(f"{error.format_message()} Try `fuyou --help`.", 2)
        if isinstance(error, FuyouError):
            return _fail(str(error), error.exit_status)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _interrupted() -> int:
    return _fail("interrupted: the run was closed, and nothing was exported.", _INTERRUPTED)


def _fail(message: str, status: int) -> int:
    print(f"fuyou: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
