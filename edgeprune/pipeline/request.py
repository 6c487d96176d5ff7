"""What the user asked for, in the words of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.llamagen import Hints

SELF = "self"
DEMO = "demo"


@dataclass(frozen=True)
class Request:
    """None: left out."""

    model: str = DEMO
    device: str | None = None
    profile: Path | None = None
    memory: str | None = None
    prefill: str | None = None
    decode: str | None = None
    max_quality_loss: float | None = None
    calibration: str = SELF
    evaluate: tuple[Path, ...] = ()
    samples: int = 32
    length: int | None = None
    method: str = "default"
    layout: str = "uniform"
    vocabulary: str = "full"
    precision: str | None = None
    batch: int | None = None
    prompt: int | None = None
    context: int | None = None
    engine: str = "auto"
    target: str | None = None
    keep_remote: bool = False
    rungs: int = 1
    require_measured: bool = False
    checkpoint: bool = True
    export: tuple[str, ...] = ()
    codec: Path | None = None
    image_size: int | None = None
    num_heads: int | None = None
    cfg: float | None = None
    images: int | None = None
    features: Path | None = None
    output: Path | None = None
    resume: bool = False
    force: bool = False
    seed: int = 0

    @property
    def hints(self) -> Hints:
        return Hints(self.image_size, self.num_heads)


def check_samples(request: Request) -> None:
    """Raises InputError for numbers that no sample can have."""
    for name, value, least in (("samples", request.samples, 1), ("length", request.length, 2)):
        if value is not None and value < least:
            raise InputError(f"--{name} {value} is less than {least}", f"Give at least {least}.")
