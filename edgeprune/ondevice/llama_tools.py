"""The tools that a device has to measure llama.cpp with: the package xllamacpp, or llama.cpp's own llama-bench.

This file also runs on the device: Python 3.10, standard library only. It measures nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from edgeprune.ondevice.lines import one_line
from edgeprune.ondevice.runtimes import LLAMA_BENCH, LLAMA_CPP, RUNTIMES

REMEDY = (
    "Install a llama.cpp of 2025 or later there, whose llama-bench has the option -d, on the PATH that a login by ssh "
    "has: /usr/local/bin is."
)
_HELP_SECONDS = 30.0
_NEEDED = {"-d": "--n-depth", "-o json": "json"}  # options by what its help says of them
_LIST, _NO_GPU = "--list-devices", "(none)"


def find() -> dict[str, str] | None:
    """Returns llama-bench's path and release, its GPUs, and why it cannot measure (empty where it can).

    release: its date and size, since it tells no version; gpus: as it lists them, empty where it does not tell. None
    where there is no such program.
    """
    path = shutil.which(LLAMA_BENCH)
    if path is None:
        return None
    state = Path(path).stat()
    release = f"{time.strftime('%Y-%m-%d', time.gmtime(state.st_mtime))}, {state.st_size} bytes"
    found = {"path": path, "release": release, "gpus": "", "problem": ""}
    try:
        told = _told(path, "--help")
        gpus = _told(path, _LIST) if _LIST in told else ""
    except (OSError, subprocess.SubprocessError) as error:
        return {**found, "problem": f"{path} does not start: {one_line(str(error))}"}
    lacking = [option for option, word in _NEEDED.items() if word not in told]
    problem = f"{path} is too old: it has no {' and no '.join(lacking)}" if lacking else ""
    return {**found, "gpus": one_line(gpus.partition("devices:")[2]), "problem": problem}


def _told(path: str, option: str) -> str:
    """Returns what the program writes with one option."""
    ended = subprocess.run([path, option], capture_output=True, timeout=_HELP_SECONDS, text=True, errors="replace")
    return ended.stdout + ended.stderr


def refusal_of(facts: dict[str, Any], sm: int | None) -> str | None:
    """Returns why nothing on a device can measure llama.cpp, in words; None where something can.

    facts: as machine.describe gives them; sm: the GPU's that is to be measured, None for the processor.
    """
    program, gpu = facts.get("llama_bench"), facts["gpu"]
    if sm is None and facts["modules"][RUNTIMES[LLAMA_CPP].module] is not None:
        return None
    if program is None:
        return "it has no llama-bench on its PATH"
    if sm is not None and program["gpus"] == _NO_GPU:
        return f"{program['path']} was built without a GPU, or finds none"
    if sm is not None and gpu is not None and gpu["sm"] != sm:
        return f"it has a {gpu['name']} of SM {gpu['sm']}, not of SM {sm}"
    return program["problem"] or None


def tool_of(facts: dict[str, Any], sm: int | None) -> tuple[str, str]:
    """Returns what measures llama.cpp on a device that is not refused, and its version.

    The package xllamacpp runs on processors alone.
    """
    version, program = facts["modules"][RUNTIMES[LLAMA_CPP].module], facts.get("llama_bench")
    if sm is None and version is not None:
        return LLAMA_CPP, version
    return LLAMA_BENCH, f"{program['path']} of {program['release']}"
