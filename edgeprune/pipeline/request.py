"""The request of a user in the words of the command line: the one list of a run's options and their defaults."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.files import at_home, check_text, printable

if TYPE_CHECKING:
    from edgeprune.model.checkpoint.llamagen import Hints

SELF = "self"
DEMO = "demo"
SEVERAL = ("evaluate", "export")  # options that may be given again
FRONTIER_RUNGS = 6
RATIOS, METHODS = "20,30,50", "default, flap, wanda+ls, wanda, magnitude, random"  # that compare compares
MOST_SEED = 2**63 - 1
UNITS = {
    "memory": "B",
    "prefill": "ms",
    "decode": "ms",
    "max_quality_loss": "%",
    "max_task_drop": " points",
}  # of a limit that is given as a number
PATHS = ("model", "calibration", "evaluate", "codec", "features", "profile", "output")


@dataclass(frozen=True)
class Request:
    """None: left out. A new option is a new field here and its help in cli/options.py."""

    model: str = DEMO
    calibration: str = SELF
    evaluate: tuple[Path, ...] = ()
    tasks: str | None = None
    questions: int | None = None
    samples: int = 32
    length: int | None = None
    memory: str | None = None
    decode: str | None = None
    prefill: str | None = None
    max_quality_loss: str | None = None
    max_task_drop: str | None = None
    quality_metric: str = "perplexity"
    method: str = "default"
    layout: str = "uniform"
    vocabulary: str = "full"
    weights: str = "auto"
    cache: str = "auto"
    rungs: int = 1
    recover: str = "off"
    recover_candidates: int = 1
    seed: int = 0
    codec: Path | None = None
    image_size: int | None = None
    num_heads: int | None = None
    cfg: float | None = None
    images: int | None = None
    features: Path | None = None
    device: str | None = None
    profile: Path | None = None
    precision: str | None = None
    tensorrt: str | None = None
    batch: int | None = None
    prompt: int | None = None
    context: int | None = None
    engine: str = "auto"
    target: str | None = None
    keep_remote: bool = False
    require_measured: bool = False
    output: Path | None = None
    export: tuple[str, ...] = ()
    checkpoint: bool = True
    mlflow: str | None = None
    resume: bool = False
    force: bool = False

    @property
    def hints(self) -> Hints:
        from edgeprune.model.checkpoint.llamagen import Hints

        return Hints(self.image_size, self.num_heads)


DEFAULTS = {field.name: field.default for field in dataclasses.fields(Request)}
_OF_ONE_MODEL = (
    *("memory", "decode", "prefill", "max_quality_loss", "max_task_drop", "quality_metric"),
    *("recover_candidates", "require_measured", "export", "checkpoint", "mlflow"),
)
FRONTIER_OPTIONS = tuple(name for name in DEFAULTS if name not in _OF_ONE_MODEL)  # a ladder has no budget


def request_of(**options: Any) -> Request:
    """Returns the request of options as people write them; what is None is left out.

    Paths may be texts, a limit a number (bytes of memory, ms of latency), and what can be given several times one
    value alone. Raises InputError for an option that does not exist, or a value of another type.
    """
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in DEFAULTS:
            raise unknown_option(name, list(DEFAULTS))
        if value is None:
            continue
        if name in UNITS and isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value:.12g}{UNITS[name]}"
        elif name in SEVERAL and isinstance(value, str | Path | list | tuple):
            value = _each_once(name, (value,) if isinstance(value, str | Path) else value)
        elif name in ("model", "calibration") and isinstance(value, Path):
            value = str(value)
        if name in PATHS:
            value = tuple(map(_at_home, value)) if isinstance(value, tuple) else _at_home(value)
        for each in value if isinstance(value, tuple | list) else (value,):
            check_text(each, f"--{name.replace('_', '-')}" if name != "model" else "the model")
        given[name] = value
    return _validated(given)


def _at_home(value: Any) -> Any:
    return at_home(value) if isinstance(value, str | Path) else value  # all else is refused where it is validated


def _each_once(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the values of an option that may be given again, each once. Raises InputError for an empty one."""
    if "" in values:
        raise InputError(f"--{name} is empty", f"Leave it out; `edgeprune fit --help` shows what --{name} takes.")
    return tuple({str(value): value for value in values}.values())


def unknown_option(name: str, known: list[str]) -> InputError:
    """Returns the error for an option that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(name, known, 1)
    return InputError(
        f"there is no option {name!r}", f"Did you mean {near[0]}?" if near else f"Options are: {', '.join(known)}."
    )


def _validated(given: dict[str, Any]) -> Request:
    from pydantic import ValidationError

    try:
        return _adapter().validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{place} {first['input']!r}: {first['msg'].lower()}", "See `edgeprune fit --help` for its form."
        ) from None


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Request)


def check_samples(request: Request) -> None:
    """Raises InputError for numbers that no sample can have, and for a seed that not all generators take."""
    check_seed(request.seed)
    for name, value, least in (("samples", request.samples, 1), ("length", request.length, 2)):
        if value is not None and value < least:
            raise InputError(f"--{name} {value} is less than {least}", f"Give at least {least}.")


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that not all generators take."""
    if not 0 <= seed <= MOST_SEED:
        raise InputError(f"--seed {printable(seed, 40)} is not 0 to {MOST_SEED}", "Give any number among these.")
