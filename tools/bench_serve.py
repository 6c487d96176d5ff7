"""Overhead of `edgeprune serve` over the engine alone: time to the first token, and between tokens, by streams.

    python -m tools.bench_serve BUNDLE [--prompt 128] [--new 64] [--rounds 8]

BUNDLE is a language model's for a processor. The server runs in a process of its own with four slots, and is asked by
one stream and by four; the engine alone runs the same prompt here, in the same parts, by turns with it. Of four streams
each token waits for those of the others, so that the engine's own time is counted four times; what is above it is
overhead. Figures are medians with the 95 % interval of a bootstrap over rounds.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import typer

from edgeprune.ondevice.bundle import open_to_run
from edgeprune.ondevice.bundle_runner import runner_of
from edgeprune.ondevice.reference import StepRunner
from edgeprune.ondevice.serving import PART
from tools.bench_graph import interval
from tools.pages import table

STREAMS = (1, 4)
COLUMNS = ["what runs", "first token, ms", "between tokens, ms"]


def alone(runner: StepRunner, prompt: list[int], new: int) -> tuple[float, float]:
    """Returns the ms until the first token of a prompt, and between later ones, of the engine without a server."""
    start = time.perf_counter()
    runner.reset()
    for begin in range(0, len(prompt), PART):
        logits = runner.run(np.array([prompt[begin : begin + PART]]))
    token, first = int(logits[0].argmax()), time.perf_counter()
    for _ in range(new - 1):
        token = int(runner.run(np.array([[token]]))[0].argmax())
    return 1e3 * (first - start), 1e3 * (time.perf_counter() - first) / (new - 1)


def asked(port: int, prompt: list[int], new: int) -> tuple[float, float]:
    """Returns the same of a request that is streamed."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    times = [time.perf_counter() for line in connection.getresponse() if line.startswith(b"data: {")]
    connection.close()
    return 1e3 * (times[0] - start), 1e3 * (times[-1] - times[0]) / (new - 1)


def side_by_side(port: int, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """Returns the means of requests that are made at once."""
    found: list[tuple[float, float]] = []
    threads = [threading.Thread(target=lambda p=p: found.append(asked(port, p, new))) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, later = np.mean(found, axis=0)
    return float(first), float(later)


def main(bundle: Path, prompt: int = 128, new: int = 64, rounds: int = 8) -> None:
    """Serve BUNDLE, and ask it."""
    command = [sys.executable, "-m", "edgeprune.cli", "serve", str(bundle), "--port", "0", "--slots", str(max(STREAMS))]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
        runner = runner_of(open_to_run(bundle), 1, 1, typer.echo)
        rng = np.random.default_rng(0)
        times: dict[str, list[tuple[float, float]]] = {}
        for round_ in range(rounds + 1):
            # Prompts that nobody has asked before: no part of them is in a cache.
            prompts = [rng.integers(1, runner.vocab_size, prompt).tolist() for _ in range(1 + sum(STREAMS))]
            found = {"the engine alone": alone(runner, prompts.pop(), new)}
            for streams in STREAMS:
                own = [prompts.pop() for _ in range(streams)]
                found[f"served, {streams} at once"] = side_by_side(port, own, new)
            if round_:  # the first one warms up
                for name, pair in found.items():
                    times.setdefault(name, []).append(pair)
        rows = [
            [name, *(interval(np.array(column)) for column in zip(*pairs, strict=True))]
            for name, pairs in times.items()
        ]
        typer.echo(table(COLUMNS, rows))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    typer.run(main)
