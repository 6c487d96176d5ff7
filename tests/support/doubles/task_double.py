"""A test double of the device's tasks: it does what its request asks for, with no engine. Python 3.10."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from edgeprune.ondevice.worker import OnProgress, serve


def answer(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    files = {role: Path(path) for role, path in request["files"].items()}
    outputs = {role: Path(path) for role, path in request["outputs"].items()}
    on_progress(request["do"], 0, 0)
    match request["do"]:
        case "copy":  # every file, with one byte more
            for role, path in outputs.items():
                path.write_bytes(files[role].read_bytes() + b"!")
            return {"beside": {role: sorted(p.name for p in path.parent.iterdir()) for role, path in files.items()}}
        case "sleep":
            time.sleep(request["seconds"])
        case "clutter":  # so many files that their removal takes some time
            for index in range(request["files_made"]):
                (Path(request["where"]) / str(index)).touch()
            on_progress("cluttered", 1, 1)
            time.sleep(60)
        case "flood":
            for index in range(request["times"]):
                on_progress("flood", index, request["times"])
        case "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        case "full":
            raise OSError(28, "No space left on device", "plan")
        case "import":
            import a_module_that_nobody_has  # noqa: F401
    return {"folder": str(Path.cwd()), "path": sys.path}


if __name__ == "__main__":
    sys.exit(serve(answer))
