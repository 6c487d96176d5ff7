"""The profile that the tool writes: from this processor, from one over ssh, and from doubles of GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.engine import probe
from edgeprune.errors import EngineError, InputError
from edgeprune.ondevice import probe_tasks
from edgeprune.profiles import DeviceProfile, load_profile, load_profile_file
from edgeprune.report.schema import Report
from tests.support import ROOT
from tests.support.checkpoints import save_llama
from tests.support.commands import SMALL, run
from tests.support.device import Server, bare_python, ssh_server
from tests.support.doubles.double_device import Device as Double
from tests.support.doubles.install import InProcess
from tools import probe_profile
from tools.probe_profile import Choice, choose, like, main, nearest

pytest_plugins = ("tests.support.doubles.fixtures",)

TOOL = ROOT / "tools" / "probe_profile.py"
TAKEN = ("precision", "dialect", "channel_multiple", "memory_shared_with_system", "workload", "budget")


def command(*words: str | Path, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, env=environment
    )


def check_measured(profile: DeviceProfile, base: str) -> None:
    for name, figure in profile.hardware.items():
        assert figure.source.startswith("measured with "), name
        assert " on " in figure.source
    assert {name: getattr(profile, name) for name in TAKEN} == {
        name: getattr(load_profile(base), name) for name in TAKEN
    }
    assert f"of {base}" in profile.description
    assert profile.formats == {}  # shares of the figures of another device


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "WIDTH", 128)
    monkeypatch.setattr(probe, "SMALLEST_READ", 3 * 4 * 128**2)
    monkeypatch.setattr(probe, "LARGEST_READ", 3 * 4 * 128**2)


def test_the_processors_profile_is_complete(small: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "device.toml"
    assert main(["--output", str(output), "--engine", "onnxruntime", "--name", "mine"]) == 0
    profile = load_profile_file(output)
    check_measured(profile, "cpu")
    assert (profile.name, profile.engine, profile.sm) == ("mine", "onnxruntime", None)
    assert profile.hardware.keys() >= {"memory", "runtime_memory", "build_memory", "bandwidth", "fp32_compute"}
    text = output.read_text()
    assert text.startswith("# Hardware figures measured")
    assert "# From edgeprune's profile cpu: budget, workload" in text
    said = capsys.readouterr()
    assert f"{profile.bandwidth.value:.4g} GB/s" in said.out
    assert f"edgeprune fit MODEL --profile {output}" in said.out
    assert "asked for" in said.err
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
@pytest.mark.parametrize("busy", [True, False])
def test_a_busy_device_is_told_so(
    busy: bool, small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(probe, "BUSY", -1 if busy else 1e6)
    monkeypatch.setattr(probe, "SETTLED", 1e6)
    assert main(["--output", str(tmp_path / "device.toml"), "--engine", "onnxruntime"]) == 0
    assert ("The device was busy" in capsys.readouterr().out) == busy
    profile = load_profile_file(tmp_path / "device.toml")
    assert profile.bandwidth.confidence == profile.fp32_compute.confidence == ("low" if busy else "medium")


def test_a_file_is_replaced_by_force_alone(small: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "device.toml"
    output.write_text("mine")
    words = ["--output", str(output), "--engine", "onnxruntime"]
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main([*words, "--force"]) == 0
    assert load_profile_file(output).is_probed


BAD = {
    "target": (["--target", "jetson"], 2, "malformed target 'jetson'"),
    "nobody there": (["--target", "ssh://nobody@127.0.0.1:1"], 4, "refuses the connection"),
    "like": (["--like", "jetson-orinn"], 2, "Did you mean jetson-orin"),
    "no folder": (["--output", "{folder}/none/device.toml"], 2, "there is no folder"),
    "folder": (["--output", "{folder}"], 2, "is a folder"),
    "engine": (["--engine", "tensorrt-lite"], 2, "invalid choice"),
    "no output": (None, 2, "--output"),
}


@pytest.mark.parametrize(("words", "code", "reason"), BAD.values(), ids=BAD)
def test_bad_input_is_one_message(words: list[str] | None, code: int, reason: str, tmp_path: Path) -> None:
    output = ["--output", tmp_path / "device.toml"]
    given = [] if words is None else [*output, *(word.format(folder=tmp_path) for word in words)]
    result = command(TOOL, *given)
    assert (result.returncode, result.stdout) == (code, "")
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_profile.measure, "describe", interrupt)
    assert main(["--output", str(tmp_path / "device.toml")]) == 130
    assert not list(tmp_path.iterdir())


GPU = {"name": "Orin", "sm": 87, "memory": 65_000_000_000}
FOUND = {
    "machine": "NVIDIA Jetson AGX Orin Developer Kit",
    "processor": "ARMv8 Processor rev 1 (v8l), 12 threads",
    "modules": {"numpy": "1.26.4", "onnxruntime": None, "tensorrt": "10.3.0", "tensorrt_rtx": None},
    "gpu": GPU,
    "no_gpu": "",
}


def test_the_engine_is_the_one_that_the_device_has() -> None:
    orin = choose("auto", FOUND, "it")
    assert (orin.flavour, orin.device, orin.gpu) == ("tensorrt", FOUND["machine"], GPU)
    desktop = choose("auto", FOUND | {"machine": FOUND["processor"]}, "it")
    assert desktop.device == "Orin"
    modules = dict.fromkeys(FOUND["modules"], "1.0")
    processor = choose("onnxruntime", FOUND | {"modules": modules}, "it")
    assert (processor.flavour, processor.device, processor.gpu) == ("onnxruntime", FOUND["processor"], None)
    none = choose("auto", FOUND | {"modules": modules, "gpu": None, "no_gpu": "no NVIDIA GPU is found"}, "it")
    assert (none.flavour, none.reason) == ("onnxruntime", "no GPU can be used: no NVIDIA GPU is found")
    assert choose("tensorrt-rtx", FOUND | {"modules": modules}, "it").flavour == "tensorrt-rtx"


@pytest.mark.parametrize(
    ("asked", "change", "reason"),
    [
        ("onnxruntime", {}, "it has no Python module onnxruntime"),
        ("auto", {"gpu": None}, "it has no Python module onnxruntime"),
        ("tensorrt-rtx", {}, "it has no Python module tensorrt_rtx"),
        ("tensorrt", {"gpu": None, "no_gpu": "no NVIDIA GPU is found"}, "it: no NVIDIA GPU is found"),
        ("auto", {"modules": dict.fromkeys(FOUND["modules"])}, "it has no numpy"),
    ],
)
def test_what_the_device_misses_is_told(asked: str, change: dict, reason: str) -> None:
    with pytest.raises(EngineError, match=reason) as caught:
        choose(asked, FOUND | change, "it")
    assert "nstall" in caught.value.remedy


@pytest.mark.parametrize(
    ("device", "sm", "memory", "name"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit Super", 87, 7.9e9, "jetson-orin-nano-8gb-super"),
        ("NVIDIA Jetson Orin NX 16 GB", 87, 16.3e9, "jetson-orin-nx-16gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 87, 65e9, "jetson-agx-orin-64gb"),
        ("NVIDIA GeForce RTX 4090", 89, 25.4e9, "rtx-4090"),
        ("NVIDIA L4", 89, 23.6e9, "l4"),
        ("NVIDIA A100-SXM4-80GB", 80, 85e9, "a100-80gb"),
        ("NVIDIA GeForce RTX 3060", 86, 12.6e9, "rtx-a2000"),
        ("NVIDIA RTX PRO 6000 Blackwell", 120, 102e9, "rtx-5090"),
        ("Tesla T4", 75, 15.6e9, None),
    ],
)
def test_the_nearest_profile(device: str, sm: int, memory: float, name: str | None) -> None:
    profile, why = nearest(Choice("tensorrt", device, {"sm": sm, "memory": memory}, ""))
    if name is None:
        assert profile.sm == 80
        assert "no profile has SM 75" in why
    else:
        assert (profile.name, profile.sm) in {(name, sm), ("jetson-orin", sm)} if "AGX" in device else {(name, sm)}


def test_a_like_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="--like l4 is a profile of"):
        like("l4", Choice("onnxruntime", "a processor", None, ""))
    with pytest.raises(InputError, match="--like cpu is a profile of onnxruntime"):
        like("cpu", Choice("tensorrt", "a GPU", GPU, ""))


def test_on_a_double_of_a_gpu(
    gpu: Double,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """SM 89 with the full TensorRT: the nearest profile's is for RTX, whose dialect an old parser may not take."""
    gpu.sm, gpu.name = 89, "NVIDIA L4"
    monkeypatch.setattr(probe_profile, "ThisMachine", InProcess)
    output = tmp_path / "device.toml"
    assert main(["--output", str(output), "--like", "l4", "--engine", "tensorrt"]) == 0
    profile = load_profile_file(output)
    assert (profile.name, profile.engine, profile.sm, profile.dialect) == ("nvidia-l4", "tensorrt", 89, "primitive")
    assert profile.memory.si == gpu.memory
    check_measured(profile.model_copy(update={"dialect": load_profile("l4").dialect}), "l4")
    assert "The dialect is not opset24 but primitive" in output.read_text()


def test_on_a_double_that_tells_no_free_memory_the_file_names_what_is_not_measured(
    gpu: Double,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    gpu.memory = 2**30  # more than l4's runtime_memory
    monkeypatch.setattr(probe_tasks, "_free_bytes", lambda shared: None)
    monkeypatch.setattr(probe_profile, "ThisMachine", InProcess)
    output = tmp_path / "device.toml"
    assert main(["--output", str(output), "--like", "l4", "--engine", "tensorrt"]) == 0
    assert "measured by tools/probe_profile.py, but for runtime_memory of l4." in output.read_text()
    assert load_profile_file(output).runtime_memory == load_profile("l4").runtime_memory


def test_on_a_double_whose_figures_contradict_each_other(
    gpu: Double,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(probe_tasks, "_free_bytes", lambda shared: None)  # l4's runtime takes more than the double has
    monkeypatch.setattr(probe_profile, "ThisMachine", InProcess)
    assert main(["--output", str(tmp_path / "device.toml"), "--like", "l4", "--engine", "tensorrt"]) == 4
    assert "leave nothing of memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Over ssh


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    folder = tmp_path_factory.mktemp("device")
    with ssh_server(folder, bare_python(folder / "bare")) as running:
        yield running


@pytest.fixture(scope="module")
def probed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real tool at its real size, on the device."""
    output = tmp_path_factory.mktemp("probed") / "device.toml"
    result = command(TOOL, "--target", server.target, "--output", output, path=server.folder / "bin")
    assert result.returncode == 0, result.stderr
    assert f"--target {server.target}" in result.stdout
    return output


@pytest.mark.slow
def test_a_device_is_probed_over_ssh_and_nothing_stays_there(server: Server, probed: Path) -> None:
    profile = load_profile_file(probed)
    check_measured(profile, "cpu")
    assert 1e8 < profile.bandwidth.si < 1e13
    assert "MiB of weights times one row" in profile.bandwidth.source
    server.wait_until_quiet()
    assert not server.working_folders()
    kept = sum(path.stat().st_size for path in server.cache.rglob("*") if path.is_file())
    assert kept < 2**20  # graphs and the program; no weights were sent or kept


def test_a_device_without_the_engine_says_how_to_install_it(server: Server, tmp_path: Path) -> None:
    words = ("--target", server.target, "--output", tmp_path / "device.toml", "--engine", "tensorrt")
    result = command(TOOL, *words, path=server.folder / "bin")
    assert result.returncode == 4
    assert f"{server.target} has no Python module tensorrt" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_fit_takes_the_profile_for_its_device(server: Server, probed: Path, tmp_path: Path) -> None:
    save_llama(
        tmp_path / "model",
        num_hidden_layers=2,
        hidden_size=256,
        num_attention_heads=8,
        head_dim=32,
        intermediate_size=512,
    )
    lines = (f"{i} quick brown foxes jump over {i} lazy dogs, {i} times" for i in range(60))
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    result = run(
        "fit",
        tmp_path / "model",
        "--profile",
        probed,
        "--target",
        server.target,
        "--memory",
        "95%",
        "--calibration",
        tmp_path / "text.txt",
        "--output",
        tmp_path / "bundle",
        "--json",
        *SMALL,
        path=f"{server.folder / 'bin'}:{os.environ['PATH']}",
    )
    assert result.returncode == 0, result.stderr
    report = Report.model_validate_json(result.stdout)
    assert (report.status, report.rests_on) == ("met", "measured")
    assert load_profile_file(tmp_path / "bundle" / "profile.toml") == load_profile_file(probed)
