"""Bad input: one message with a remedy, exit code 2, nothing written, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import save_llama, save_uneven
from tests.support.commands import run, run_alone


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_llama(folder / "model", max_position_embeddings=4096)
    save_llama(folder / "mamba")
    config = folder / "mamba" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba"'))
    save_uneven(folder / "model", folder / "uneven")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"text\0more")
    (folder / "short.txt").write_text("a few words\n\n" * 300)
    (folder / "profile.toml").write_text("name = 3\n")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("years of work")
    return folder


CASES = {
    "unknown device": (["fit", "model", "--device", "jetson-orinn"], "jetson-orin"),
    "no device": (["fit", "model"], "--device"),
    "missing model": (["fit", "nowhere", "--device", "cpu"], "no such model"),
    "unsupported model": (["fit", "mamba", "--device", "jetson-orin"], "unsupported architecture 'mamba'"),
    "a model of different layers": (["fit", "uneven", "--device", "jetson-orin"], "differ in width"),
    "different layers to compare": (["compare", "uneven", "--calibration", "short.txt"], "differ in width"),
    "missing text": (["fit", "model", "--device", "jetson-orin", "--calibration", "none.txt"], "none.txt"),
    "empty text": (["fit", "model", "--device", "jetson-orin", "--calibration", "empty.txt"], "holds no text"),
    "binary text": (["fit", "model", "--device", "jetson-orin", "--calibration", "binary.txt"], "binary"),
    "too little text": (
        ["fit", "model", "--device", "jetson-orin", "--calibration", "short.txt", "--samples", "99"],
        "are missing",
    ),
    "malformed size": (["fit", "model", "--device", "jetson-orin", "--memory", "lots"], "malformed size"),
    "malformed latency": (["fit", "model", "--device", "jetson-orin", "--decode", "10"], "malformed latency"),
    "a budget above the dense model": (["fit", "model", "--device", "jetson-orin", "--decode", "120%"], "100"),
    "unreadable profile": (["fit", "model", "--profile", "profile.toml"], "profile.toml"),
    "missing profile": (["fit", "model", "--profile", "none.toml"], "none.toml"),
    "full output": (["fit", "model", "--device", "jetson-orin", "--output", "full"], "not empty"),
    "forced full output": (["fit", "model", "--device", "jetson-orin", "--output", "full", "--force"], "not a bundle"),
    "no tensorrt": (["fit", "model", "--device", "jetson-orin", "--engine", "tensorrt"], "edgeprune[tensorrt]"),
    "another engine": (["fit", "model", "--device", "jetson-orin", "--engine", "onnxruntime"], "runs tensorrt"),
    "unknown engine": (["fit", "model", "--device", "jetson-orin", "--engine", "steam"], "unknown engine"),
    "unknown method": (["fit", "model", "--device", "jetson-orin", "--method", "magic"], "unknown method"),
    "a method of compare": (["fit", "model", "--device", "jetson-orin", "--method", "flap"], "--method flap+ls"),
    "samples beyond the model": (["fit", "model", "--device", "jetson-orin", "--length", "9999"], "positions"),
    "unknown precision": (["fit", "model", "--device", "jetson-orin", "--precision", "int1"], "precision"),
    "a target that is no address": (
        ["fit", "model", "--device", "jetson-orin", "--target", "orin"],
        "malformed target",
    ),
    "a target with an option in it": (
        ["fit", "model", "--device", "jetson-orin", "--target", "ssh://-oProxyCommand=touch%20x"],
        "malformed target",
    ),
    "a target with a password": (
        ["fit", "model", "--device", "jetson-orin", "--target", "ssh://me:secret@orin"],
        "password",
    ),
    "keep what is not there": (["fit", "model", "--device", "jetson-orin", "--keep-remote"], "--target"),
    "no rungs": (["fit", "model", "--device", "jetson-orin", "--rungs", "0"], "--rungs"),
    "a processor's profile for another machine": (
        ["fit", "model", "--device", "cpu", "--target", "ssh://me@orin"],
        "probe_profile.py",
    ),
    "measure what is no bundle": (["measure", "full"], "not a bundle"),
    "no samples": (["fit", "model", "--device", "jetson-orin", "--samples", "0"], "--samples"),
    "context beyond the model": (["fit", "model", "--device", "jetson-orin", "--context", "9999"], "positions"),
    "prompt beyond the context": (
        ["fit", "model", "--device", "jetson-orin", "--prompt", "64", "--context", "64"],
        "no room",
    ),
    "pick from what is no bundle": (["fit", "--from", "full", "--pick", "0"], "not a bundle"),
    "pick nothing": (["fit", "--from", "full"], "--from and --pick go together"),
    "pick from nothing": (["fit", "--pick", "2"], "--from and --pick go together"),
    "pick, and a model": (["fit", "model", "--from", "full", "--pick", "0"], "MODEL with --from"),
    "pick, and a budget": (
        ["fit", "--from", "full", "--pick", "0", "--device", "cpu", "--decode", "70%"],
        "--decode, --device with",
    ),
    "pick, and the default of an option": (["fit", "--from", "full", "--pick", "0", "--seed", "0"], "--seed with"),
    "pick by name": (["fit", "--from", "full", "--pick", "small"], "--pick"),
    "a frontier without a device": (["frontier", "model"], "--device"),
    "a frontier of one": (["frontier", "model", "--device", "jetson-orin", "--rungs", "1"], "--rungs"),
    "a frontier has no budget": (["frontier", "model", "--device", "jetson-orin", "--decode", "70%"], "--decode"),
    "a frontier into a full folder": (
        ["frontier", "model", "--device", "jetson-orin", "--output", "full"],
        "not empty",
    ),
    "no bundle": (["run", "full", "--prompt", "hi"], "is not a bundle"),
    "no bundle to render": (["report", "full"], "is not a bundle"),
    "unknown option": (["fit", "model", "--devise", "cpu"], "--devise"),
    "malformed ratios": (["compare", "model", "--ratios", "a", "--calibration", "short.txt"], "malformed ratios"),
    "ratio out of range": (["compare", "model", "--ratios", "100", "--calibration", "short.txt"], "between 0 and 100"),
    "unknown layout": (["compare", "model", "--calibration", "short.txt", "--layout", "diagonal"], "unknown layout"),
    "no samples to compare on": (["compare", "model", "--calibration", "short.txt", "--samples", "0"], "--samples"),
    "a page in no folder": (
        ["compare", "model", "--calibration", "short.txt", "--html", "nowhere/x.html"],
        "no folder",
    ),
    "unknown device to show": (["devices", "toaster"], "unknown device"),
    "a log that cannot be written": (["--log-file", "nowhere/x.log", "doctor"], "cannot write the log"),
}


ALONE = ("unknown device", "unsupported model", "unknown option")  # in a process of their own too


@pytest.mark.parametrize(
    ("words", "reason", "command"),
    [(*case, run) for case in CASES.values()] + [(*CASES[name], run_alone) for name in ALONE],
    ids=[*CASES, *(f"{name}, in a process" for name in ALONE)],
)
def test_bad_input_is_one_message_with_a_remedy(home, words, reason, command):
    before = sorted(home.rglob("*"))
    result = command(*words, cwd=home)
    assert result.returncode == 2, result.stderr
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(home.rglob("*")) == before, "something was written"


def test_a_budget_below_the_floor_is_refused_at_once(home):
    before = sorted(home.rglob("*"))
    result = run("fit", "model", "--device", "jetson-orin", "--memory", "1MiB", cwd=home)
    assert result.returncode == 3
    for word in ("below the floor", "weights", "cache", "runtime", "embedding", "Try --memory"):
        assert word in result.stderr
    assert sorted(home.rglob("*")) == before


def test_help_and_lists(home):
    for words in (
        ["--help"],
        ["fit", "--help"],
        ["devices"],
        ["devices", "jetson-orin"],
        ["devices", "--json"],
        ["doctor"],
    ):
        result = run(*words, cwd=home)
        assert result.returncode == 0, result.stderr
        assert result.stdout
    assert "confidence" in run("devices", "jetson-orin", cwd=home).stdout
