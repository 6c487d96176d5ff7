"""The bundle of a real run: whole, its files those of the run, its documents about each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgeprune.bundle.deployment import deployment
from edgeprune.bundle.read import read_frontier, read_report
from edgeprune.bundle.write import tokenizer_folder, write_fitted, write_frontier
from edgeprune.model.load import load_model
from edgeprune.ondevice.budget import Budget, Limit
from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.pipeline.results import Fitted
from edgeprune.pipeline.run_file import read_run_file
from tests.support.bundles import contents
from tests.support.runs import finished, journal_of

COMMAND = "edgeprune fit demo --device jetson-orin"


@pytest.fixture
def fitted(tmp_path_factory, tmp_path) -> Fitted:
    """To be written into the test's own folder."""
    of = finished(tmp_path_factory).fitted
    return replace(of, setup=replace(of.setup, output=tmp_path / "a bundle"))


def whole(bundle: Path) -> dict:
    """The manifest, after it was seen that it lists every file."""
    manifest = open_bundle(bundle)
    assert {name: sha256(bundle / name) for name in manifest["sha256"]} == manifest["sha256"]
    files = {name for name in contents(bundle) if not (bundle / name).is_symlink()}
    assert files == {*manifest["sha256"], "manifest.json"}
    return manifest


def test_a_fitted_bundle_needs_nothing_of_the_run(fitted, tmp_path):
    write_fitted([fitted], journal_of(tmp_path / "work"), COMMAND)
    bundle = tmp_path / "a bundle"
    manifest = whole(bundle)
    assert {path.name for path in bundle.iterdir()} == {
        "README.md",
        "deployment.json",
        "finish.pyz",
        "manifest.json",
        "model",
        "onnx",
        "profile.toml",
        "report.html",
        "report.json",
        "run.toml",
        "rungs",
        "serve.pyz",
        "tokenizer",
    }
    report = read_report(bundle)
    assert report.fitted.parameters == fitted.chosen.model.decoder.parameters
    assert report.files == {
        name: (bundle / name).stat().st_size for name in manifest["sha256"] if not name.startswith("report.")
    }
    assert report.command == manifest["command"]
    assert json.loads((bundle / "deployment.json").read_text()) == deployment([fitted])
    assert read_run_file(bundle / "run.toml")["memory"] == "90%"
    assert f"\n{report.headline}\n" in (bundle / "README.md").read_text()
    model = load_model(str(bundle / "model"))
    assert model.decoder == fitted.chosen.model.decoder
    name = "layers.0.mlp.down"
    assert torch.equal(model.weights[name], fitted.chosen.model.weights[name])


def test_smaller_rungs_stand_behind_the_chosen_one(fitted, tmp_path):
    dense = replace(fitted.chosen, model=fitted.setup.model, target=fitted.setup.model.decoder, records=())
    write_fitted([fitted, replace(fitted, chosen=dense)], journal_of(tmp_path / "work"), COMMAND)
    bundle = tmp_path / "a bundle"
    whole(bundle)
    assert (bundle / "model").readlink() == Path("rungs/0/model")
    assert len(json.loads((bundle / "deployment.json").read_text())["rungs"]) == 2
    assert read_report(bundle / "rungs" / "1").fitted.parameters == dense.model.decoder.parameters
    stored = load_file(bundle / "rungs" / "1" / "model" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) >= dense.model.decoder.parameters


def test_a_bundle_without_a_checkpoint(fitted, tmp_path):
    request = replace(fitted.setup.request, checkpoint=False)
    write_fitted(
        [replace(fitted, setup=replace(fitted.setup, request=request))], journal_of(tmp_path / "work"), COMMAND
    )
    bundle = tmp_path / "a bundle"
    whole(bundle)
    assert not (bundle / "model").exists()
    assert not [step for step in read_report(bundle).deploy if "from_pretrained" in step.command]


def test_a_ladders_bundle_chooses_nothing_and_says_how_to_pick(fitted, tmp_path):
    budgets = [Budget(decode=Limit(share, True, f"{100 * share:g}%")) for share in (0.9, 0.8)]
    trials = tuple(replace(trial, predicted={"decode": 1.0}) for trial in fitted.outcome.trials)
    searched = replace(fitted, outcome=replace(fitted.outcome, trials=trials))
    rungs = [replace(searched, setup=replace(fitted.setup, budget=budget)) for budget in budgets]
    write_frontier(rungs, journal_of(tmp_path / "work"), COMMAND)
    bundle = tmp_path / "a bundle"
    assert whole(bundle)["kind"] == "frontier"
    assert {"model", "onnx", "finish.pyz", "report.json"}.isdisjoint(path.name for path in bundle.iterdir())
    frontier = read_frontier(bundle)
    assert [rung.asked for rung in frontier.rungs] == ["decode 90%", "decode 80%"]
    for index, rung in enumerate(rungs):
        folder = bundle / "rungs" / str(index)
        (step,) = read_report(folder).deploy
        assert step.command == f"edgeprune fit --from 'a bundle' --pick {index}"
        assert json.loads((folder / "deployment.json").read_text()) == deployment([rung])


def test_the_tokenizer_is_the_dense_models_where_the_vocabulary_is(fitted):
    assert tokenizer_folder(fitted) == fitted.setup.model.directory
