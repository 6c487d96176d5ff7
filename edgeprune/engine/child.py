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

    Raises EngineError where the child reports one, dies (naming the signal) or does not end in time.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", _START.format(path=sys.path, module=module)], input=json.dumps(request),
            capture_output=True, text=True, timeout=timeout_seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"{request['task']} did not end within {timeout_seconds:.0f} s",
            "Try a shorter context, or an idle machine.",
        ) from None
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        hint = "The system may have run out of memory: try a smaller --batch or --context." if name == "SIGKILL" else ""
        raise EngineError(f"{request['task']} was ended by {name}", hint or "Run it again with -v --log-file.")
    try:
        answer = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        tail = " ".join(result.stderr.split())[-300:]
        raise EngineError(f"{request['task']} failed: {tail}", "Run `edgeprune doctor`.") from None
    if "error" in answer:
        raise EngineError(answer["error"], answer["remedy"])
    return answer
