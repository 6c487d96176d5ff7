"""A test double of a program that measures: it ends in the way that its request asks for."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import numpy as np


def main() -> None:
    request = json.load(sys.stdin)
    match request["end"]:
        case "answer":
            sys.stdout.write("a library's own line\n" + json.dumps({"numpy": np.__file__}) + "\n")
        case "error":
            sys.stdout.write(json.dumps({"error": "the device is on fire", "remedy": "Put it out."}) + "\n")
            sys.exit(4)
        case "crash":
            raise RuntimeError("a bug of ours")
        case "noise":
            sys.stderr.buffer.write(b"a library's \xff\xfe message\n")
            sys.exit(1)
        case "real-time signal":
            os.kill(os.getpid(), signal.SIGRTMIN + 3)
        case "silence":
            sys.exit(0)
        case "hang":
            time.sleep(60)
        case "lines without an end":
            sys.stdout.write("x" * 3_000_000)
            sys.stderr.write("y" * 3_000_000)
            sys.exit(1)
        case "another progress":
            for state in ([], None, ["stage"], [1, 2, 3], ["stage", "1", 2], {"stage": 1}, ["s", 1, 2]):
                sys.stdout.write(json.dumps({"progress": state}) + "\n")
            sys.stdout.write(json.dumps({"done": True}) + "\n")
        case "no object":
            sys.stdout.write("[1]\n" + "[" * 100_000 + "\n")
        case "an error that is none":
            sys.stdout.write(json.dumps({"remedy": 5}) + "\n")
        case "escapes":
            sys.stdout.write(json.dumps({"name\x1b[2J": ["a\x07\u202eboard\nof two lines", 1]}) + "\n")
        case "half a document":
            sys.stdout.write('{"value":')
        case name:
            sys.stderr.write("these are my last words\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.Signals[name])


if __name__ == "__main__":
    main()
