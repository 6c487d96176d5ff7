"""Load on `edgeprune serve`: clients for some minutes, among them ones that leave, and ones that send nonsense.

    python -m tools.load_serve BUNDLE [--minutes 5] [--clients 8] [--slots 4]

Every client asks one request after the other from a list of prompts: most are read to their end, some are left in the
middle of the stream, some are malformed. It ends with exit code 1 where an answer differs from that of the same request
alone, where a request ends in another way than was asked for, or where the server's resident memory after the first
minute grows by more than 2 %.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import typer

from edgeprune.ondevice.bundle import open_to_run
from edgeprune.ondevice.bundle_runner import runner_of
from tools.bench_serve import ours

GROWTH = 0.02
WARM_SHARE = 0.2  # of the time, after which memory is to stay as it is
LEAVES, NONSENSE = 0.15, 0.1  # shares of the requests
MALFORMED = (b"{", b"[]", b'{"prompt": 3}', b'{"prompt": "a", "n": 2}', b'{"prompt": "a", "max_tokens": -1}', b"\xff")


def posted(port: int, body: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def whole(port: int, request: dict[str, object]) -> str:
    """Returns an answer that is streamed to its end."""
    connection, response = posted(port, json.dumps(request).encode())
    lines = response.read().decode().splitlines()
    connection.close()
    if response.status != 200 or lines[-2:] != ["data: [DONE]", ""]:
        raise RuntimeError(f"status {response.status}: {lines[-1:]}")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in event["choices"])


def resident(port: int) -> float:
    """Returns the resident bytes that the server tells of."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("process_resident")))


def main(bundle: Path, minutes: float = 5.0, clients: int = 8, slots: int = 4, prompts: int = 12) -> None:
    """Serve BUNDLE, and load it."""
    rng = np.random.default_rng(0)
    vocabulary = runner_of(open_to_run(bundle), 1, 1, typer.echo).vocab_size
    lengths = rng.integers(4, 200, prompts)
    requests = [
        {
            "prompt": rng.integers(1, vocabulary, length).tolist(),
            "max_tokens": int(rng.integers(4, 48)),
            "temperature": float(index % 2),
            "seed": index,
            "stream": True,
        }
        for index, length in enumerate(lengths)
    ]
    done: Counter[str] = Counter()
    wrong: list[str] = []
    with ours(bundle, None, slots) as port:
        alone = [whole(port, request) for request in requests]
        end = time.monotonic() + 60 * minutes

        def client(number: int) -> None:
            own = np.random.default_rng(number)
            while time.monotonic() < end:
                index, dice = int(own.integers(len(requests))), own.random()
                try:
                    if dice < NONSENSE:
                        connection, response = posted(port, MALFORMED[int(own.integers(len(MALFORMED)))])
                        text = response.read()
                        connection.close()
                        if response.status != 400:
                            wrong.append(f"nonsense was answered by {response.status}: {text[:200]!r}")
                        done["refused"] += 1
                    elif dice < NONSENSE + LEAVES:
                        connection, response = posted(port, json.dumps(requests[index]).encode())
                        response.readline()
                        connection.close()
                        done["left"] += 1
                    else:
                        if whole(port, requests[index]) != alone[index]:
                            wrong.append(f"the answer to request {index} differs from the one alone")
                        done["read to the end"] += 1
                except Exception as error:
                    wrong.append(repr(error))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        memory = []
        while time.monotonic() < end:
            time.sleep(min(5.0, max(0.1, end - time.monotonic())))
            memory.append(resident(port))
        for thread in threads:
            thread.join()
    settled = np.array(memory[int(WARM_SHARE * len(memory)) :])
    growth = settled[-max(1, len(settled) // 5) :].mean() / settled[: max(1, len(settled) // 5)].mean() - 1
    typer.echo(f"{dict(done)}, {len(wrong)} wrong; memory {settled[-1] / 2**20:.1f} MiB, grown by {100 * growth:.2f} %")
    for one in wrong[:10]:
        typer.echo(one)
    sys.exit(1 if wrong or growth > GROWTH else 0)


if __name__ == "__main__":
    typer.run(main)
