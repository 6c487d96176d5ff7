"""A device for tests: a real sshd on loopback whose python3 has numpy and onnxruntime and nothing else of ours.

sshd has its own keys, config and port; the `ssh` that the product finds is the system's with a config of its own.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import pwd
import shutil
import socket
import subprocess
import time
import venv
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.durations import durations_there

REAL_SSH = shutil.which("ssh")
SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
NO_SSHD = "sshd is not installed (Debian's openssh-server)"
ON_DEVICE = ("numpy", "onnxruntime")
TASKS_DOUBLE = (Path(__file__).parent / "doubles" / "task_double.py").read_text()


MARK = "EDGEPRUNE_TEST_DEVICE"


@dataclass
class Server:
    """A running sshd. cache: where the device's files are; log: what sshd said."""

    folder: Path
    port: int
    process: subprocess.Popen

    @property
    def target(self) -> str:
        return f"ssh://{pwd.getpwuid(os.geteuid()).pw_name}@127.0.0.1:{self.port}"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def log(self) -> str:
        return (self.folder / "sshd.log").read_text(errors="replace")

    @contextmanager
    def login(self, *lines: str) -> Iterator[None]:
        """Meanwhile a login runs these lines of shell before the command."""
        shell = self.folder / "shell"
        before = shell.read_text()
        shell.write_text(before.replace("exec /bin/sh", "\n".join((*lines, "exec /bin/sh"))))
        try:
            yield
        finally:
            shell.write_text(before)

    def client(self, folder: Path, known_hosts: str | None = None, identity: Path | None = None) -> str:
        """PATH with an ssh of other settings first."""
        known = folder / "known_hosts"
        known.write_text((self.folder / "known_hosts").read_text() if known_hosts is None else known_hosts)
        return _client(folder, known, identity or self.folder / "user")

    def working_folders(self) -> list[Path]:
        return list((self.cache / "work").glob("*"))

    def stored(self) -> list[str]:
        return sorted(path.name for path in (self.cache / "sha256").glob("*"))

    def agents(self) -> list[int]:
        """Processes of the device side that still run: they alone have its mark in their environment."""
        return [int(p.name) for p in Path("/proc").glob("[0-9]*") if self._is_ours(p)]

    def task(self) -> int:
        """The process of the task that runs now."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            for pid in self.agents():
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if b"edgeprune.ondevice.tasks" in words and b"prctl" in words:
                    return pid
            time.sleep(0.02)
        raise AssertionError("no task runs on the device")

    def _is_ours(self, process: Path) -> bool:
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            zombie = ") Z " in (process / "stat").read_text()
        except OSError:
            return False
        return f"{MARK}={self.folder}".encode() in environment and not zombie

    def wait_until_quiet(self, seconds: float = 15) -> None:
        """Nothing runs any longer, and no working folder is left."""
        end = time.monotonic() + seconds
        while (self.agents() or self.working_folders()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not self.agents(), "something is left running on the device"
        assert not self.working_folders(), "a working folder is left on the device"


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
        for requirement in map(Requirement, importlib.metadata.requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


@contextmanager
def ssh_server(folder: Path, python: Path) -> Iterator[Server]:
    """A server on a free port; `folder/bin/ssh` is what the product must find first in PATH."""
    if SSHD is None:
        pytest.skip(NO_SSHD)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    device_bin = folder / "device-bin"
    device_bin.mkdir()
    # No link: a virtual environment is found by the path that it is started by.
    script(device_bin / "python3", f'exec "{python}" "$@"')
    (folder / "home").mkdir()
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPermitRootLogin yes\nPasswordAuthentication no\n"
        f"KbdInteractiveAuthentication no\nForceCommand {folder}/shell\nMaxStartups 100\n"
    )
    # What a login shell's own startup files put into PATH must not decide which python3 the device has.
    script(
        folder / "shell",
        f'export PATH="{device_bin}:/usr/bin:/bin" EDGEPRUNE_CACHE="{folder}/cache" {MARK}="{folder}"\n'
        f'{durations_there()}\nexport HOME="{folder}/home"\ncd "$HOME"\nexec /bin/sh -c "$SSH_ORIGINAL_COMMAND"',
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    _client(folder, folder / "known_hosts", folder / "user")
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


def _client(folder: Path, known: Path, identity: Path) -> str:
    """PATH with an ssh first that knows this config alone."""
    (folder / "ssh_config").write_text(
        f"IdentityFile {identity}\nIdentitiesOnly yes\nUserKnownHostsFile {known}\nGlobalKnownHostsFile none\n"
    )
    (folder / "bin").mkdir()
    script(folder / "bin" / "ssh", f'exec {REAL_SSH} -F "{folder}/ssh_config" "$@"')
    return f"{folder}/bin:{os.environ['PATH']}"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def altered(packed: bytes, texts: Mapping[str, str] = {}, words: Mapping[str, tuple[str, str]] = {}) -> bytes:  # noqa: B006
    """The device's program with whole files, or one expression of a file, replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            text = texts.get(name.removeprefix("edgeprune/"), old.read(name).decode())
            if name.removeprefix("edgeprune/") in words:
                before, after = words[name.removeprefix("edgeprune/")]
                assert before in text
                text = text.replace(before, after)
            new.writestr(name, text)
    return buffer.getvalue()
