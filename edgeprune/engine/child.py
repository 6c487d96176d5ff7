"""A task in a process of its own: one JSON request in, one JSON document out, every end of it told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from edgeprune.errors import EngineError

_START = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"


def ask(module: str, request: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
    """Run a module as a program on a request; it imports what this process would, not the current folder.

    Raises EngineError where the child reports one, dies (naming the signal and its last words) or does not
    end in time.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", _START.format(path=sys.path, module=module)], input=json.dumps(request),
            capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"{request['task']} did not end within {timeout_seconds:.0f} s",
            "Try a shorter context, or an idle machine.",
        ) from None
    said = " ".join(result.stderr.split())[-300:] or "it said nothing"
    if result.returncode < 0:
        name = _signal_name(-result.returncode)
        hint = "The system may have run out of memory: try a smaller --batch or --context." if name == "SIGKILL" else ""
        raise EngineError(f"{request['task']} was ended by {name}: {said}", hint or "Run `edgeprune doctor`.")
    try:
        answer = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise EngineError(f"{request['task']} failed: {said}", "Run `edgeprune doctor`.") from None
    if "error" in answer:
        raise EngineError(answer["error"], answer["remedy"])
    return answer


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no name
        return f"signal {number}"
