"""The making of a bundle: the command line that makes it again, versions, seed, fingerprint."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edgeprune import __version__
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.pipeline.request import Request
from edgeprune.pipeline.setup import Setup

PACKAGES = ("torch", "transformers", "onnx", "numpy", *(runtime.package for runtime in RUNTIMES.values()))


def manifest_of(setup: Setup, command: str, run_id: str) -> dict[str, Any]:
    """Returns the manifest of a bundle but for its hashes; run_id: the journal's."""
    return {
        "edgeprune": __version__,
        "created": now(),
        "run": run_id,
        "command": command,
        "device": setup.profile.name,
        "engine": setup.engine.name,
        "seed": setup.request.seed,
        "versions": versions(),
        "fingerprint": setup.fingerprint,
    }


def command_line(request: Request, command: str = "fit", left_out: Collection[str] = ()) -> str:
    """Returns the command line that makes a bundle again: every argument that was given, but for those left out."""
    words = ["edgeprune", command, request.model]
    defaults = type(request)()
    for name, value in request.__dict__.items():
        option = "--" + name.replace("_", "-")
        if name in ("model", "resume", "force", *left_out):
            continue
        if value == getattr(defaults, name) and (command, name) != ("frontier", "rungs"):  # of another default
            continue
        if name == "checkpoint":
            words.append("--no-checkpoint")
        elif value is True:
            words.append(option)
        elif name in ("evaluate", "export"):
            words += [word for each in value for word in (option, str(each))]
        else:
            words += [option, str(value)]
    return shlex.join(words)


def versions() -> dict[str, str]:
    installed = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
