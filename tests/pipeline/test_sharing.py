"""The dependencies of shared stages: an option changes those of the stages that read it, and of no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.pipeline.request import request_of
from edgeprune.pipeline.setup import Setup, prepare
from edgeprune.pipeline.sharing import Dependencies
from tests.support.families import save_family

STAGES = ("graph", "samples", "device", "sensitivities", "formats", "evaluation")
OF_SAMPLES = set(STAGES) - {"graph"}
BASE = {"device": "jetson-orin", "samples": 4, "length": 32, "prompt": 16, "context": 64, "weights": "float,int8"}
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it, again and again, all day long. " * 20


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    for name in ("llama", "qwen3"):
        save_family(folder / name, name)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{index} {TEXT}"}) + "\n" for index in range(8)))
    return folder


def parts_of(home: Path, **options: object) -> dict[str, object]:
    setup: Setup = prepare(request_of(**BASE | {"model": home / "llama", "output": home / "out"} | options))
    return {stage: getattr(Dependencies(setup), stage) for stage in STAGES}


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"memory": "438MiB"}, set()),
        ({"decode": "80%", "max_quality_loss": "5%", "layout": "per-layer"}, set()),
        ({"checkpoint": False, "rungs": 2}, set()),
        ({"seed": 1}, OF_SAMPLES),
        ({"samples": 5}, OF_SAMPLES),
        ({"calibration": "texts.jsonl"}, OF_SAMPLES),
        ({"evaluate": ["texts.jsonl"]}, OF_SAMPLES),
        ({"context": 80}, set(STAGES)),
        ({"context": 24}, set(STAGES)),
        ({"length": 100}, set(STAGES)),
        ({"model": "qwen3"}, set(STAGES)),
        ({"method": "wanda"}, {"sensitivities"}),
        ({"weights": "float"}, {"sensitivities", "formats"}),
        ({"cache": "float,int8"}, {"sensitivities"}),
        ({"prompt": 8}, {"device", "formats"}),
        ({"precision": "bf16"}, {"device", "formats"}),
        ({"device": "l4"}, {"device", "formats"}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "stages",
)
def test_an_option_changes_the_stages_that_read_it(home, options, changed):
    paths = ("calibration", "model")
    given = {name: str(home / value) if name in paths else value for name, value in options.items()}
    if "evaluate" in given:
        given["evaluate"] = [str(home / name) for name in given["evaluate"]]
    before, after = parts_of(home), parts_of(home, **given)
    assert {stage for stage in STAGES if before[stage] != after[stage]} == changed


def test_a_context_within_the_length_of_samples_still_changes_answers(home):
    """The graphs have as many positions as the longer of both, and prompts are cut to the context."""
    long = {"length": 100}
    before, after = parts_of(home, **long), parts_of(home, **long, context=80)
    assert before["graph"] == after["graph"]
    assert before["evaluation"] != after["evaluation"]


def test_an_engine_that_computes_exactly_has_other_answers_than_one_that_rounds(home):
    before, after = parts_of(home, device="l4"), parts_of(home, device="cpu")
    assert before["samples"] == after["samples"]
    assert before["evaluation"] != after["evaluation"]
