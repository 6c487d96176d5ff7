"""The device's side alone: real processes of it over pipes, started by the words that ssh would pass on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.engine import remote
from edgeprune.engine.ssh import COMMAND
from edgeprune.errors import EngineError
from edgeprune.ondevice import agent
from edgeprune.ondevice.agent import Store
from tests.support.device import TASKS_DOUBLE, altered, script
from tests.support.durations import durations

Usage = namedtuple("Usage", "total used free")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Far:
    """An agent that runs, and what is said to it. home: its current folder; cache: where it keeps its files."""

    def __init__(self, folder: Path, packed: bytes, cut: int | None = None, **seconds: float) -> None:
        self.home, self.cache = folder / "home", folder / "cache"
        self.home.mkdir(exist_ok=True)
        script(folder / "python3", f'exec {sys.executable} "$@"')
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "EDGEPRUNE_CACHE": str(self.cache), "HOME": str(self.home)}
        environment |= durations(**seconds)
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {COMMAND}"],
            cwd=self.home,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        boot = remote.BOOT.encode()
        self.write(f"{len(boot)}\n".encode() + boot + f"{len(packed)} agent.pyz\n".encode() + packed[:cut])

    def write(self, data: bytes) -> None:
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def say(self, **document: Any) -> None:
        self.write(json.dumps(document).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        while (line := self.process.stdout.readline()) in (b"\n", b'{"alive": true}\n'):
            pass
        assert line, self.process.stderr.read().decode()
        return json.loads(line)

    def ask(self, **document: Any) -> dict[str, Any]:
        """The answer; progress on the way is passed over."""
        self.say(**document)
        while "progress" in (answer := self.hear()):
            pass
        return answer

    def put(self, data: bytes, name: str | None = None) -> dict[str, Any]:
        assert self.ask(do="put", sha256=name or sha256(data), size=len(data)) == {"go": True}
        self.write(data)
        return self.hear()

    def run(self, do: str, files: dict[str, list[str]] | None = None, **more: Any) -> dict[str, Any]:
        """files: {role: [name, hash]}."""
        given = files or {}
        names = {role: name for role, (name, _) in given.items()}
        request = {"task": "the test", "do": do, **more.pop("request", {})}
        return self.ask(
            **{
                "do": "run",
                "request": request,
                "files": names,
                "hashes": dict(given.values()),
                "outputs": {},
                "timeout": 30,
                "keep": False,
                **more,
            }
        )

    def works(self) -> list[Path]:
        return list((self.cache / "work").iterdir())

    def ended(self) -> int:
        return self.process.wait(timeout=10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Far]]:
    """Agents with tasks that are doubles, and other durations than usual."""
    running: list[Far] = []

    def begin(**seconds: float) -> Far:
        packed = altered(remote.program(), {"ondevice/tasks.py": TASKS_DOUBLE})
        running.append(Far(tmp_path, packed, **seconds))
        hello = running[-1].hear()
        assert hello["protocol"] == agent.PROTOCOL
        running[-1].work = Path(hello["work"])
        return running[-1]

    yield begin
    for far in running:
        far.process.kill()
        far.process.wait()
        for stream in (far.process.stdout, far.process.stderr):
            stream.close()


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    assert found
    return found


def test_a_whole_conversation(start: Callable[..., Far]) -> None:
    far = start()
    first, second = b"first" * 50_000, b""
    sizes = {sha256(first): len(first), sha256(second): 0}
    assert set(far.ask(do="have", sizes=sizes)["missing"]) == set(sizes)
    assert far.put(first) == {"done": True}
    assert far.put(second) == {"done": True}
    assert far.ask(do="have", sizes=sizes) == {"missing": []}
    files = {"graph": ["graph/a.onnx", sha256(first)], "data": ["graph/a.data", sha256(second)]}
    answer = far.run("copy", files, outputs={"graph": "out/a.plan"})
    assert answer["answer"] == {"beside": {role: ["a.data", "a.onnx"] for role in files}}
    made = sha256(first + b"!")
    assert answer["made"] == {"graph": made}
    assert far.ask(do="get", sha256=made) == {"size": len(first) + 1}
    assert far.process.stdout.read(len(first) + 1) == first + b"!"
    assert far.ask(do="bye") == {"left": None}
    assert far.ended() == 0
    assert far.works() == []


def test_signs_of_life_between_everything_change_nothing(start: Callable[..., Far]) -> None:
    far = start()
    alive = b'{"do": "alive"}\n'
    datas = [os.urandom(size) for size in (1, 15, 100_000)] + [alive * 100]
    for data in datas:
        far.write(alive)
        far.say(do="put", sha256=sha256(data), size=len(data))
        assert far.hear() == {"go": True}
        far.write(data + alive + alive)
        assert far.hear() == {"done": True}
    assert far.ask(do="have", sizes={sha256(data): len(data) for data in datas}) == {"missing": []}


def test_a_damaged_file_is_refused_and_the_conversation_goes_on(start: Callable[..., Far]) -> None:
    far = start()
    data, other = b"as it was" * 1000, b"as it is!" * 1000
    assert "damaged" in far.put(other, sha256(data))["error"]
    assert far.ask(do="have", sizes={sha256(data): len(data)}) == {"missing": [sha256(data)]}
    assert list((far.cache / "sha256").iterdir()) == []
    assert far.put(data) == {"done": True}


def test_a_file_that_lost_its_end_is_asked_for_again(start: Callable[..., Far]) -> None:
    far = start()
    data = b"whole" * 100
    far.put(data)
    (far.cache / "sha256" / sha256(data)).write_bytes(data[:-1])
    assert far.ask(do="have", sizes={sha256(data): len(data)}) == {"missing": [sha256(data)]}
    assert far.put(data) == {"done": True}


@pytest.mark.parametrize("name", ["../out", "graph/../../../x", "/etc/passwd", "a/../.."])
@pytest.mark.parametrize("field", ["files", "outputs"])
def test_names_outside_of_the_working_folder_are_refused(
    start: Callable[..., Far], tmp_path: Path, name: str, field: str
) -> None:
    far = start()
    far.put(b"data")
    before = sorted(tmp_path.rglob("*"))
    given = {"graph": [name if field == "files" else "graph/a", sha256(b"data")]}
    answer = far.run("copy", given, outputs={"graph": name if field == "outputs" else "out/a"})
    assert "outside of the working folder" in answer["error"]
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and "work" not in path.parts] == []
    assert far.ask(do="bye") == {"left": None}


def test_a_file_that_it_does_not_have_is_told(start: Callable[..., Far]) -> None:
    far = start()
    answer = far.run("copy", {"graph": ["graph/a.onnx", sha256(b"never sent")]})
    assert "does not have" in answer["error"]
    assert "a.onnx" in answer["error"]
    for name in ("../../secret", "", "A" * 64, "0" * 63):
        assert "is not a sha256" in far.ask(do="have", sizes={name: 1})["error"]
    assert far.ask(do="bye") == {"left": None}


@pytest.mark.parametrize(
    ("do", "message", "remedy"),
    [
        ("SIGKILL", "the test was ended by SIGKILL", "memory"),
        ("full", "the disk is full at plan", "Free some space"),
        ("import", "the Python module a_module_that_nobody_has is missing", "pip install"),
    ],
)
def test_a_task_that_fails_is_one_message(start: Callable[..., Far], do: str, message: str, remedy: str) -> None:
    far = start()
    answer = far.run(do)
    assert message in answer["error"]
    assert remedy in answer["remedy"]
    assert "answer" in far.run("sleep", request={"seconds": 0})
    assert far.ask(do="bye") == {"left": None}


@pytest.mark.slow
def test_a_task_that_hangs_is_ended(start: Callable[..., Far]) -> None:
    far = start()
    far.say(
        do="run",
        request={"task": "the test", "do": "sleep", "seconds": 60},
        files={},
        hashes={},
        outputs={},
        timeout=1.5,
        keep=False,
    )
    assert far.hear() == {"progress": ["sleep", 0, 0]}
    (child,) = children(far.process.pid)
    os.kill(child, signal.SIGSTOP)
    assert "did not end within" in far.hear()["error"]
    assert not is_running(child)


def test_modules_in_the_home_folder_are_not_imported(start: Callable[..., Far], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for name in ("json", "queue", "tempfile", "subprocess", "numpy"):
        (tmp_path / "home" / f"{name}.py").write_text("raise SystemExit('shadowed')")
    far = start()
    answer = far.run("sleep", request={"seconds": 0})["answer"]
    assert answer["folder"] == str(far.home)
    assert not {"", answer["folder"]} & set(answer["path"])


def running_task(far: Far) -> int:
    far.say(
        do="run",
        request={"task": "the test", "do": "sleep", "seconds": 60},
        files={},
        hashes={},
        outputs={},
        timeout=50,
        keep=False,
    )
    assert far.hear() == {"progress": ["sleep", 0, 0]}
    return children(far.process.pid)[0]


@pytest.mark.parametrize("end", ["stdin", "both", "SIGTERM", "SIGHUP", "SIGINT", "nonsense"])
def test_whatever_ends_it_nothing_is_left(start: Callable[..., Far], end: str) -> None:
    far = start()
    child = running_task(far)
    match end:
        case "stdin":
            far.process.stdin.close()
        case "both":
            far.process.stdout.close()
            far.process.stdin.close()
        case "nonsense":
            far.write(b"this is no document\n")
        case name:
            far.process.send_signal(signal.Signals[name])
    far.ended()
    wait_for(lambda: not is_running(child))
    assert far.works() == []


def test_many_ends_at_once_do_not_interrupt_the_cleaning(start: Callable[..., Far]) -> None:
    far = start()
    work = far.works()[0]
    request = {"task": "the test", "do": "clutter", "where": str(work), "files_made": 20_000}
    far.say(do="run", request=request, files={}, hashes={}, outputs={}, timeout=50, keep=False)
    while far.hear() != {"progress": ["cluttered", 1, 1]}:
        pass
    far.process.stdin.close()
    for _ in range(2000):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if far.process.poll() is None:
                far.process.send_signal(number)
    far.ended()
    assert far.works() == []


def test_an_upload_that_ends_early_leaves_nothing(start: Callable[..., Far]) -> None:
    far = start()
    far.ask(do="put", sha256=sha256(b"x" * 1000), size=1000)
    far.write(b"x" * 500)
    far.process.stdin.close()
    far.ended()
    assert far.works() == list((far.cache / "sha256").iterdir()) == []


def test_a_program_that_arrives_in_part_is_not_kept(tmp_path: Path) -> None:
    far = Far(tmp_path, remote.program(), cut=1000)
    far.process.stdin.close()
    assert far.ended() == 1
    assert not (tmp_path / "cache").exists()


def test_silence_ends_it(start: Callable[..., Far]) -> None:
    far = start(silence_seconds=1.0)
    child = running_task(far)
    assert far.ended() == 128 + signal.SIGTERM
    wait_for(lambda: not is_running(child))
    assert far.works() == []


def test_it_ends_though_the_exception_of_a_signal_was_lost(tmp_path: Path) -> None:
    """As where it was raised in a destructor, which swallows it."""
    lost = {"ondevice/agent.py": ("sys.exit(128 + number)", "pass")}
    far = Far(tmp_path, altered(remote.program(), words=lost))
    far.hear()
    far.process.stdin.close()
    assert far.ended() == 1
    assert far.works() == []


@pytest.mark.slow
def test_signs_of_life_and_a_long_upload_keep_it(start: Callable[..., Far]) -> None:
    far = start(silence_seconds=0.8)
    data = os.urandom(1000)
    assert far.ask(do="put", sha256=sha256(data), size=len(data)) == {"go": True}
    for begin in range(0, len(data), 100):  # two seconds
        far.write(data[begin : begin + 100])
        time.sleep(0.2)
    assert far.hear() == {"done": True}
    running_task(far)
    for _ in range(8):
        time.sleep(0.25)
        far.write(b'{"do": "alive"}\n')
    assert far.process.poll() is None


def test_what_a_killed_agent_left_the_next_one_removes(start: Callable[..., Far]) -> None:
    """Its task ends with it. A working folder in use, a fresh one and one that is to be kept stay."""
    old = time.time() - 3600
    killed, kept, alive = start(), start(), start()
    os.utime(alive.work, (old, old))
    child = running_task(killed)
    killed.process.kill()
    wait_for(lambda: not is_running(child))
    kept.run("sleep", request={"seconds": 0}, keep=True)
    assert kept.ask(do="bye") == {"left": str(kept.work)}
    for far in (kept, killed):
        os.utime(far.work, (old, old))
    (killed.cache / "work" / "a file").touch()
    os.utime(killed.cache / "work" / "a file", (old, old))
    fresh = killed.cache / "work" / "fresh"
    fresh.mkdir()
    last = start()
    assert not killed.work.exists()
    assert kept.work.exists()
    assert alive.work.exists()
    assert fresh.exists()
    assert last.ask(do="bye") == {"left": None}


def test_two_that_receive_the_same_file(start: Callable[..., Far]) -> None:
    data = os.urandom(100_000)
    both = [start(), start()]
    for far in both:
        assert far.ask(do="have", sizes={sha256(data): len(data)})["missing"]
        assert far.ask(do="put", sha256=sha256(data), size=len(data)) == {"go": True}
    for far in both:
        far.write(data)
    for far in both:
        assert far.hear() == {"done": True}
        assert "answer" in far.run("copy", {"graph": ["graph/a", sha256(data)]})


def small_disk(monkeypatch: pytest.MonkeyPatch, store: Store, capacity: int) -> None:
    def usage(folder: Path) -> Usage:
        used = sum(path.stat().st_size for path in store.folder.iterdir())
        return Usage(capacity, used, capacity - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_the_oldest_files_go_first_and_needed_ones_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "sha256")
    names = {age: f"{age:064x}" for age in (10, 20, 30, 40, 50)}
    for age, name in names.items():
        store.path(name).write_bytes(b"x" * 100)
        os.utime(store.path(name), (time.time() - age, time.time() - age))
    (store.folder / "part-of-another-run").write_bytes(b"x" * 100)
    small_disk(monkeypatch, store, 650)
    assert store.missing({names[50]: 100, names[10]: 100}) == []
    store.make_room(49)  # there is room
    assert len(list(store.folder.iterdir())) == 6
    store.make_room(140)
    assert [age for age, name in names.items() if store.path(name).exists()] == [10, 20, 30, 50]
    store.make_room(340)
    assert [age for age, name in names.items() if store.path(name).exists()] == [10, 50]
    assert (store.folder / "part-of-another-run").exists()
    os.utime(store.folder / "part-of-another-run", (time.time() - 3600, time.time() - 3600))
    store.make_room(440)  # nobody receives it any longer
    with pytest.raises(EngineError, match=r"disk is full.*needs 2.0 MiB and has 0.0 MiB free") as caught:
        store.make_room(2 * 2**20)
    assert str(tmp_path) in caught.value.remedy
    assert [age for age, name in names.items() if store.path(name).exists()] == [10, 50]


def test_room_is_looked_for_before_anything_is_sent(start: Callable[..., Far]) -> None:
    far = start()
    answer = far.ask(do="have", sizes={"0" * 64: 2**60, "1" * 64: 1})
    assert "disk is full" in answer["error"]
    assert f"{2**40}.0 MiB" in answer["error"]
