"""The command that serves a bundle over HTTP, here or on a device: opens it, and serves until a signal ends it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

from edgeprune.engine.remote import target_of
from edgeprune.engine.ssh import forwarding
from edgeprune.errors import InputError
from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.bundle import TOKENIZER, Chosen, rung_folder
from edgeprune.ondevice.bundle_runner import runners_of
from edgeprune.ondevice.llamacpp import MODEL_FILE
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.ondevice.serve import LISTENING, key_of, open_to_serve

LOOPBACK = ("127.0.0.1", "::1", "localhost")
FOR_EVER = 1e9  # seconds that a server may run on a device
GRACE = 5  # seconds that answers have when the server is ended


def serve(
    bundle: Path,
    host: str,
    port: int,
    slots: int | None,
    queue: int,
    key_file: Path | None,
    draft: Path | None,
    note: Callable[[str], None],
    on_ready: Callable[[str, int], None],
) -> None:
    """Serves a bundle at host:port until a signal comes; port 0 takes any that is free.

    slots: requests that are answered at once, None for the batch that the bundle was fitted for; queue: more that may
    wait; key_file: of the key that requests must bring; draft: as of runners_of. on_ready is called with the address
    and the slots. Raises InputError for a bundle that cannot run, the bundle of an image generator, a taken port and a
    missing extra.
    """
    uvicorn = _uvicorn()
    key = _key(key_file, host, note)
    # The port first: opening a model takes long.
    listener = _listener(host, port)
    with listener:
        chosen = open_to_serve(bundle)
        from edgeprune.generate.server import app_of, words_of
        from edgeprune.ondevice.serving import Service

        with Service(lambda: runners_of(chosen, slots, note, draft), queue) as service:
            words = words_of(chosen.tokenizer, service.vocab_size)
            app = app_of(service, words, bundle.resolve().name, key)
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE
            )
            on_ready(_address(host, listener.getsockname()[1]), len(service.slots))
            uvicorn.Server(config).run(sockets=[listener])


def serve_there(
    bundle: Path,
    target: str,
    host: str,
    port: int,
    slots: int | None,
    queue: int,
    key_file: Path | None,
    note: Callable[[str], None],
    on_ready: Callable[[str, int], None],
) -> None:
    """Serves a bundle on the device behind ssh, and forwards its port to host:port here, until a signal comes.

    The device gets the files of the chosen rung that it does not have, and serves at its loopback alone. All else is as
    of `serve`. Raises InputError as it does, EngineError where the device cannot be reached, or cannot run the bundle.
    """
    key, device = _key(key_file, host, note), target_of(target, keep=False)
    with _listener(host, port) as listener:
        port = listener.getsockname()[1]
    chosen = open_to_serve(bundle)
    request = {
        "do": "serve",
        "task": "serve the bundle",
        "engine": chosen.engine,
        "workload": asdict(chosen.workload),
        "name": bundle.resolve().name,
        "slots": slots,
        "waiting": queue,
        "key": key,
        "files": {role: str(path) for role, path in _files(chosen).items()},
    }
    with contextlib.ExitStack() as open_ports:

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage == LISTENING:
                open_ports.enter_context(forwarding(device.target, host, port, done))
                on_ready(_address(host, port), total)
            elif total == 0:
                note(stage)
            elif stage not in told:
                told.add(stage)
                note(f"{stage}: {format_bytes(total)}")

        told: set[str] = set()
        replace(device, serves=True).run(request, FOR_EVER, on_progress)


def _files(chosen: Chosen) -> dict[str, Path]:
    """Returns the files that a device needs to serve a rung, by role: the engine, else the graph, and the tokenizer."""
    folder = rung_folder(Path(), 0)
    engines = [chosen.folder / "engine" / MODEL_FILE, *sorted((chosen.folder / "engine").glob("*.engine"))]
    engine = next((path for path in engines if path.is_file()), None)
    graph = chosen.folder / "onnx" / GRAPH_FILE
    chosen.check(engine or graph.parent)
    files = {str(folder / ("engine" if engine else "onnx")): engine or graph}
    for number, path in enumerate(sorted(chosen.tokenizer.iterdir())):
        files[f"{TOKENIZER}.{number}"] = path
    return files


def _key(path: Path | None, host: str, note: Callable[[str], None]) -> str | None:
    """Returns the key that requests must bring; notes where none is asked of strangers."""
    key = key_of(path)
    if key is None and host not in LOOPBACK:
        note(f"anybody who reaches {host} can use the model: give --api-key-file")
    return key


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _uvicorn() -> ModuleType:
    """Returns the module of the server. Raises InputError where the extra is missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise InputError(
            "serving needs the modules starlette and uvicorn", 'Install them: pip install "edgeprune[serve]"'
        ) from None
    return uvicorn


def _listener(host: str, port: int) -> socket.socket:
    """Returns a bound socket. Raises InputError where the address is taken or not of this machine."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise InputError(f"{host} is no address: {error.strerror or error}", "Try --host 127.0.0.1.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # so that who reads that it serves may connect at once
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen at {host}:{port}: {error.strerror}", "Try another --port; 0 takes any."
        ) from None
    return listener
