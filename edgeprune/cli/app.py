"""The command line: parse, call one function, print. Exit codes: 0 budget met, 2 bad input, 3 out of
reach, 4 engine or device failed, 130 interrupted, 1 a bug."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeprune import __version__
from edgeprune.cli import compare, fit, generate, inspect
from edgeprune.errors import EdgepruneError

INTERRUPTED = 130

app = typer.Typer(
    name="edgeprune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fit a decoder-only transformer into a device's memory and latency budget.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"edgeprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Write details to standard error.")] = False,
    log_file: Annotated[Path | None, typer.Option(help="Write a detailed log there.")] = None,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    from edgeprune.log import set_up

    set_up(verbose, log_file)


for command in (
    fit.fit,
    fit.frontier,
    inspect.devices,
    inspect.plan,
    inspect.doctor,
    fit.measure,
    generate.run,
    compare.compare,
    inspect.report,
):
    app.command()(command)


def main() -> None:
    """Runs the command line: every error of ours is one message with a remedy, and its own exit code."""
    try:
        code = app(standalone_mode=False)
    except EdgepruneError as error:
        typer.echo(f"error: {error.message}\n{error.remedy}", err=True)
        logging.getLogger("edgeprune").debug("traceback", exc_info=True)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        # The parser's own errors: typer brings click along under changing names.
        if not hasattr(error, "show"):
            raise
        error.show()
        code = error.exit_code
    if code == INTERRUPTED:  # the parser may have turned it into an exit code already
        typer.echo("interrupted: fit and frontier go on with --resume", err=True)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
