"""A device that answers as its plan says, in place of ssh: `liar.py PLAN`, a program of its own. It runs no task.

The plan is JSON: answers by task, the bytes of what a task makes, and lies by message. A lie is a text in place of the
message's line, and what happens after it: nothing, `silence`, `stop`, `close`, or text that comes without end.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from typing import Any

MAKES = b"an engine"
plan: dict[str, Any] = {}


def tell(name: str, document: dict[str, Any]) -> None:
    lie = plan["lies"].get(name, {})
    line = lie["line"] if "line" in lie else json.dumps(document) + "\n"
    write(line.encode("utf-8", "surrogateescape"))
    match lie.get("then"):
        case "silence":
            time.sleep(600)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "close":
            os._exit(0)
        case str(text):
            while True:
                write(text.encode() * max(1, 8192 // len(text)))


def write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def answer(message: dict[str, Any]) -> bool:
    """Answers one message; returns whether the conversation goes on."""
    match message["do"]:
        case "have":
            tell("missing", {"missing": list(message["sizes"])})
        case "put":
            tell("go", {"go": True})
            sys.stdin.buffer.read(message["size"])
            tell("done", {"done": True})
        case "run":
            request = message["request"]
            task = request.get("step", request["do"])
            tell("progress", {"progress": [task, 0, 0]})
            made = {role: hashlib.sha256(MAKES).hexdigest() for role in message["outputs"]}
            tell(f"answer to {task}", {"answer": plan["answers"][task], "made": made})
        case "get":
            tell("size", {"size": len(MAKES)})
            tell("bytes", {})
        case "bye":
            tell("left", {"left": None})
            return False
    return True


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123 (pathlib takes long to import)
        plan.update(json.load(file))
    plan["lies"].setdefault("bytes", {"line": MAKES.decode()})
    # The boot code and the program come first; neither is run.
    source = sys.stdin.buffer
    source.read(int(source.readline()))
    source.read(int(source.readline().split()[0]))
    tell("hello", {"protocol": 1, "python": "3.10.12", "work": "/nowhere"})
    for line in source:
        if not answer(json.loads(line)):
            return


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(1)
