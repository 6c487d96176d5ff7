"""`doctor --target` and `doctor --deep` on the real command line. Behind a real sshd on loopback are ONNX Runtime on a
processor, and doubles of TensorRT and a GPU: no GPU runs in these tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgeprune.engine.checkup import GPU_DIALECTS
from edgeprune.profiles import load_profile, with_tensorrt
from tests.support.commands import run
from tests.support.device import Server, bare_python, script, ssh_server
from tests.support.device_doubles import attentive_nvidia_smi, python_with_doubles
from tests.support.durations import durations
from tests.support.lying_device import JETSON, LyingBoard, shorten
from tests.support.small_disks import SmallDisk, can_mount

pytestmark = pytest.mark.slow

NEW = "10.16.1"
CLOCKED = """
import atexit
from pathlib import Path
DEVICE.takes_time, DEVICE.memory, DEVICE.ledger = True, 2**29, Path({ledger!r})
atexit.register(DEVICE.ledger.write_text, "0")
"""
WRONG = """
import onnxruntime
right = onnxruntime.InferenceSession.run
def wrong(session, names, *rest):
    return [-value if name == "logits" else value for name, value in zip(names, right(session, names, *rest))]
onnxruntime.InferenceSession.run = wrong
"""
HUNG = "import time\nDEVICE.begin_capture = lambda *_: time.sleep(600)\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("device")
    with ssh_server(folder, bare_python(folder / "venv")) as running:
        yield running


def path_of(server: Server) -> str:
    return f"{server.folder}/bin:{os.environ['PATH']}"


def checked(code: int, *words: str | Path, path: str | None = None) -> dict[str, dict[str, Any]]:
    """The checks by name, of a command that ends with this exit code."""
    result = run("doctor", *words, "--json", path=path)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    document = json.loads(result.stdout)
    checks = {check["name"]: check for check in document["checks"]}
    assert len(checks) == len(document["checks"])
    for check in checks.values():
        assert check["detail"]
        assert bool(check["remedy"]) == (check["state"] == "failed"), check
    counts = [sum(one["state"] == state for one in checks.values()) for state in ("passed", "failed", "not applicable")]
    assert [document[name] for name in ("passed", "failed", "not_applicable")] == counts
    assert code == bool(document["failed"])
    return checks


def names(checks: dict[str, dict[str, Any]], state: str) -> set[str]:
    return {name for name, check in checks.items() if check["state"] == state}


def failed(checks: dict[str, dict[str, Any]], name: str, *words: str) -> None:
    """The check failed, with these words in its detail or remedy."""
    assert checks[name]["state"] == "failed", checks[name]
    told = f"{checks[name]['detail']} {checks[name]['remedy']}"
    assert all(word in told for word in words), told


def test_this_machine_passes() -> None:
    checks = checked(0, "--deep")
    assert names(checks, "passed") >= {
        "device",
        "numpy",
        "onnxruntime",
        *(f"logits onnxruntime {form}" for form in ("float", "int8", "int4-32-asymmetric")),
        "cache in place",
        "clock",
        "memory accounting",
        "disk",
        "memory",
    }
    assert checks["graph capture"]["state"] == "not applicable"


def test_a_processor_behind_ssh_passes_as_a_table_too(server: Server) -> None:
    result = run("doctor", "--target", server.target, path=path_of(server))
    assert result.returncode == 0, result.stdout + result.stderr
    assert server.target in result.stdout
    assert "0 failed" not in result.stdout
    assert "passed, " in result.stdout.splitlines()[-1]
    checks = checked(0, "--target", server.target, path=path_of(server))
    assert "MiB needed for the checks" in checks["disk"]["detail"]
    server.wait_until_quiet()


def test_what_is_sent_for_a_report_has_no_users_name(server: Server) -> None:
    user = server.target.removeprefix("ssh://").partition("@")[0]
    with server.login("PATH=/nothing"):
        result = run("doctor", "--target", server.target, "--json", path=path_of(server))
    assert json.loads(result.stdout)["where"] == server.target.replace(f"{user}@", "")
    assert f"{user}@" not in result.stdout
    assert "/root" not in result.stdout


def test_a_host_that_is_not_reached_is_one_failure() -> None:
    checks = checked(1, "--target", "ssh://127.0.0.1:1")
    failed(checks, "device", "refuses the connection", "sshd runs there")
    assert names(checks, "failed") == {"device"}


@pytest.mark.parametrize("packages", [(), ("numpy",)], ids=["no numpy", "no onnxruntime"])
def test_a_missing_module_is_named_and_hides_nothing_else(
    server: Server, tmp_path: Path, packages: tuple[str, ...]
) -> None:
    missing = "onnxruntime" if packages else "numpy"
    script(tmp_path / "python3", f'exec "{bare_python(tmp_path / "venv", packages)}" "$@"')
    with server.login(f"PATH={tmp_path}:$PATH"):
        checks = checked(1, "--target", server.target, path=path_of(server))
    failed(checks, missing, "cannot be imported", f"pip install {missing}")
    assert checks["logits onnxruntime float"]["detail"].startswith("it needs ")
    assert {"device", "disk", "memory"} <= names(checks, "passed")


def test_no_python_is_named(server: Server) -> None:
    with server.login("PATH=/nothing"):
        checks = checked(1, "--target", server.target, path=path_of(server))
    failed(checks, "device", "has no python3", "Install Python 3.10")


def test_too_little_memory_and_disk_for_a_model(server: Server, tmp_path: Path) -> None:
    checks = checked(1, "--target", server.target, "--model", "900TB", path=path_of(server))
    failed(checks, "memory", "needed to run a model of", "--memory")
    failed(checks, "disk", "needed for a model of", "Free some space")
    assert names(checks, "failed") == {"memory", "disk"}
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    checks = checked(0, "--deep", "--model", tmp_path / "config.json")
    assert "needed to run" in checks["memory"]["detail"]


@pytest.mark.skipif(not can_mount(), reason="mounting a small disk takes root")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "device").mkdir()
    with ssh_server(tmp_path / "device", bare_python(tmp_path / "venv")) as small:
        disk = SmallDisk(small.cache, 2**21)
        try:
            checks = checked(1, "--target", small.target, path=path_of(small))
        finally:
            disk.close()
    failed(checks, "disk", "needed for the checks", "Free some space")
    failed(checks, "logits onnxruntime float", "the device's disk is full")
    assert {"device", "numpy", "memory"} <= names(checks, "passed")


@contextmanager
def board(folder: Path, more: str = "", **settings: Any) -> Iterator[Server]:
    """A double of a GPU behind a real sshd."""
    folder.mkdir()
    ledger = folder / "ledger"
    python = python_with_doubles(folder / "venv", more=CLOCKED.format(ledger=str(ledger)) + more, **settings)
    (folder / "device").mkdir()
    with ssh_server(folder / "device", python) as running:
        attentive_nvidia_smi(running.folder / "device-bin", ledger)
        yield running


def test_a_double_of_a_board_passes_in_every_dialect_and_format(tmp_path: Path) -> None:
    with board(tmp_path / "board", version=NEW) as there:
        checks = checked(0, "--target", there.target, path=path_of(there))
        there.wait_until_quiet()
    assert "of SM 87 with the nearest memory" in checks["profile"]["detail"]
    own = with_tensorrt(load_profile("jetson-orin"), NEW).dialect
    pairs = [(own, form) for form in ("float", "int8", "int4-32", "int4-64", "int4-128", "int4-offset")]
    pairs += [(dialect, form) for dialect in GPU_DIALECTS for form in ("float", "int8")]
    assert len(GPU_DIALECTS) > 1
    for dialect, form in pairs:
        assert {f"build {dialect} {form}", f"logits {dialect} {form}"} <= names(checks, "passed")
    assert {"graph capture", "clock", "memory accounting", "power and clocks", "temperatures"} <= names(
        checks, "passed"
    )
    assert "47 degrees" in checks["temperatures"]["detail"]


def test_a_double_of_an_older_release_has_fewer_dialects(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    words = ("--device", "jetson-orin-nano-4gb", "--model", tmp_path / "config.json")
    with board(tmp_path / "board", version="10.3.0") as there:
        checks = checked(1, "--target", there.target, *words, path=path_of(there))
    failed(checks, "memory to build", "needs about", "estimated", "the device has", "add swap")
    assert "memory to build" in names(checks, "failed") <= {"memory to build", "memory", "disk"}
    assert {"logits primitive float", "logits primitive int8"} <= names(checks, "passed")
    assert "TensorRT 10.3.0 does not know opset23" in checks["build opset23 float"]["detail"]
    assert "int4-64, which takes 10.15" in checks["build primitive int4-64"]["detail"]


def test_a_double_of_a_release_that_is_too_old(tmp_path: Path) -> None:
    with board(tmp_path / "board", version="8.6.1") as there:
        checks = checked(1, "--target", there.target, path=path_of(there))
    failed(checks, "tensorrt", "8.6.1 is older than 10.3", "JetPack")


def test_a_double_that_computes_something_else(tmp_path: Path) -> None:
    with board(tmp_path / "board", more=WRONG) as there:
        checks = checked(1, "--target", there.target, path=path_of(there))
    failed(checks, "logits primitive float", "computes something else than its graph", "Do not deploy it")
    assert {"build primitive float", "clock", "graph capture"} <= names(checks, "passed")
    assert all(name.startswith("logits ") for name in names(checks, "failed"))


def test_a_double_of_another_gpu_and_of_none(tmp_path: Path) -> None:
    with board(tmp_path / "other", sm=89) as there:
        checks = checked(1, "--target", there.target, "--device", "jetson-orin", path=path_of(there))
    failed(checks, "GPU", "is of SM 89, the profile jetson-orin of SM 87", "edgeprune devices")
    assert names(checks, "failed") == {"GPU"}
    with board(tmp_path / "none", more="DEVICE.count = 0\n") as there:
        checks = checked(1, "--target", there.target, "--device", "jetson-orin", path=path_of(there))
    failed(checks, "GPU", "no CUDA module works here", "NO_DEVICE", "Check the driver")
    assert names(checks, "failed") == {"GPU"}
    assert "there is no GPU" in checks["build primitive float"]["detail"]


def test_a_double_that_refuses_a_graph_capture(tmp_path: Path) -> None:
    with board(tmp_path / "board", more="DEVICE.capturable = False\n") as there:
        checks = checked(1, "--target", there.target, path=path_of(there))
    failed(checks, "graph capture", "refuses to capture a step", "Update TensorRT")
    assert names(checks, "failed") == {"graph capture"}


def test_a_double_that_hangs_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in durations(check_seconds=15.0).items():
        monkeypatch.setenv(name, value)
    with board(tmp_path / "board", more=HUNG) as there:
        checks = checked(1, "--target", there.target, path=path_of(there))
        there.wait_until_quiet()
    failed(checks, "graph capture", "did not end within 15 s")
    assert names(checks, "failed") == {"graph capture"}


def test_a_double_whose_memory_is_full_or_not_seen(tmp_path: Path) -> None:
    with board(tmp_path / "full", more="DEVICE.memory = 2**26\n") as there:
        checks = checked(1, "--target", there.target, path=path_of(there))
    failed(checks, "memory accounting", "the GPU has no 128 MiB left", "Close what else uses the GPU")
    assert names(checks, "failed") == {"memory accounting"}
    with board(tmp_path / "unseen", more="DEVICE.ledger = None\n") as there:
        checks = checked(1, "--target", there.target, path=path_of(there))
    failed(checks, "memory accounting", "the device lost 0 B", "too low")


def test_a_device_that_answers_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    there = LyingBoard(tmp_path / "board")
    there.follow({"answers": JETSON | {"describe": {"machine": "a board"}}, "lies": {}})
    checks = checked(1, "--target", there.target, path=there.path)
    failed(checks, "device", "answers what cannot be")
    assert names(checks, "failed") == {"device"}
    answers = JETSON | {"check": {"cosine": 5.0, "error": -1, "equal": 2, "positions": 0}, "build": {"version": "x"}}
    answers |= dict.fromkeys(("state", "clock", "capture", "memory"), {"free": "much"})
    there.follow({"answers": answers, "lies": {}})
    checks = checked(1, "--target", there.target, path=there.path)
    failed(checks, "build primitive float", "answers what cannot be")
    failed(checks, "disk", "answers what cannot be")
    assert {"device", "numpy", "tensorrt", "GPU"} <= names(checks, "passed")


@pytest.mark.parametrize("words", [("--device", "cpu"), ("--profile", "x.toml"), ("--model", "6GiB")])
def test_options_of_a_check_alone_are_refused(words: tuple[str, str]) -> None:
    result = run("doctor", *words)
    assert result.returncode == 2
    assert "--deep" in result.stderr


def test_bad_arguments_are_bad_input() -> None:
    for words in (("--target", "orin"), ("--deep", "--device", "toaster"), ("--deep", "--model", "6 apples")):
        result = run("doctor", *words)
        assert result.returncode == 2, words
        assert result.stdout == ""
