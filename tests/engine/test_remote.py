"""Real measurements on a device behind a real sshd on loopback, and every way in which they can fail there."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.engine.remote import Device, Target, device_files, program
from edgeprune.errors import EngineError
from edgeprune.ondevice import measure
from edgeprune.ondevice.figures import Measured, Workload
from edgeprune.ondevice.measure import Counted, LocalSession
from tests.support.device import TASKS_DOUBLE, Server, altered, bare_python, script, ssh_server
from tests.support.durations import durations, durations_there
from tests.support.graph_models import llama
from tests.support.reference import decoder_of, weights_of

VARIANT = GraphVariant("onnxruntime", "last")
WORKLOAD = Workload(batch=1, prompt=16, context=64)


def write_model(folder: Path, **changes: object) -> Path:
    model = llama(True, **changes)
    return write_graphs(decoder_of(model.config), weights_of(model), folder, "fp32", [VARIANT]).graphs[VARIANT]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("graph"), hidden_size=192, intermediate_size=512)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_python(tmp_path_factory.mktemp("venv"))


@pytest.fixture
def server(tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A device that has nothing yet; whatever a test does, it leaves nothing running there."""
    folder = tmp_path / "device"
    folder.mkdir()
    with ssh_server(folder, python) as running:
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        yield running
        running.wait_until_quiet()


class Watch:
    """Remembers what was told. when: {stage: what to do when it begins}."""

    def __init__(self, **when: Callable[[], None]) -> None:
        self.states: list[tuple[str, int, int]] = []
        self._when = {name.replace("_", " "): action for name, action in when.items()}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.states.append((stage, done, total))
        if action := self._when.pop(stage, None):
            action()

    @property
    def sent(self) -> int:
        return max((done for stage, done, _ in self.states if stage == "send to the device"), default=0)


def device(server: Server, keep: bool = False) -> Device:
    return Device(Target.parse(server.target), keep)


def measured(session: measure.Session, graph: Path, on_progress: Watch, seconds: float = 0.2) -> measure.Performance:
    return measure.in_process(
        session, "onnxruntime", None, graph, WORKLOAD, Counted(1000, 200, 30), on_progress, seconds=seconds
    )


def data_bytes(graph: Path) -> int:
    """The `last` graph and the weights beside it; the other variants stay here."""
    return graph.stat().st_size + sum(path.stat().st_size for path in graph.parent.glob("*.data"))


def with_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double's tasks have answers of their own."""
    monkeypatch.setattr("edgeprune.engine.remote.read_answer", lambda request, answer, where: answer)
    monkeypatch.setattr(
        "edgeprune.engine.remote.program", lambda: altered(program(), {"ondevice/tasks.py": TASKS_DOUBLE})
    )


def copy(session: Device, source: Path, target: Path, on_progress: Watch | None = None) -> dict:
    request = {"task": "the copy", "do": "copy", "files": {"graph": str(source)}, "outputs": {"graph": str(target)}}
    return session.run(request, 60, on_progress or Watch())


def test_the_program_is_the_same_every_time_and_has_no_more_than_its_files() -> None:
    assert program() == program()
    with zipfile.ZipFile(BytesIO(program())) as archive:
        names = {name.removeprefix("edgeprune/") for name in archive.namelist() if name.endswith(".py")}
    assert names == {*device_files(), "__main__.py"}


def test_what_the_device_is(server: Server) -> None:
    facts = measure.describe(device(server), Watch())
    assert facts["modules"]["onnxruntime"] == measure.describe(LocalSession(), Watch())["modules"]["onnxruntime"]
    assert facts["modules"]["tensorrt"] is None
    assert facts["gpu"] is None
    assert facts["no_gpu"]


@pytest.mark.slow
def test_a_measurement_there_is_one_like_here_and_sends_once(server: Server, graph: Path, monkeypatch) -> None:
    watch, again = Watch(), Watch()
    with server.login(durations_there(block_ms=10)):
        found = measured(device(server), graph, watch)
    here = measured(LocalSession(), graph, Watch())
    for name in ("prefill", "decode"):
        there, other = getattr(found, name), getattr(here, name)
        assert isinstance(there, Measured)
        assert (there.unit, there.device) == (other.unit, other.device)
        assert 0 < there.low <= there.value <= there.high
        assert set(found.percentiles[name]) == set(here.percentiles[name])
    assert found.memory.total == pytest.approx(here.memory.total, rel=0.5)
    assert watch.sent == data_bytes(graph)  # for both tasks: what the first sent, the second has
    assert len([done for stage, done, total in watch.states if done == total and "send" in stage]) == 1
    assert {"measure", "measure the memory"} <= {stage for stage, *_ in watch.states}
    measure.ratios_on_onnxruntime(device(server), graph, graph, WORKLOAD, 0.2, again)
    assert again.sent == 0
    assert not [stage for stage, *_ in again.states if "send" in stage]
    server.wait_until_quiet()


def test_a_changed_file_is_sent_alone(server: Server, graph: Path, tmp_path: Path, monkeypatch) -> None:
    with_double(monkeypatch)
    for path in graph.parent.iterdir():
        shutil.copy(path, tmp_path / path.name)
    copy(device(server), graph, tmp_path / "out", watch := Watch())
    assert watch.sent == data_bytes(graph)
    changed = tmp_path / graph.name
    changed.write_bytes(changed.read_bytes() + b" ")
    copy(device(server), changed, tmp_path / "out", watch := Watch())
    assert watch.sent == changed.stat().st_size


def test_what_a_task_makes_is_fetched(server: Server, graph: Path, tmp_path: Path, monkeypatch) -> None:
    with_double(monkeypatch)
    target = tmp_path / "made" / "model.engine"
    target.parent.mkdir()
    answer = copy(device(server), graph, target, watch := Watch())
    expected = graph.read_bytes() + b"!"
    assert target.read_bytes() == expected
    assert [path.name for path in target.parent.iterdir()] == ["model.engine"]
    beside = sorted(path.name for path in graph.parent.glob("*.data"))
    assert answer == {"beside": {"graph": sorted([graph.name, *beside])}}
    assert ("fetch from the device", len(expected), len(expected)) in watch.states
    assert hashlib.sha256(expected).hexdigest() in server.stored()  # the engine is not sent back to be measured
    copy(device(server), target, tmp_path / "again", watch := Watch())
    assert watch.sent == 0


def test_a_connection_that_is_lost_while_fetching_leaves_no_half_file(
    server: Server, tmp_path: Path, monkeypatch
) -> None:
    with_double(monkeypatch)
    source, target = tmp_path / "large", tmp_path / "out" / "copy"
    source.write_bytes(os.urandom(8 * 2**20))
    target.parent.mkdir()
    target.write_bytes(b"the older one")
    watch = Watch(fetch_from_the_device=lambda: [os.kill(pid, signal.SIGKILL) for pid in server.agents()])
    with pytest.raises(EngineError, match=f"the connection to {server.target} was lost"):
        copy(device(server), source, target, watch)
    assert [(path.name, path.read_bytes()) for path in target.parent.iterdir()] == [("copy", b"the older one")]
    for left in server.working_folders():  # the agent itself was killed: the next one does this
        shutil.rmtree(left)


def test_a_working_folder_is_kept_where_asked(
    server: Server, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("edgeprune"), "propagate", True)
    with_double(monkeypatch)
    copy(device(server, keep=True), graph, tmp_path / "out")
    (folder,) = server.working_folders()
    assert f"left on {server.target}: {folder}" in caplog.text
    assert (folder / "graph" / graph.name).read_bytes() == graph.read_bytes()
    assert (folder / "out" / "out").exists()
    with pytest.raises(EngineError, match="SIGKILL") as caught:
        device(server, keep=True).run({"task": "the test", "do": "SIGKILL"}, 30, Watch())
    (other,) = set(server.working_folders()) - {folder}
    assert str(other) in caught.value.remedy
    for left in (folder, other):
        shutil.rmtree(left)


def test_signs_of_life_and_a_long_upload(server: Server, tmp_path: Path, monkeypatch) -> None:
    """Hundreds of them while many files are sent: they get between files, never into one."""
    with_double(monkeypatch)
    monkeypatch.setenv(*durations(alive_seconds=0.002).popitem())
    graph = tmp_path / "in" / "model.onnx"
    graph.parent.mkdir()
    graph.write_bytes(b"graph")
    for index in range(40):
        (graph.parent / f"{index}.data").write_bytes(os.urandom(100_000))
    assert len(copy(device(server), graph, tmp_path / "out")["beside"]["graph"]) == 41
    assert copy(device(server), graph, tmp_path / "out", watch := Watch())
    assert watch.sent == 0


def test_two_at_once(server: Server, graph: Path, tmp_path: Path, monkeypatch) -> None:
    with_double(monkeypatch)
    failed = []

    def work(index: int) -> None:
        try:
            copy(device(server), graph, tmp_path / f"out{index}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert {(tmp_path / f"out{index}").read_bytes() for index in range(3)} == {graph.read_bytes() + b"!"}


@functools.cache
def private_mounts() -> str:
    """The words that give a command mounts of its own, with as little power as is enough here."""
    for words in ("unshare -m", "unshare -m -r", "sudo -n -E unshare -m"):
        if (
            subprocess.run([*words.split(), "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
            == 0
        ):
            return words
    pytest.skip("this machine lets nobody mount a small disk")


def small_disk(server: Server, size: str, *lines: str) -> str:
    """Shell that gives a login a cache on a small disk of its own."""
    _, *environment, _ = (server.folder / "shell").read_text().splitlines()
    mount = f'mkdir -p "{server.cache}"; mount -t tmpfs -o size={size} none "{server.cache}"'
    run = 'exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    script(server.folder / "inner", "\n".join((*environment, mount, *lines, run)))
    return f"exec {private_mounts()} {server.folder}/inner"


def test_a_full_disk_is_told_before_anything_is_sent(server: Server, graph: Path) -> None:
    with (
        server.login(small_disk(server, "1m")),
        pytest.raises(EngineError, match="the device's disk is full") as caught,
    ):
        measured(device(server), graph, watch := Watch())
    assert watch.sent == 0
    needs, has = (float(word) for word in caught.value.message.replace(" MiB", "").split() if word[0].isdigit())
    assert needs == pytest.approx(data_bytes(graph) / 2**20, abs=0.1)
    assert 0 < has < 1
    assert str(server.cache) in caught.value.remedy


def test_a_disk_that_others_fill_meanwhile(server: Server, graph: Path, tmp_path: Path, monkeypatch) -> None:
    """There seemed to be room: the write fails in the middle of a file, and the message is the same."""
    with_double(monkeypatch)
    words = {"ondevice/agent.py": ("shutil.disk_usage(self.folder).free", "2**40")}
    packed = altered(program(), {"ondevice/tasks.py": TASKS_DOUBLE}, words)
    monkeypatch.setattr("edgeprune.engine.remote.program", lambda: packed)
    (tmp_path / "large").write_bytes(os.urandom(6 * 2**20))
    with (
        server.login(small_disk(server, "4m")),
        pytest.raises(EngineError, match=r"the device's disk is full: .* needs 6.0 MiB and has \d.\d MiB free"),
    ):
        copy(device(server), tmp_path / "large", tmp_path / "out")


def test_files_of_other_runs_make_room(server: Server, graph: Path, tmp_path: Path, monkeypatch) -> None:
    """A disk that the files of former runs fill."""
    with_double(monkeypatch)
    megabytes = data_bytes(graph) // 2**20 + 3
    store, others = f"{server.cache}/sha256", [f"{age:064d}" for age in range(1, megabytes)]
    lines = [f'mkdir -p "{store}"']
    lines += [
        f'head -c 1048576 /dev/zero > "{store}/{name}"; touch -d "-{name} days" "{store}/{name}"' for name in others
    ]
    disk = small_disk(
        server, f"{megabytes}m", *lines, f'sh -c "$SSH_ORIGINAL_COMMAND"; ls {store} > {server.folder}/kept; exit'
    )
    with server.login(disk):
        copy(device(server), graph, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == graph.read_bytes() + b"!"
    kept = [name for name in others if name in (server.folder / "kept").read_text().split()]
    assert 0 < len(kept) < len(others)
    assert kept == others[: len(kept)]  # the oldest went


@pytest.mark.slow
@pytest.mark.parametrize("packages", [(), ("numpy",)])
def test_a_module_that_is_missing(server: Server, graph: Path, tmp_path: Path, packages: tuple[str, ...]) -> None:
    script(tmp_path / "python3", f'exec "{bare_python(tmp_path / "venv", packages)}" "$@"')
    with server.login(f"PATH={tmp_path}:$PATH"), pytest.raises(EngineError) as caught:
        measured(device(server), graph, Watch())
    name = "onnxruntime" if packages else "numpy"
    assert caught.value.message == f"{server.target}: the Python module {name} is missing"
    assert caught.value.remedy == f"pip install {name}"


@pytest.mark.slow
def test_a_measurement_that_hangs(server: Server, graph: Path, monkeypatch) -> None:
    """The process is stopped in the middle: it cannot even hear that it is to end."""
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 3.0)
    watch = Watch(measure=lambda: os.kill(server.task(), signal.SIGSTOP))
    with pytest.raises(EngineError, match=f"{server.target}: the measurement did not end within 3 s"):
        measured(device(server), graph, watch, 20)
    server.wait_until_quiet(3)


def test_a_measurement_that_runs_out_of_memory(server: Server, graph: Path) -> None:
    watch = Watch(measure=lambda: os.kill(server.task(), signal.SIGKILL))
    with pytest.raises(EngineError, match=f"{server.target}: the measurement was ended by SIGKILL") as caught:
        measured(device(server), graph, watch, 20)
    assert "out of memory" in caught.value.remedy
    server.wait_until_quiet(3)


@pytest.mark.timing
def test_a_connection_that_is_lost_in_a_real_measurement(server: Server, graph: Path) -> None:
    """It is the device that is gone, so the agent hears nothing but the end of its input."""

    def kill() -> None:
        server.task()
        begin = time.monotonic()
        for pid in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
            try:
                if f"-p\0{server.port}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        server.wait_until_quiet(5)
        assert time.monotonic() - begin < 5

    with pytest.raises(EngineError, match=f"the connection to {server.target} was lost"):
        measured(device(server), graph, Watch(measure=kill), 20)


def test_a_graph_that_is_not_here(server: Server, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="none.onnx cannot be read"):
        measured(device(server), tmp_path / "none.onnx", Watch())


def test_what_is_made_and_cannot_be_written_here(server: Server, graph: Path, tmp_path: Path, monkeypatch) -> None:
    with_double(monkeypatch)
    with pytest.raises(EngineError, match="missing/out cannot be written: No such file or directory"):
        copy(device(server), graph, tmp_path / "missing" / "out")


def test_a_file_that_shrinks_while_it_is_sent(server: Server, tmp_path: Path, monkeypatch) -> None:
    with_double(monkeypatch)
    source = tmp_path / "large"
    source.write_bytes(os.urandom(5 * 2**20))
    watch = Watch(send_to_the_device=lambda: os.truncate(source, 2 * 2**20))
    with pytest.raises(EngineError, match="became shorter"):
        copy(device(server), source, tmp_path / "out", watch)
    assert server.stored() == []
