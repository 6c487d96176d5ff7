"""A device for tests: a real sshd on loopback whose python3 has numpy and onnxruntime and nothing else of ours.

sshd has its own keys, config and port; the `ssh` that the product finds is the system's with a config of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
ON_DEVICE = ("numpy", "onnxruntime")


@dataclass
class Server:
    """A running sshd. cache: where the device's files are; log: what sshd said."""

    folder: Path
    port: int
    process: subprocess.Popen

    @property
    def target(self) -> str:
        return f"ssh://{os.environ.get('USER') or 'root'}@127.0.0.1:{self.port}"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def log(self) -> str:
        return (self.folder / "sshd.log").read_text(errors="replace")

    def working_folders(self) -> list[Path]:
        return list((self.cache / "work").glob("*"))

    def agents(self) -> list[int]:
        """Processes of the device side that still run: they alone have the device's cache in their environment."""
        return [int(p.name) for p in Path("/proc").glob("[0-9]*") if self._is_ours(p)]

    def _is_ours(self, process: Path) -> bool:
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            zombie = ") Z " in (process / "stat").read_text()
        except OSError:
            return False
        return f"EDGEPRUNE_CACHE={self.cache}".encode() in environment and not zombie

    def wait_until_quiet(self, seconds: float = 15) -> None:
        end = time.monotonic() + seconds
        while self.agents() and time.monotonic() < end:
            time.sleep(0.1)
        assert not self.agents(), "something is left running on the device"


def bare_python(folder: Path, packages: tuple[str, ...] = ON_DEVICE) -> Path:
    """A virtual environment that holds these packages (linked, not installed: tests have no network) alone."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    for name in _with_requirements(packages):
        for entry in {Path(file).parts[0] for file in importlib.metadata.files(name) or ()} - {"..", "__pycache__"}:
            source = Path(importlib.metadata.distribution(name).locate_file(entry))
            if source.exists() and not (site / entry).exists():
                (site / entry).symlink_to(source)
    return folder / "bin" / "python3"


def _with_requirements(packages: tuple[str, ...]) -> set[str]:
    found, todo = set(), list(packages)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            if "extra ==" not in text:
                todo.append(text.split(";")[0].split("[")[0].strip().split(" ")[0].split(">")[0].split("=")[0]
                            .split("<")[0].split("!")[0].split("~")[0])  # fmt: skip
    return found


@contextmanager
def ssh_server(folder: Path, python: Path, cache: Path | None = None) -> Iterator[Server]:
    """A server on a free port; `folder/bin/ssh` is what the product must find first in PATH."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    device_bin = folder / "device-bin"
    device_bin.mkdir()
    # No link: a virtual environment is found by the path that it is started by.
    (device_bin / "python3").write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
    (device_bin / "python3").chmod(0o755)
    cache = cache or folder / "cache"
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPermitRootLogin yes\nPasswordAuthentication no\n"
        f"ForceCommand {folder}/shell\n"
    )
    # What a login shell's own startup files put into PATH must not decide which python3 the device has.
    (folder / "shell").write_text(
        f'#!/bin/sh\nexport PATH="{device_bin}:/usr/bin:/bin" EDGEPRUNE_CACHE="{cache}"\n'
        'exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    (folder / "shell").chmod(0o755)
    known = folder / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile {known}\nGlobalKnownHostsFile none\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F "{folder}/ssh_config" "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    process = subprocess.Popen([SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")])
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            raise RuntimeError((folder / "sshd.log").read_text())
        yield Server(folder, port, process)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    sys.exit("imported by tests")
