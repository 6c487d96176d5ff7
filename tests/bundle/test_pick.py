"""A bundle of rungs, and one of them as a bundle of its own: whole, true, and usable without what it came from."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from edgeprune.bundle.pick import pick
from edgeprune.cli.app import app
from edgeprune.commands.load_bundle import load_bundle
from edgeprune.errors import InputError
from edgeprune.model.load import load_model
from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.pipeline.request import FRONTIER_OPTIONS, request_of
from edgeprune.pipeline.run_file import read_run_file
from edgeprune.report.frontier import Frontier, frontier_of
from edgeprune.report.schema import Report
from tests.support.bundles import contents, copy_of, deployment, fitted
from tests.support.commands import run
from tests.support.doubles.steady_clock import steady_clock
from tests.support.durations import durations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frontier's bundle; the model that it was made of is gone. Whoever changes it, changes a copy."""
    home = tmp_path_factory.mktemp("ladder")
    source = fitted(tmp_path_factory).parent
    shutil.copytree(source / "model", home / "model")
    shutil.copyfile(source / "text.txt", home / "text.txt")
    with steady_clock():  # how many rungs a ladder has depends on what they are measured to take
        result = run(
            "frontier",
            home / "model",
            "--device",
            "cpu",
            "--rungs",
            "3",
            "--calibration",
            home / "text.txt",
            "--samples",
            "4",
            "--length",
            "32",
            "--prompt",
            "16",
            "--context",
            "64",
            "--method",
            "magnitude",
            "--output",
            home / "a ladder",
            "--json",
        )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((home / "a ladder" / "frontier.json").read_text())
    assert not (home / "a ladder.work").exists()
    shutil.rmtree(home / "model")
    return home / "a ladder"


@pytest.fixture(scope="module")
def picked(made: Path) -> Path:
    """Rung 1 of it, by the command line."""
    result = run("fit", "--from", made, "--pick", "1", "--output", made.parent / "picked one", "--json")
    assert result.returncode == 0, result.stderr
    bundle = made.parent / "picked one"
    assert Report.model_validate_json(result.stdout) == report_of(bundle)
    return bundle


def report_of(folder: Path) -> Report:
    return Report.model_validate_json((folder / "report.json").read_text())


def whole(bundle: Path) -> dict:
    """The manifest, after it was seen that it lists every file."""
    manifest = open_bundle(bundle)
    files = {name for name in contents(bundle) if not (bundle / name).is_symlink()}
    assert files == {*manifest["sha256"], "manifest.json"}
    assert all(sha256(bundle / name) == digest for name, digest in manifest["sha256"].items())
    return manifest


def test_a_frontiers_bundle_is_whole_and_chooses_nothing(made):
    manifest = whole(made)
    assert manifest["kind"] == "frontier"
    words = shlex.split(manifest["command"])
    assert words[:2] == ["edgeprune", "frontier"]
    assert words[words.index("--rungs") + 1] == "3"
    assert not {"--memory", "--decode", "--prefill"} & set(words)
    tops = {path.name for path in made.iterdir()}
    assert tops == {
        "frontier.json",
        "frontier.html",
        "README.md",
        "manifest.json",
        "profile.toml",
        "run.toml",
        "rungs",
        "tokenizer",
    }
    reports = [report_of(made / "rungs" / str(index)) for index in range(3)]
    shares = [float(report.budget[0].asked.removesuffix("%")) for report in reports]
    assert 100 > shares[0] > shares[1] > shares[2]
    assert not [choice for report in reports for choice in report.choices if choice.name == "budget"]
    assert Frontier.model_validate_json((made / "frontier.json").read_text()) == frontier_of(reports)
    for index, report in enumerate(reports):
        folder = made / "rungs" / str(index)
        assert {path.name for path in folder.iterdir()} == {
            "model",
            "onnx",
            "reference.npz",
            "report.json",
            "deployment.json",
            "moments.npz",
        }
        assert [step.command for step in report.deploy] == [f"edgeprune fit --from 'a ladder' --pick {index}"]
        assert report.command == manifest["command"]
        plan = deployment(folder)
        assert list(plan["limits"]) == ["decode"]
        assert report.budget[0].asked == plan["limits"]["decode"]["asked"].partition(" (")[0]
        assert len(plan["rungs"]) == 1
    assert set(read_run_file(made / "run.toml")) <= set(FRONTIER_OPTIONS)
    readme = (made / "README.md").read_text()
    assert "edgeprune fit --from 'a ladder' --pick K" in readme
    assert all(f"| {index} | " in readme for index in range(3))
    table = [line for line in readme.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table[:6]} == {8}
    assert "(measured)" in table[2]


def test_the_command_prints_the_table_or_the_document(made, monkeypatch):
    asked = []

    def frontier(progress, **options):
        asked.append(request_of(**options))
        return load_bundle(made)

    monkeypatch.setattr("edgeprune.commands.frontier.frontier", frontier)
    words = [
        "frontier",
        "model",
        "--device",
        "cpu",
        "--rungs",
        "3",
        "--seed",
        "7",
        "--evaluate",
        "a",
        "--evaluate",
        "b",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    request = asked[0]
    assert (request.model, request.device, request.rungs, request.seed) == ("model", "cpu", 3, 7)
    assert request.evaluate == (Path("a"), Path("b"))
    assert f"bundle  {made}\npage    {made / 'frontier.html'}\n" in result.stdout
    assert f"edgeprune fit --from '{made}' --pick K" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines() if line[:1].isdecimal()] == ["0", "1", "2"]
    document = CliRunner().invoke(app, ["frontier", "--device", "cpu", "--json"])
    assert json.loads(document.stdout) == json.loads((made / "frontier.json").read_text())
    assert asked[1].rungs == 6


@pytest.mark.parametrize("words", [("measure",), ("run", "--prompt", "hi")])
def test_what_needs_a_chosen_model_says_how_to_pick_one(made, words):
    before = contents(made)
    result = run(words[0], made, *words[1:])
    assert result.returncode == 2
    assert result.stdout == ""
    assert "holds 3 rungs to pick from, none is chosen yet" in result.stderr
    assert f"Pick one, K is 0 to 2: edgeprune fit --from '{made}' --pick K" in result.stderr
    assert contents(made) == before


def test_the_page_is_rendered_again_with_the_folders_name(made, tmp_path):
    copy = tmp_path / "renamed"
    shutil.copytree(made, copy)
    page = (copy / "frontier.html").read_text()
    assert "--from &#39;a ladder&#39; --pick 2" in page
    (copy / "frontier.html").write_text("lost")
    result = run("report", copy)
    assert (result.returncode, result.stdout.strip()) == (0, str(copy / "frontier.html")), result.stderr
    assert (copy / "frontier.html").read_text() == page.replace("&#39;a ladder&#39;", "renamed")
    whole(copy)
    (copy / "frontier.json").write_text("{}")
    result = run("report", copy)
    assert result.returncode == 2
    assert "cannot be read by this version" in result.stderr


def test_a_picked_bundle_is_an_ordinary_one(made, picked):
    manifest, original = whole(picked), open_bundle(made)
    assert "kind" not in manifest
    assert manifest["rung"] == 1
    assert {path.name for path in picked.iterdir()} == {
        "report.json",
        "report.html",
        "README.md",
        "manifest.json",
        "profile.toml",
        "run.toml",
        "deployment.json",
        "finish.pyz",
        "serve.pyz",
        "rungs",
        "tokenizer",
        "model",
        "onnx",
    }
    assert read_run_file(picked / "run.toml") == {"from": str(made.absolute()), "pick": 1}
    assert [path.name for path in (picked / "rungs").iterdir()] == ["0"]
    for name in original["sha256"]:
        if name.startswith("rungs/1/") and name.rsplit("/", 1)[1] not in ("report.json", "deployment.json"):
            assert manifest["sha256"][name.replace("rungs/1/", "rungs/0/")] == original["sha256"][name]
    assert deployment(picked) == deployment(made / "rungs" / "1")
    assert not list(made.parent.glob("*.work"))


def test_the_reports_figures_are_the_rungs_and_all_else_is_the_new_bundles(made, picked):
    report, own = report_of(picked), report_of(made / "rungs" / "1")
    changed = {"command", "deploy", "files", "choices"}
    assert report.model_dump(exclude=changed) == own.model_dump(exclude=changed)
    assert report.choices[-1].model_dump() == {"name": "rung", "value": "1", "reason": "picked from a ladder"}
    assert report.files == {
        name: (picked / name).stat().st_size
        for name in open_bundle(picked)["sha256"]
        if name not in ("report.json", "report.html")
    }
    assert [step.title for step in report.deploy] == ["Try it on this machine", "Load the checkpoint in Python"]
    assert report.deploy[0].command.startswith("edgeprune run 'picked one' --prompt ")
    assert report.deploy[1].command.endswith('from_pretrained("picked one/model")')
    for name in ("README.md", "report.html"):
        assert "edgeprune run" in (picked / name).read_text()
    assert (picked / "README.md").read_text().count("a ladder") == 0


def test_the_command_makes_the_frontier_and_picks_from_it(made, picked):
    first, second = report_of(picked).command.split(" && ")
    assert first == open_bundle(made)["command"]
    assert shlex.split(second) == [
        "edgeprune",
        "fit",
        "--from",
        str(made),
        "--pick",
        "1",
        "--output",
        str(made.parent / "picked one"),
    ]
    assert open_bundle(picked)["command"] == report_of(picked).command


def test_every_loader_takes_it(picked):
    """onnx refuses weights in a file of two names: the rung was copied, not linked."""
    from transformers import AutoModelForCausalLM

    assert all(path.stat().st_nlink == 1 for path in picked.rglob("*") if path.is_file())
    onnx.checker.check_model(str(picked / "onnx" / "model.onnx"))
    model = AutoModelForCausalLM.from_pretrained(picked / "model", local_files_only=True)
    assert load_model(str(picked / "model")).decoder.parameters == report_of(picked).fitted.parameters
    assert torch.isfinite(model(torch.zeros((1, 4), dtype=torch.int64)).logits).all()
    assert np.load(picked / "rungs/0/reference.npz").files
    assert torch.isfinite(model.get_input_embeddings().weight).all()


def test_it_is_measured_run_and_rendered_like_any_other(picked, tmp_path):
    bundle = copy_of(picked, tmp_path / "bundle", {"memory": 2.0**40})
    result = subprocess.run(
        [sys.executable, bundle / "finish.pyz", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=bundle,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | durations(),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["rungs"][0]["status"] == "met"
    whole(bundle)
    assert report_of(bundle).measurement.rung == 0
    result = run("measure", bundle)
    assert result.returncode == 0, result.stderr
    whole(bundle)
    said = run("run", bundle, "--prompt", "the quick", "--max-new-tokens", "4")
    assert said.returncode == 0, said.stderr
    assert run("report", bundle).returncode == 0
    whole(bundle)


def test_the_terminal_shows_the_rungs_report(made, tmp_path):
    result = run("fit", "--from", made, "--pick", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"bundle  {tmp_path / 'a ladder-pick2'}" in result.stdout
    met = report_of(made / "rungs" / "2").budget[0].status == "met"  # as this machine measured it
    assert (" fits into" if met else " does not fit into") in result.stdout
    assert deployment(tmp_path / "a ladder-pick2") == deployment(made / "rungs" / "2")


def test_a_rung_of_an_ordinary_bundle(tmp_path_factory, tmp_path):
    """What was measured on a device after the fit is not the rung's: it stays, and that is said."""
    source = copy_of(fitted(tmp_path_factory), tmp_path / "source", {"memory": 2.0**40})
    bundle = pick(source, 1, tmp_path / "first")
    whole(bundle)
    assert report_of(bundle).fitted == report_of(source / "rungs" / "1").fitted
    assert deployment(bundle) == deployment(source) | {"rungs": deployment(source)["rungs"][1:]}
    assert run("measure", source).returncode == 0
    result = run("fit", "--from", source, "--pick", "0", "--output", tmp_path / "second")
    assert result.returncode == 0, result.stderr
    assert "stays there: measure the new bundle" in " ".join(result.stderr.split())
    assert report_of(tmp_path / "second").measurement is None
    assert "measurement.json" not in whole(tmp_path / "second")["sha256"]
    again = run("fit", "--from", bundle, "--pick", "0", "--output", tmp_path / "third")
    assert again.returncode == 2
    assert "holds one rung" in again.stderr


def test_an_engine_is_taken_along_but_not_one_that_was_built_elsewhere_since(made, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(made, source)
    engine = Path("rungs/1/engine/model.sm89.engine")
    (source / engine).parent.mkdir()
    (source / engine).write_bytes(b"plan")
    add(source, str(engine))
    bundle = pick(source, 1, tmp_path / "first")
    assert (bundle / "engine" / engine.name).read_bytes() == b"plan"
    (source / "measurement.json").write_text("{}")
    add(source, "measurement.json")
    assert not list(pick(source, 1, tmp_path / "second").rglob("*.engine"))


def test_a_rung_with_a_vocabulary_of_its_own_brings_its_tokenizer(made, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(made, source)
    own = source / "rungs/1/tokenizer/tokenizer.json"
    own.parent.mkdir()
    own.write_text('{"of": "rung 1"}')
    add(source, "rungs/1/tokenizer/tokenizer.json")
    bundle = pick(source, 1, tmp_path / "first")
    assert [path.name for path in (bundle / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert (bundle / "tokenizer/tokenizer.json").read_text() == '{"of": "rung 1"}'
    assert not (bundle / "rungs/0/tokenizer").exists()
    whole(bundle)
    other = pick(source, 0, tmp_path / "second")
    assert {path.name: path.read_text() for path in (other / "tokenizer").iterdir()} == {
        path.name: path.read_text() for path in (source / "tokenizer").iterdir()
    }


def add(bundle: Path, name: str) -> None:
    """A file that is in the folder already, as if the bundle had been made with it."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["sha256"][name] = sha256(bundle / name)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_steps_for_a_device_name_the_new_bundle(made, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(made, source)
    name = "rungs/0/deployment.json"
    (source / name).write_text(json.dumps(deployment(source / "rungs/0") | {"engine": "tensorrt", "sm": 87}))
    add(source, name)
    report = report_of(pick(source, 0, tmp_path / "new one"))
    assert report.deploy[0].command.splitlines()[0] == "edgeprune measure 'new one' --target ssh://USER@DEVICE"
    rtx = report_of(source / "rungs/0").model_dump(mode="json")
    rtx["engine"]["name"] = "tensorrt-rtx"
    (source / "rungs/0/report.json").write_text(json.dumps(rtx))
    (source / name).write_text(json.dumps(deployment(source / "rungs/0") | {"engine": "tensorrt-rtx", "sm": 87}))
    report = report_of(pick(source, 0, tmp_path / "newer"))
    last = report.deploy[0].command.splitlines()[1]
    assert last == " && ".join(f"{step} --force" for step in report.command.split(" && "))


def copy_with(made: Path, target: Path, **parts: object) -> Path:
    """A copy of the bundle whose manifest says something else."""
    shutil.copytree(made, target)
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps(manifest | parts))
    return target


@pytest.mark.parametrize("command", ["edgeprune fit 'model", "edgeprune fit model --output", None])
def test_a_manifest_whose_command_is_not_whole(made, tmp_path, command):
    source = copy_with(made, tmp_path / "source", command=command)
    with pytest.raises(InputError, match="command is not"):
        pick(source, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", [(), ("rungs/0/reference.npz",)])
def test_a_manifest_that_does_not_list_the_rungs_graph(made, tmp_path, left):
    """The picked bundle would be one without a model."""
    hashes = json.loads((made / "manifest.json").read_text())["sha256"]
    source = copy_with(made, tmp_path / "source", sha256={name: hashes[name] for name in left})
    with pytest.raises(InputError, match="does not list the rung's graph rungs/0/onnx/") as error:
        pick(source, 0, tmp_path / "out")
    assert error.value.remedy.startswith("Copy the whole bundle again")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("rung", [3, -1])
def test_a_rung_that_is_not_there(made, tmp_path, rung):
    with pytest.raises(InputError, match=f"holds no rung {rung}") as error:
        pick(made, rung, tmp_path / "out")
    assert error.value.remedy == "Give --pick 0 to 2."
    assert not (tmp_path / "out").exists()


def test_the_bundle_that_is_read_is_never_written(made, tmp_path, monkeypatch):
    before = contents(made)
    (tmp_path / "link").symlink_to(made)
    for output in (made, made / "within", made.parent, tmp_path / "link"):
        with pytest.raises(InputError, match="Name another --output|is, holds or is in the bundle"):
            pick(made, 0, output, force=True)
    assert contents(made) == before


def test_what_is_there_already_is_replaced_by_force_alone(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(InputError, match="not empty"):
            pick(made, 0, tmp_path / "out", force)
    bundle = pick(made, 0, tmp_path / "other")
    with pytest.raises(InputError, match="not empty"):
        pick(made, 1, tmp_path / "other")
    assert open_bundle(pick(made, 1, tmp_path / "other", force=True))["rung"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    whole(bundle)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "report.json", "deployment.json"])
def test_a_damaged_bundle_leaves_nothing(made, tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(made, source)
    path = source / "rungs" / "0" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=name):
        pick(source, 0, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_told_and_leaves_nothing(made, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgeprune.bundle.pick.write_bundle", full)
    with pytest.raises(InputError, match="No space left"):
        pick(made, 0, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_shares_no_blocks(made, tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.copy_file_range", refused)
    whole(pick(made, 0, tmp_path / "out"))


def test_finish_is_that_of_this_version(picked):
    from edgeprune.engine.remote import program, service_program

    assert (picked / "finish.pyz").read_bytes() == program()
    assert (picked / "serve.pyz").read_bytes() == service_program()
