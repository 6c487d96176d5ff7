"""Addresses that cannot become options, and a real sshd on loopback whose connections end in every way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeprune.engine import ssh
from edgeprune.engine.remote import Device, program
from edgeprune.engine.ssh import Target
from edgeprune.errors import EngineError, InputError
from edgeprune.ondevice.agent import PROTOCOL
from edgeprune.ondevice.measure import describe
from tests.support.device import TASKS_DOUBLE, Server, altered, bare_python, ssh_server
from tests.support.durations import durations, durations_there
from tests.support.lying_device import TRUE, line_of

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_."
WORDS = st.builds(str.__add__, st.sampled_from(LETTERS), st.text(LETTERS + "-", max_size=20))
ADDRESSES = st.one_of(
    st.ip_addresses(v=6).map(str), st.builds("{}%{}".format, st.ip_addresses(v=6, network="fe80::/10"), WORDS)
)


@given(st.none() | WORDS, WORDS | ADDRESSES, st.none() | st.integers(1, 2**16 - 1))
@example("nvidia", "Orin-A.local", 2222)  # a name in ~/.ssh/config may have capitals
@example(None, "::1", None)
@example(None, "FE80::1%eth0", 22)
def test_an_address_is_read_back_from_its_text(user: str | None, host: str, port: int | None) -> None:
    target = Target(user, host, port)
    assert Target.parse(str(target)) == target
    assert Target.parse(f"{target}/") == target


@given(st.text(max_size=40) | st.text("-@:[]%/ \n\t'\"$;&|ssh.x1", max_size=20))
@example("-oProxyCommand=x@h")
@example("h/-oProxyCommand=x")
@example("h\n")
@example("h\n-oProxyCommand=x")
@example("u@-oProxyCommand=x")
@example("[-oProxyCommand=x:]")
@example("[::1%-x]")
def test_no_text_becomes_an_option(text: str) -> None:
    """Whatever is accepted is one word each for user and host, and stands where ssh reads no option."""
    try:
        target = Target.parse(f"ssh://{text}")
    except InputError as error:
        assert error.remedy
        return
    words = target.words()
    assert words[-2:] == ["--", target.host]
    own = [word for word in words[:-2] if word not in Target(None, "h", None).words()]
    expected = ["-p", str(target.port)] if target.port else []
    assert own == [*expected, *(["-l", target.user] if target.user else [])]
    for word in filter(None, (target.user, target.host)):
        assert re.fullmatch(r"[A-Za-z0-9_.:%-]+", word)
        assert not word.startswith("-")
    assert target.user is None or not set(target.user) & set(":%")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh:",
        "ssh://",
        "ssh:///",
        "ssh://@h",
        "http://h",
        "SSH//h",
        "ssh://h:22:23",
        "ssh://h/x",
        "ssh://h?x",
        "ssh://h#x",
        "ssh://a b",
        "ssh://h ",
        " ssh://h",
        "ssh://h\n",
        "ssh://h\r",
        "ssh://h\t",
        "ssh://h\0",
        "ssh://u@v@h",
        "ssh://'h'",
        'ssh://"h"',
        "ssh://$(x)",
        "ssh://h;x",
        "ssh://h&",
        "ssh://-h",
        "ssh://-u@h",
        "ssh://[::1",
        "ssh://::1",
        "ssh://[h]",
        "ssh://[]",
        "ssh://h:x",
        "ssh://h:0",
        "ssh://h:65536",
        "ssh://h:-1",
        "ssh://h:+1",
        "ssh://h:",
        "ssh://h:١",
        "ssh://ünicode",
    ],
)
def test_malformed_addresses(text: str) -> None:
    with pytest.raises(InputError, match="malformed target") as caught:
        Target.parse(text)
    assert "ssh://user@host" in caught.value.remedy


@pytest.mark.parametrize("text", ["h", "me@orin", "me@orin:2222"])
def test_an_address_without_ssh_is_answered_with_it(text: str) -> None:
    with pytest.raises(InputError, match="malformed target") as caught:
        Target.parse(text)
    assert caught.value.remedy == f"Write --target ssh://{text}"


@pytest.mark.parametrize(
    "text", ["ssh://u:secret@h", "ssh://u:@h", "ssh://u:se/cret@h", "ssh://u:se@cret@h", "ssh://:x@h"]
)
def test_a_password_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InputError, match="holds a password") as caught:
        Target.parse(text)
    assert "cret" not in caught.value.message + caught.value.remedy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("device")
    with ssh_server(folder, bare_python(folder / "venv", ())) as running:
        yield running


@pytest.fixture(autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device's own ssh is found first; whatever a test does, it leaves nothing there."""
    if "server" not in request.fixturenames:
        yield
        return
    server: Server = request.getfixturevalue("server")
    monkeypatch.setenv("PATH", f"{server.folder}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(
        "edgeprune.engine.remote.program", lambda: altered(program(), {"ondevice/tasks.py": TASKS_DOUBLE})
    )
    # The double's tasks have answers of their own.
    monkeypatch.setattr("edgeprune.engine.remote.read_answer", lambda request, answer, where: answer)
    yield
    server.wait_until_quiet()


def run(server: Server, do: str = "sleep", on_progress=None, timeout: float = 60, **request: object) -> dict:
    request = {"task": "the test", "do": do, "seconds": 0, **request}
    return Device(Target.parse(server.target)).run(request, timeout, on_progress or (lambda *state: None))


def fails(server: Server, *message: str, **arguments: object) -> EngineError:
    with pytest.raises(EngineError) as caught:
        run(server, **arguments)
    assert caught.value.message.startswith((server.target, f"the connection to {server.target}"))
    for part in message:
        assert part in caught.value.message
    assert "Traceback" not in caught.value.message
    assert caught.value.remedy
    return caught.value


def test_it_runs_there(server: Server) -> None:
    answer = run(server)
    assert answer["folder"] == str(server.home)


def test_an_unknown_host_key(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", server.client(tmp_path, known_hosts=""))
    error = fails(server, "its host key is not known yet")
    assert f"ssh -p {server.port} -l" in error.remedy
    assert (tmp_path / "known_hosts").read_text() == ""


def test_another_host_key(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = (server.folder / "user.pub").read_text()
    monkeypatch.setenv("PATH", server.client(tmp_path, known_hosts=f"[127.0.0.1]:{server.port} {other}"))
    assert "ssh-keygen -R" in fails(server, "its host key is not the known one").remedy


def test_a_key_that_is_not_accepted(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is asked for a password."""
    monkeypatch.setenv("PATH", server.client(tmp_path, identity=server.folder / "host"))
    assert "ssh-copy-id" in fails(server, "does not let this user in", "Permission denied").remedy


def test_nobody_listens(server: Server) -> None:
    closed = Server(server.folder, 1, server.process)
    assert "sshd runs there" in fails(closed, "refuses the connection").remedy


def test_an_unknown_name(server: Server) -> None:
    with pytest.raises(EngineError, match=r"ssh://no-such-host\.invalid: its name is not known"):
        describe(Device(Target.parse("ssh://no-such-host.invalid")), lambda *state: None)


def test_no_ssh_here(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="this machine has no ssh"):
        run(server)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["echo Welcome", "printf 'no end of line'", "echo '{\"motd\": 1}'; echo '[1]'; echo", "seq 900"]
)
def test_a_login_shell_that_talks_is_passed_over(server: Server, line: str) -> None:
    with server.login(line):
        assert run(server)["folder"]


def test_a_login_shell_that_talks_without_end(server: Server) -> None:
    with server.login("yes"):
        fails(server, "did not begin")


def test_a_login_that_is_refused(server: Server) -> None:
    with server.login("echo 'This account is not available.'; exit 1"):
        fails(server, "did not begin: This account is not available.")


def test_no_python(server: Server) -> None:
    with server.login("PATH=/nothing"):
        assert "Python 3.10" in fails(server, "has no python3").remedy


def test_an_old_python(server: Server, tmp_path: Path) -> None:
    """It says so itself, also where the program is still on its way."""
    python = (server.folder / "device-bin" / "python3").read_text().split('"')[1]
    fake = f'''#!/bin/sh\nexec "{python}" -c "import sys; sys.version_info = (3, 8, 10, 'final', 0); $2"\n'''
    (tmp_path / "python3").write_text(fake)
    (tmp_path / "python3").chmod(0o755)
    with server.login(f"PATH={tmp_path}:$PATH"):
        assert "3.10 or newer" in fails(server, "the device has Python 3.8").remedy


def test_a_cache_that_cannot_be_written(server: Server) -> None:
    with server.login("export EDGEPRUNE_CACHE=/proc/nothing"):
        fails(server, "the device's folder /proc/nothing cannot be written")


def test_another_protocol(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = altered(program(), words={"ondevice/agent.py": ("PROTOCOL = 1", "PROTOCOL = 7")})
    monkeypatch.setattr("edgeprune.engine.remote.program", lambda: packed)
    fails(server, "speaks protocol 7")


def parents(pid: int) -> Iterator[int]:
    while pid > 1:
        yield pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def our_ssh() -> int:
    """The ssh that this process has started."""
    for child in Path("/proc/self/task").glob("*/children"):
        for pid in child.read_text().split():
            if "ssh_config" in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
    raise AssertionError("no ssh runs")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["client", "server", "agent", "shell"])
def test_a_connection_that_is_killed(server: Server, end: str) -> None:
    """Each of the processes that the task hangs on."""

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage != "sleep":
            return
        _, agent, shell, *above = parents(server.task())
        victims = {"client": our_ssh(), "agent": agent, "shell": shell, "server": above[0]}
        name = Path(f"/proc/{victims[end]}/comm").read_text().strip()
        assert name == {"client": "ssh", "server": "sshd"}.get(end, name)
        os.kill(victims[end], signal.SIGKILL)

    begin = time.monotonic()
    error = fails(server, "was lost", seconds=50, on_progress=on_progress)
    assert "ends by itself" in error.remedy
    assert time.monotonic() - begin < 20
    if end == "agent":  # who removes what a killed agent left? The next one, when it is no longer fresh.
        (left,) = server.working_folders()
        os.utime(left, (0, 0))
        run(server)
    server.wait_until_quiet()


@pytest.mark.slow
def test_signs_of_life_while_a_task_runs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is told that silence of a second is too long."""
    monkeypatch.setenv(*durations(alive_seconds=0.2).popitem())
    with server.login(durations_there(silence_seconds=1.0)):
        assert run(server, seconds=3)["folder"]


@pytest.mark.slow
def test_a_workstation_that_stops(server: Server) -> None:
    """Its ssh is alive and says nothing any longer: the device ends by itself."""

    def on_progress(stage: str, done: int, total: int) -> None:
        pid = our_ssh()
        os.kill(pid, signal.SIGSTOP)
        server.wait_until_quiet()
        os.kill(pid, signal.SIGCONT)

    with server.login(durations_there(silence_seconds=1.0)):
        fails(server, "was lost", seconds=50, on_progress=on_progress)


def test_no_word_of_the_users_is_in_a_shell(server: Server) -> None:
    """What ssh passes to the far shell is the same for every request."""
    with server.login(f'printf %s "$SSH_ORIGINAL_COMMAND" > {server.folder}/command'):
        run(server, task="$(touch hacked); 'x' \"y\"")
    assert (server.folder / "command").read_text() == ssh.COMMAND
    assert list(server.home.iterdir()) == []
    subprocess.run(["/bin/sh", "-n", "-c", ssh.COMMAND], check=True)


FAKE = """#!/usr/bin/env python3
import json, os, sys, threading, time
threading.Thread(target=sys.stdin.buffer.read, daemon=True).start()
said = {said!r}
sys.stdout.buffer.write(said)
sys.stdout.buffer.flush()
if {endless!r}:
    while True:
        sys.stdout.buffer.write({endless!r} * 4096)
while {stays!r}:
    time.sleep(0.05)
os._exit(0)
"""
HELLO = json.dumps({"protocol": PROTOCOL, "python": "3.10", "work": "/w"}).encode() + b"\n"
MISSING = b'{"missing": []}\n'


def stranger(folder: Path, monkeypatch, said: bytes = b"", endless: bytes = b"", stays: bool = True) -> Device:
    """A device whose ssh says only this, whatever it is told."""
    script = folder / "ssh"
    script.write_text(FAKE.format(said=said, endless=endless, stays=stays))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    short = durations(silence_seconds=1.0, greeting_seconds=1.5, grace_seconds=0.0, leave_seconds=0.3)
    for name, value in short.items():
        monkeypatch.setenv(name, value)
    return Device(Target.parse("ssh://me@board"))


def ask_it(device: Device, **request: object) -> dict:
    return device.run({"task": "the test", "do": "describe", **request}, 2.0, lambda *state: None)


LIARS = {
    "nothing at all": ((b"", b""), "did not begin: ssh printed nothing"),
    "a hello alone": ((HELLO, b""), "gave no sign of life"),
    "a line without an end": ((HELLO, b"x"), "without an end|was lost"),
    "a banner without an end": ((b"", b"x"), "did not begin"),
    "many lines": ((b"", b"welcome\n"), "did not begin"),
    "another hello": ((b'{"protocol": [], "python": 1, "work": {}}\n', b""), "cannot be"),
    "no JSON": ((HELLO + b"what?\n", b""), "is no message: 'what\\?'"),
    "a list": ((HELLO + b"[]\n", b""), "is no message"),
    "hashes that are paths": ((HELLO + b'{"missing": ["../x"]}\n', b""), "cannot be"),
    "a wrong answer": ((HELLO + MISSING + b'{"answer": {}, "made": {}}\n', b""), "cannot be"),
    "files that nobody asked for": (
        (HELLO + MISSING + line_of({"answer": TRUE["describe"][1], "made": {"plan": "0" * 64}}), b""),
        "other files",
    ),
    "progress for ever": ((HELLO + MISSING, b'{"progress": ["x", 1, 2]}\n'), "did not answer within 2 s"),
    "signs of life for ever": ((HELLO + MISSING, b'{"alive": true}\n'), "did not answer within 2 s"),
    "escapes": ((line_of({"error": "\x1b[2Jgone", "remedy": "\x1b]0;x\x07"}), b""), "board: "),
    "nesting": ((HELLO + b"[" * 100_000 + b"\n", b""), "is no message"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("said", "message"), LIARS.values(), ids=list(LIARS))
def test_whatever_a_stranger_says_it_is_one_error_in_time(tmp_path: Path, monkeypatch, said, message: str) -> None:
    device = stranger(tmp_path, monkeypatch, *said)
    begin = time.monotonic()
    with pytest.raises(EngineError, match=message) as caught:
        ask_it(device)
    assert time.monotonic() - begin < 30  # bounded, on a busy machine too
    assert caught.value.exit_code == 4
    assert f"{caught.value.message} {caught.value.remedy}".isprintable()


@pytest.mark.slow
def test_a_process_that_outlives_ssh_and_holds_its_output_is_not_waited_for(tmp_path: Path, monkeypatch) -> None:
    """A wrapper of ssh, or its ProxyCommand, may leave one behind: the pipe does not end with ssh."""
    device = stranger(tmp_path, monkeypatch)
    says = f"cat <<'END'\n{HELLO.decode()}END\nexec 3<&0\ncat <&3 > /dev/null &"
    lines = f"{says}\nsleep 60 &\necho $! > {tmp_path}/left\nwait"
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{lines}\n")
    with pytest.raises(EngineError, match="gave no sign of life"):
        ask_it(device)
    left = int((tmp_path / "left").read_text())
    os.kill(left, signal.SIGKILL)  # it is there still


@pytest.mark.parametrize("size", [1 << 62, -1, 1 << 49])
def test_a_size_that_no_disk_holds_is_refused(tmp_path: Path, monkeypatch, size: int) -> None:
    ran = line_of({"answer": TRUE["build"][1], "made": {"plan": "0" * 64}})
    device = stranger(tmp_path, monkeypatch, HELLO + MISSING + ran + line_of({"size": size}))
    with pytest.raises(EngineError, match="cannot be|MiB free"):
        ask_it(device, do="build", engine="tensorrt", outputs={"plan": str(tmp_path / "plan")})
    assert {path.name for path in tmp_path.iterdir()} == {"ssh"}


def test_a_stopped_process_on_the_device_is_not_waited_for(server: Server, monkeypatch) -> None:
    for name, value in durations(silence_seconds=1.0, alive_seconds=0.2).items():
        monkeypatch.setenv(name, value)
    stopped = []

    def stop(*state: object) -> None:
        if not stopped:
            stopped.extend(server.agents())
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)

    try:
        with pytest.raises(EngineError, match="gave no sign of life"):
            run(server, seconds=30, on_progress=stop)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(server.cache / "work", ignore_errors=True)
