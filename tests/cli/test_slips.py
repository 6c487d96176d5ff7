"""Slips on the command line: each is answered with what was meant, exit code 2, before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.checkpoints import save_llama
from tests.support.commands import run
from tests.support.sample_reports import measured_content, report_of
from tests.support.small_bundles import write_report

ON_ORIN = ("--device", "jetson-orin", "--context", "64")
ORINS = (
    "jetson-agx-orin-32gb",
    "jetson-agx-orin-64gb",
    "jetson-orin-nano-4gb-super",
    "jetson-orin-nano-8gb",
    "jetson-orin-nx-16gb-super",
    "jetson-orin-nx-8gb",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model and a bundle of it, with a checkpoint in it."""
    folder = tmp_path_factory.mktemp("home")
    save_llama(folder / "my-model")
    (folder / "text.txt").write_text("a few words\n\n" * 300)
    bundle = write_report(folder / "bundle", report_of(measured_content()))
    (bundle / "finish.pyz").write_bytes(b"")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"engine": "onnxruntime"}))
    save_llama(bundle / "model")
    return folder


# The line, and what the answer must hold: what is wrong, and the words to give instead.
SLIPS = {
    "options before the command": (
        ["--device", "cpu", "--memory", "90%", "fit", "my-model"],
        ["Options go after `fit`: edgeprune fit my-model --device cpu --memory 90%\n"],
    ),
    "an option and no command": (["--device", "cpu", "my-model"], ["edgeprune fit --device cpu my-model\n"]),
    "edgeprune's own option stays": (["-v", "--json", "doctor"], ["edgeprune -v doctor --json\n"]),
    "a size without a unit": (["fit", "my-model", *ON_ORIN, "--memory", "6"], ["no unit", "6GiB", "6GB"]),
    "a size without a unit, and a device to probe": (
        ["fit", "my-model", "--device", "cpu", "--memory", "6"],
        ["6GiB", "6GB"],
    ),
    "half a unit": (["fit", "my-model", *ON_ORIN, "--memory", "6G"], ["6GiB", "6GB", "1073741824"]),
    "half a small unit": (["fit", "my-model", *ON_ORIN, "--memory", "900m"], ["900MiB", "900MB"]),
    "a latency without a unit": (["fit", "my-model", *ON_ORIN, "--decode", "10"], ["no unit", "10ms or 10s"]),
    "any Orin": (["fit", "my-model", "--device", "orin"], ["any of 11", *ORINS, "Orin NX 8 GB, super mode"]),
    "a latency of what": (
        ["fit", "my-model", "--device", "jetson-orin", "--latency", "25ms"],
        ["--decode", "--prefill", "edgeprune fit my-model --device jetson-orin --decode 25ms\n"],
    ),
    "a bundle for a model": (["fit", "bundle", *ON_ORIN], ["bundle is a bundle", "bundle/model\n"]),
    "a bundle to plan": (["plan", "bundle"], ["bundle is a bundle", "bundle/model\n"]),
    "a model for a bundle": (["measure", "my-model"], ["my-model is a model", "edgeprune fit my-model --device NAME"]),
    "the demo for a bundle": (["run", "demo", "--prompt", "hi"], ["demo is a model", "edgeprune fit demo"]),
    "the model in a bundle": (["run", "bundle/model", "--prompt", "hi"], ["part of the bundle", ": bundle\n"]),
    "a text without its option": (
        ["run", "bundle", "What is edge computing?"],
        ["edgeprune run bundle --prompt 'What is edge computing?'\n"],
    ),
    "a text without quotes": (["run", "bundle", "--prompt", "What", "is"], ["edgeprune run bundle --prompt 'What is'"]),
    "no text": (["run", "bundle"], ["language model", "edgeprune run bundle --prompt '"]),
    "the file of weights": (
        ["fit", "my-model/model.safetensors", *ON_ORIN],
        ["holds weights alone", "directory: my-model\n"],
    ),
    "the file of a configuration": (["fit", "my-model/config.json", *ON_ORIN], ["directory: my-model\n"]),
    "a model and no command": (
        ["./my-model", "--device", "cpu"],
        ["no command './my-model'", "edgeprune fit ./my-model --device cpu\n"],
    ),
    "another word for fit": (["prune", "my-model"], ["no command 'prune'", "edgeprune fit my-model --device NAME"]),
    "an address without ssh": (
        ["fit", "my-model", *ON_ORIN, "--target", "me@orin"],
        ["Write --target ssh://me@orin\n"],
    ),
}


@pytest.mark.parametrize(("words", "answer"), SLIPS.values(), ids=SLIPS)
def test_a_slip_is_answered_with_what_was_meant(home, monkeypatch, words, answer):
    monkeypatch.setattr("edgeprune.engine.probe.measure", lambda *given: pytest.fail("something was measured"))
    before = sorted(home.rglob("*"))
    result = run(*words, cwd=home)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    for part in answer:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert sorted(home.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "~/my-model", "--device", "cpu", "--profile", "~/none.toml"),
        ("fit", "~/my-model", *ON_ORIN, "--calibration", "~/none.txt"),
        ("fit", "~/my-model", *ON_ORIN, "--evaluate", "~/none.txt"),
        ("fit", "--from", "~/none", "--pick", "0"),
        ("fit", "--config", "~/none.toml"),
        ("run", "~/none", "--prompt", "hi"),
        ("compare", "~/my-model", "--calibration", "~/text.txt", "--html", "~/none/page.html"),
        ("--log-file", "~/none/x.log", "doctor"),
    ],
    ids=" ".join,
)
def test_a_tilde_that_no_shell_replaced_is_the_home(home, monkeypatch, words):
    """All of these are missing at home, so that each answer names the place that was looked at."""
    monkeypatch.setenv("HOME", str(home))
    result = run(*words, cwd="/")
    assert result.returncode == 2
    assert f"{home}{os.sep}none" in result.stderr


def test_a_device_has_its_name_in_any_case(home):
    for name in ("jetson-orin", "Jetson-Orin", "JETSON-ORIN"):
        result = run("plan", "my-model", "--device", name, cwd=home)
        assert result.returncode == 0, result.stderr
        assert "on jetson-orin:" in result.stdout


@pytest.mark.parametrize("loss", ["10", "10%", "10 %"])
def test_a_percentage_has_its_sign_or_none(home, loss):
    """It is understood: the answer is about the memory, of which no device has so little."""
    result = run("fit", "my-model", *ON_ORIN, "--max-quality-loss", loss, "--memory", "1MiB", cwd=home)
    assert result.returncode == 3
    assert "below the floor" in result.stderr


def test_ratios_have_their_sign_or_none(home):
    result = run("compare", "my-model", "--ratios", "20%,100%", "--calibration", "text.txt", cwd=home)
    assert result.returncode == 2
    assert "the ratio 100 is not between 0 and 100 percent" in result.stderr
