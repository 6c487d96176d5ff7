"""Overhead of `edgeprune serve` over the engine alone: time to the first token, and between tokens, by streams.

    python -m tools.bench_serve BUNDLE [--draft BUNDLE] [--llama GGUF] [--llama-draft GGUF] [--prompt 128] [--new 64]

BUNDLE is a language model's for a processor, GGUF a file of the same model (`--export gguf`): llama.cpp's own server
runs beside ours then, with four slots. --draft is ours, --llama-draft llama.cpp's. Servers run in processes of their
own: ours with one slot, asked by one stream, and with four, asked by one and by four. The engine alone runs prompts of
the same length here, in the same parts, by turns with them. Figures are medians with the 95 % interval of a bootstrap
over --rounds.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
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
    body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    times, tokens = [], 0
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if event.get("choices"):
                times.append(time.perf_counter())
    connection.close()
    return 1e3 * (times[0] - start), 1e3 * (times[-1] - times[0]) / max(1, tokens - 1)


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


def serve_llama(path: str, draft: str | None, prompt: int, slots: int, ready: Connection) -> None:
    """Runs llama.cpp's server on a file, and the file of a draft, until its process is ended; sends its port."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = path, 0
    params.n_parallel, params.n_ctx, params.verbosity = slots, slots * prompt, 0
    params.n_gpu_layers, params.fit_params = 0, False
    if draft is not None:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path, params.speculative.draft.n_gpu_layers = draft, 0
    server = xllamacpp.Server(params)
    ready.send(int(server.listening_address.rsplit(":", 1)[1]))
    ready.recv()


@contextmanager
def ours(bundle: Path, draft: Path | None, slots: int) -> Iterator[int]:
    """Yields the port of `edgeprune serve`."""
    command = [sys.executable, "-m", "edgeprune.cli", "serve", str(bundle), "--port", "0", "--slots", str(slots)]
    command += [] if draft is None else ["--draft", str(draft)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield int(server.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
    finally:
        server.terminate()
        server.wait()


@contextmanager
def llamas(path: Path, draft: Path | None, length: int) -> Iterator[int]:
    """Yields the port of llama.cpp's server."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(
        target=serve_llama, args=(str(path), draft and str(draft), length, max(STREAMS), there), daemon=True
    )
    server.start()
    try:
        yield here.recv()
    finally:
        server.kill()
        server.join()


def main(
    bundle: Path,
    llama: Path | None = None,
    draft: Path | None = None,
    llama_draft: Path | None = None,
    prompt: int = 128,
    new: int = 64,
    rounds: int = 8,
) -> None:
    """Serve BUNDLE, and ask it."""
    with ExitStack() as servers:
        ports = {f"served, slots: {slots}": servers.enter_context(ours(bundle, draft, slots)) for slots in STREAMS}
        if llama is not None:
            ports["llama.cpp's server"] = servers.enter_context(llamas(llama, llama_draft, prompt + new + PART))
        runner = runner_of(open_to_run(bundle), 1, 1, typer.echo)
        rng = np.random.default_rng(0)
        times: dict[str, list[tuple[float, float]]] = {}
        for round_ in range(rounds + 1):
            # Prompts that nobody has asked before: no part of them is in a cache.
            def fresh() -> list[int]:
                return rng.integers(1, runner.vocab_size, prompt).tolist()

            found = {"the engine alone": alone(runner, fresh(), new)}
            for name, port in ports.items():
                for streams in STREAMS if name != "served, slots: 1" else STREAMS[:1]:
                    found[f"{name}, {streams} at once"] = side_by_side(port, [fresh() for _ in range(streams)], new)
            if round_:  # the first one warms up
                for name, pair in found.items():
                    times.setdefault(name, []).append(pair)
        rows = [
            [name, *(interval(np.array(column)) for column in zip(*pairs, strict=True))]
            for name, pairs in times.items()
        ]
        typer.echo(table(COLUMNS, rows))


if __name__ == "__main__":
    typer.run(main)
