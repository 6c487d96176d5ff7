"""The command line: parse, call one function, print. Exit codes: 0 budget met, 2 bad input, 3 out of
reach, 4 engine or device failed, 130 interrupted, 141 nobody reads its output, 1 a bug, or a check of
doctor that failed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from edgeprune import __version__
from edgeprune.cli import compare, diff, draft, drift, evaluate, fit, fleet, generate, inspect, push, samples, serve
from edgeprune.cli.ending import ending, interrupted_by_signals
from edgeprune.cli.options import PATH
from edgeprune.cli.slips import meant
from edgeprune.cli.streams import guarded_streams, note, show
from edgeprune.errors import EdgepruneError, EngineError
from edgeprune.files import writing
from edgeprune.log import log_event

app = typer.Typer(
    name="edgeprune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fit a language model or an image generator into a device's memory and latency budget.",
    epilog="Begin with:  edgeprune fit demo --device jetson-orin\n\nAll options of a command:  edgeprune fit --help",
)


def _version(value: bool) -> None:
    if value:
        show(f"edgeprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Write details to standard error; stands before the command.")
    ] = False,
    log_file: Annotated[
        Path | None, typer.Option(help="Write a log there, in lines of JSON; stands before the command.", **PATH)
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from edgeprune.log import set_up

    set_up(verbose, log_file)


MAKE, USE, LEARN, METHODS = "Make and measure", "Use a bundle", "Before you begin", "Compare methods"
# The commands by panel, each with examples for the end of its help.
COMMANDS: tuple[tuple[str, Callable[..., None], tuple[str, ...]], ...] = (
    (
        MAKE,
        fit.fit,
        (
            "edgeprune fit demo --device jetson-orin",
            "edgeprune fit ./my-model --device jetson-orin --memory 6GiB",
            "edgeprune fit ./my-model --device cpu --decode 70% --calibration ./texts",
        ),
    ),
    (
        MAKE,
        fit.frontier,
        (
            "edgeprune frontier ./my-model --device jetson-orin --rungs 6",
            "edgeprune fit --from my-model-jetson-orin-frontier --pick 2",
        ),
    ),
    (
        MAKE,
        fleet.fleet,
        ("edgeprune fleet FLEET.toml --dry-run", "edgeprune fleet FLEET.toml", "edgeprune fleet FLEET.toml --resume"),
    ),
    (
        MAKE,
        samples.samples,
        (
            "edgeprune samples ./logs --model ./my-model --output samples.jsonl",
            "edgeprune samples a.csv --column answer --mask none --output b.jsonl",
        ),
    ),
    (LEARN, inspect.devices, ("edgeprune devices", "edgeprune devices jetson-orin")),
    (
        LEARN,
        inspect.plan,
        ("edgeprune plan ./my-model/config.json", "edgeprune plan ./my-model --device jetson-orin --weights int4"),
    ),
    (LEARN, inspect.doctor, ("edgeprune doctor", "edgeprune doctor --target ssh://me@orin", "edgeprune doctor --deep")),
    (
        MAKE,
        fit.measure,
        ("edgeprune measure my-model-cpu", "edgeprune measure my-model-jetson-orin --target ssh://me@orin"),
    ),
    (
        USE,
        generate.run,
        (
            "edgeprune run my-model-cpu --prompt 'What is edge computing?'",
            "edgeprune run c2i_B_384-cpu --class 207 --count 16 --output grid.png",
        ),
    ),
    (
        USE,
        serve.serve,
        (
            "edgeprune serve my-model-cpu",
            "edgeprune serve my-model-cpu --slots 4 --port 8080 --api-key-file key.txt",
            "edgeprune serve my-model-cpu --target ssh://me@orin",
        ),
    ),
    (
        MAKE,
        draft.draft,
        ("edgeprune draft my-model-cpu", "edgeprune run my-model-cpu --draft my-model-cpu-draft --prompt 'Hello'"),
    ),
    (
        USE,
        push.push,
        ("edgeprune push my-model-cpu me/my-model-small --dry-run", "edgeprune push my-model-cpu me/my-model-small"),
    ),
    (
        METHODS,
        compare.compare,
        (
            "edgeprune compare demo --ratios 20,30 --methods default,wanda",
            "edgeprune compare ./my-model --calibration ./texts --html methods.html",
            "edgeprune compare --list-methods",
        ),
    ),
    (
        MAKE,
        evaluate.evaluate,
        (
            "edgeprune evaluate my-model-cpu --tasks arc_easy,hellaswag --questions 500",
            "edgeprune evaluate ./pruned --dense ./my-model --tasks questions.jsonl",
        ),
    ),
    (
        USE,
        drift.drift,
        (
            "edgeprune drift my-model-cpu --texts ./texts-of-june",
            "edgeprune drift my-model-cpu --texts new.jsonl --since ./texts",
        ),
    ),
    (
        USE,
        diff.diff,
        ("edgeprune diff old-bundle new-bundle", "edgeprune diff old new --fail-on quality=2 --fail-on latency=5"),
    ),
    (USE, inspect.report, ("edgeprune report my-model-cpu",)),
)
for panel, command, examples in COMMANDS:
    app.command(
        rich_help_panel=panel,
        epilog="\n\n".join(("For example:", *examples)),
        context_settings={"allow_extra_args": command is generate.run},  # it names the option that they miss
    )(command)


def main() -> None:
    """Runs the command line: every error of ours is one message with a remedy, and its own exit code."""
    with guarded_streams(), interrupted_by_signals():
        try:
            with writing(Path()):
                code = app(standalone_mode=False, prog_name="edgeprune")
                sys.stdout.flush()
        except BaseException as error:
            code = _code_of(error)
        if ending.signal is not None:  # whatever a library made of it
            note(ending.message)
            code = ending.exit_code
    log_event("end", "the command ended", exit_code=code if isinstance(code, int) else 0, arguments=sys.argv[1:])
    sys.exit(code if isinstance(code, int) else 0)


def _code_of(error: BaseException) -> int:
    """Prints the message of an error and returns its exit code. Raises what is a bug."""
    if ending.signal is not None:
        return ending.exit_code
    if _is_out_of_memory(error):
        error = EngineError(
            "the memory of this machine does not suffice",
            "End other programs, or give fewer --samples, a shorter --length or a smaller --batch.",
        )
    # The parser's own errors: typer brings click along under changing names.
    if hasattr(error, "show") and (answer := meant(error, sys.argv[1:])) is not None:
        error = answer
    if isinstance(error, EdgepruneError):
        note(f"error: {error.message}\n{error.remedy}")
        logging.getLogger("edgeprune").debug("traceback", exc_info=True)
        return error.exit_code
    if isinstance(error, typer.Exit):  # of standard output
        return error.exit_code
    if hasattr(error, "show"):
        error.show(file=sys.stderr)
        return error.exit_code
    # The parser takes the end of any file for that of the keyboard.
    raise error.__cause__ if isinstance(error, typer.Abort) and error.__cause__ else error


def _is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation failed; PyTorch has no type of its own for it."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


if __name__ == "__main__":
    main()
