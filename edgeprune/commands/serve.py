"""The command that serves a bundle over HTTP: opens it, and runs the server until a signal ends it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from edgeprune.errors import InputError
from edgeprune.ondevice.bundle import CODEC, open_to_run
from edgeprune.ondevice.bundle_runner import runners_of
from edgeprune.ondevice.serve import key_of

LOOPBACK = ("127.0.0.1", "::1", "localhost")
GRACE = 5  # seconds that answers have when the server is ended


def serve(
    bundle: Path,
    host: str,
    port: int,
    slots: int | None,
    queue: int,
    key_file: Path | None,
    note: Callable[[str], None],
    on_ready: Callable[[str, int], None],
) -> None:
    """Serves a bundle at host:port until a signal comes; port 0 takes any that is free.

    slots: requests that are answered at once, None for the batch that the bundle was fitted for; queue: more that may
    wait; key_file: of the key that requests must bring. on_ready is called with the address and the slots. Raises
    InputError for a bundle that cannot run, the bundle of an image generator, a taken port and a missing extra.
    """
    uvicorn = _uvicorn()
    key = key_of(key_file)
    if key is None and host not in LOOPBACK:
        note(f"anybody who reaches {host} can use the model: give --api-key-file")
    # The port first: opening a model takes long.
    listener = _listener(host, port)
    with listener:
        chosen = open_to_run(bundle)
        if (bundle / CODEC).is_dir():
            raise InputError(
                f"{bundle} is the bundle of an image generator, which answers no text", "Draw with `edgeprune run`."
            )
        chosen.check(chosen.tokenizer)
        from edgeprune.generate.server import app_of, words_of
        from edgeprune.ondevice.serving import Service

        with Service(lambda: runners_of(chosen, slots, note), queue) as service:
            words = words_of(chosen.tokenizer, service.vocab_size)
            app = app_of(service, words, bundle.resolve().name, key)
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE
            )
            name = f"[{host}]" if ":" in host else host
            on_ready(f"http://{name}:{listener.getsockname()[1]}", len(service.slots))
            uvicorn.Server(config).run(sockets=[listener])


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
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen at {host}:{port}: {error.strerror}", "Try another --port; 0 takes any."
        ) from None
    return listener
