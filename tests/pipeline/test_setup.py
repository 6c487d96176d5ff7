"""A request resolved before any long work: what is chosen, what is refused, what makes two runs the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.engine.estimate import estimate_performance
from edgeprune.errors import BudgetError, InputError
from edgeprune.ondevice.figures import Workload
from edgeprune.pipeline.flow import planner_of, search_budget, smaller_candidates, working
from edgeprune.pipeline.kind import Images, Language
from edgeprune.pipeline.room import SLACK_BYTES
from edgeprune.pipeline.setup import _floor_remedy, default_output, prepare, with_weights
from edgeprune.progress import Silent
from tests.support.checkpoints import save_uneven
from tests.support.runs import home, setup_of


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return home(tmp_path_factory)


def test_what_is_left_out_is_the_profiles_and_each_choice_has_its_reason(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup = setup_of(small, None, memory=None, prompt=None, context=100)
    assert (setup.output, setup.workload, setup.precision) == (
        tmp_path / "model-jetson-orin",
        Workload(1, 50, 100),
        "fp16",
    )
    default = setup.profile.budget
    asked = {name: limit.asked for name, limit in setup.budget.limits.items()}
    assert asked == {"memory": default.memory, "prefill": default.prefill, "decode": default.decode}
    choices = {choice.name: choice for choice in setup.choices}
    engine = {"weights", "KV cache", "TensorRT", "dialect", "engine", "precision"}
    assert set(choices) == engine | {"budget", "calibration", "read notes.txt"}
    assert choices["TensorRT"].value == "10.16"
    assert choices["dialect"].value == "opset24"
    assert choices["dialect"].reason.startswith("TensorRT 10.16 writes new keys and values into the KV cache in place")
    assert choices["weights"].value == "float, int8, int4-64, w8a8"
    assert choices["budget"].reason == "none was given: the default of jetson-orin"
    read = choices["read notes.txt"]
    assert read.value.startswith("text; 5 documents of ")
    assert "; 96 tokens of 4 documents, as 4 samples; 1 document of 2," in read.value
    assert read.reason == "nothing was left out"
    assert choices["precision"].reason == "the profile jetson-orin runs fp16"
    assert all(choice.reason for choice in setup.choices)
    assert not list(tmp_path.iterdir())


def test_fp32_takes_the_dialect_that_has_kernels_for_it(small, tmp_path):
    assert setup_of(small, tmp_path / "out", device="rtx-a4000").profile.dialect == "opset24"
    setup = setup_of(small, tmp_path / "out", device="rtx-a4000", precision="fp32")
    assert setup.profile.dialect == "primitive"
    (reason,) = (choice.reason for choice in setup.choices if choice.name == "dialect")
    assert "no fp32 kernel" in reason


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        ({"device": None}, "give one of --device and --profile", "edgeprune devices"),
        ({"profile": "x.toml"}, "give one of --device and --profile", "edgeprune devices"),
        ({"layout": "diagonal"}, "unknown layout 'diagonal'", "uniform, per-layer"),
        ({"vocabulary": "tiny"}, "unknown vocabulary 'tiny'", "full, samples"),
        ({"precision": "int4"}, "unknown precision 'int4'", "fp32, fp16, bf16"),
        ({"weights": "int3"}, "unknown weights 'int3'", "float, int8, int4"),
        ({"weights": "int4-32-asymmetric"}, "jetson-orin does not run weights in int4-32-asymmetric well", "int4-64"),
        ({"tensorrt": "x"}, "'x' is not a version of TensorRT", "10.16"),
        ({"rungs": 9}, "--rungs 9 is not 1 to 8", "3 covers"),
        ({"batch": 0}, "--batch 0 is less than 1", "positive"),
        ({"samples": 0}, "--samples 0 is less than 1", "at least 1"),
        ({"context": 129}, "context 129 exceeds the model's 128 positions", "--context 128"),
        ({"length": 200}, "samples of 200 tokens exceed the model's 128 positions", "--length 128"),
        ({"method": "flap"}, "the method flap adds biases", "--method flap+ls"),
        ({"device": "cpu", "target": "ssh://me@board"}, "has no figures of ssh://me@board", "tools/probe_profile.py"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(small, tmp_path, changes, message, remedy):
    with pytest.raises(InputError) as caught:
        setup_of(small, tmp_path / "out", **changes)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_a_budget_below_the_floor_is_refused_with_one_that_is_not(small, tmp_path):
    with pytest.raises(
        BudgetError, match=r"the memory budget 1MiB \(1.0 MiB\) is below the floor .* runtime "
    ) as caught:
        setup_of(small, tmp_path / "out", memory="1MiB")
    asked = caught.value.remedy.split("--memory ")[1].split(",")[0]
    setup = setup_of(small, tmp_path / "out", memory=asked)
    assert setup.floor.memory.total < setup.budget.memory.value
    with pytest.raises(BudgetError, match="below the floor .* one layer of one head"):
        setup_of(small, tmp_path / "out", memory=None, decode="1us")


def test_a_model_that_was_pruned_before_is_refused(small, tmp_path):
    save_uneven(small / "model", tmp_path / "uneven")
    with pytest.raises(InputError, match="differ in width: it was pruned before") as caught:
        setup_of(small, tmp_path / "out", model=tmp_path / "uneven")
    assert caught.value.remedy == "Give the model that it was pruned from."


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"memory": "91%"}, "budget"),
        ({"seed": 1}, "seed"),
        ({"samples": 3}, "sample_count"),
        ({"context": 33}, "workload"),
        ({"rungs": 2}, "rungs"),
        ({"max_quality_loss": 5}, "max_quality_loss"),
        ({"precision": "fp32"}, "precision"),
        ({"layout": "per-layer"}, "layout"),
        ({"weights": "int8"}, "weights"),
        ({"force": True, "checkpoint": False}, None),
    ],
)
def test_the_fingerprint_names_what_changes_a_run_and_not_where_it_goes(small, tmp_path, changes, field):
    one, other = setup_of(small, tmp_path / "one"), setup_of(small, tmp_path / "other", **changes)
    different = {name for name, value in one.fingerprint.items() if other.fingerprint[name] != value}
    assert (field in different) if field else not different
    json.dumps(one.fingerprint)


def test_other_formats_make_another_floor_and_another_choice(small, tmp_path):
    setup = setup_of(small, tmp_path / "out")
    floats = with_weights(setup, replace(setup.weights, tables=(None,), reason="the builder holds int8 in floats too"))
    assert floats.floor.memory.total > setup.floor.memory.total
    assert floats.weights.tables == (None,)
    changed = [(one, other) for one, other in zip(setup.choices, floats.choices, strict=True) if one != other]
    ((_, choice),) = changed
    assert (choice.name, choice.reason) == ("weights", "the builder holds int8 in floats too")
    assert floats.fingerprint == setup.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_what_a_run_holds_on_the_disk_is_within_the_sum_checked_at_its_start(small, precision, tmp_path, monkeypatch):
    """The largest sum of the files, links counted once, at the end of every stage."""
    setup = setup_of(small, tmp_path / "out", rungs=2, precision=precision)
    asked = []
    monkeypatch.setattr("edgeprune.pipeline.setup.check_space", lambda output, needed: asked.append(needed))
    setup = prepare(setup.request)
    held = []
    with working(setup, "edgeprune fit", Silent()) as run:
        planner = planner_of(run)
        _, chosen, allocation = search_budget(run, planner, setup.budget)
        run.evaluator.quality("0", chosen)
        smaller_candidates(run, planner, allocation)
        files = {path.stat().st_ino: path.stat().st_size for path in run.journal.folder.rglob("*") if path.is_file()}
        held.append(sum(files.values()))
    (needed,) = asked
    assert held[0] + SLACK_BYTES <= needed < 12 * held[0] + SLACK_BYTES


def test_a_budget_below_the_float_tables_is_within_reach_of_int8(small, tmp_path):
    """The floor has embedding and head in the format of the fewest bits that the search may take."""
    floats, auto = (
        setup_of(small, tmp_path / "out", weights=weights, memory="1GiB").floor.memory.weights.value
        for weights in ("float", "auto")
    )
    tables = setup_of(small, tmp_path / "out").model.decoder.table_parameters
    assert 0.9 * tables < floats - auto < tables  # two bytes each, less one and a scale for each row


@pytest.mark.parametrize(
    ("model", "stem"),
    [
        ("c2i_B_384.pt", "c2i_B_384"),
        ("dir/c2i.PTH", "c2i"),
        ("gpt.safetensors", "gpt"),
        ("tiny.Q4_1.gguf", "tiny.Q4_1"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("./my-model-v1.5", "my-model-v1.5"),
    ],
)
def test_a_bundle_is_named_for_its_model_without_the_files_ending(model, stem):
    assert default_output(model, "jetson-orin", ladder=False) == Path(f"{stem}-jetson-orin")
    assert default_output(model, "cpu", ladder=True) == Path(f"{stem}-cpu-frontier")


@pytest.mark.parametrize("limit", ["memory", "decode"])
def test_what_a_refused_budget_is_told_to_try_is_within_reach_and_less_than_the_dense_model(small, tmp_path, limit):
    tiny = {"memory": None, "decode": None} | {limit: "1us" if limit == "decode" else "1KiB"}
    with pytest.raises(BudgetError) as caught:
        setup_of(small, tmp_path / "out", **tiny)
    asked = caught.value.remedy.split(f"--{limit} ")[1].split(",")[0]
    setup = setup_of(small, tmp_path / "out", **tiny | {limit: asked})
    dense = estimate_performance(setup.model.decoder, setup.profile, setup.workload, setup.precision)
    assert setup.floor.values[limit] < setup.budget.limits[limit].value < dense.values[limit]


def test_an_image_generator_is_not_told_of_options_that_it_refuses():
    assert _floor_remedy("memory", 100.0 * 2**20, 200.0 * 2**20, Images(), reduced=False) == (
        "Try --memory 110MiB, or a smaller model; the dense model has 200.0 MiB."
    )
    text = _floor_remedy("memory", 100.0 * 2**20, 200.0 * 2**20, Language(), reduced=False)
    assert "--vocabulary samples, a shorter --context, or" in text
    text = _floor_remedy("memory", 200.0 * 2**20, 200.0 * 2**20, Language(), reduced=True)
    assert text.startswith("Try a shorter --context, or a smaller model;")
