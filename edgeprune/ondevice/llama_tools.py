"""The tools that a device has to measure llama.cpp with: the package xllamacpp, or llama.cpp's own llama-bench.

This file also runs on the device: Python 3.10, standard library only. It measures nothing.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from edgeprune.ondevice.lines import one_line
from edgeprune.ondevice.runtimes import LLAMA_BENCH, LLAMA_CPP, RUNTIMES

REMEDY = (
    "Install a llama.cpp of 2025 or later there, whose llama-bench has the option -d, on the PATH that a login by ssh "
    "has: /usr/local/bin is."
)
_HELP_SECONDS = 30.0
_NEEDED = {"-d": "--n-depth", "-o json": "json"}  # options by what its help says of them


def find() -> dict[str, str] | None:
    """Returns the program's path and why it cannot measure (empty where it can); None where there is none."""
    path = shutil.which(LLAMA_BENCH)
    if path is None:
        return None
    try:
        told = subprocess.run([path, "--help"], capture_output=True, timeout=_HELP_SECONDS, errors="replace")
    except (OSError, subprocess.SubprocessError) as error:
        return {"path": path, "problem": f"{path} does not start: {one_line(str(error))}"}
    text = told.stdout + told.stderr
    lacking = [option for option, word in _NEEDED.items() if word not in text]
    return {"path": path, "problem": f"{path} is too old: it has no {' and no '.join(lacking)}" if lacking else ""}


def tool_of(facts: dict[str, Any], on_processor: bool) -> tuple[str, str] | None:
    """Returns what measures with llama.cpp on a device that machine.describe described, and its version or path.

    The package xllamacpp runs on processors alone. None where nothing measures.
    """
    version, program = facts["modules"][RUNTIMES[LLAMA_CPP].module], facts.get("llama_bench")
    if on_processor and version is not None:
        return LLAMA_CPP, version
    return (LLAMA_BENCH, program["path"]) if program is not None and not program["problem"] else None


def refusal_of(facts: dict[str, Any]) -> str:
    """Returns why a device's llama-bench cannot measure, in words."""
    return (facts.get("llama_bench") or {"problem": "it has no llama-bench on its PATH"})["problem"]
