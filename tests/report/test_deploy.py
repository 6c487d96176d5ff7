"""The steps on the way to the device, by engine and by what the bundle holds."""

from __future__ import annotations

import shlex

from edgeprune.report.deploy import deploy_steps
from edgeprune.report.schema import Report
from tests.support.sample_pictures import pictures_content
from tests.support.sample_reports import PROMPT, estimated_content, measured_content, report_of

BUNDLE = "my bundle's"
AGAIN = "edgeprune fit demo --force"


def commands(report: Report, engine: str, plans: tuple[str, ...] = (), checkpoint: bool = True) -> list[str]:
    return [step.command for step in deploy_steps(report, BUNDLE, engine, plans, checkpoint, AGAIN)]


def with_engine(name: str) -> Report:
    content = measured_content()
    return report_of(content | {"engine": content["engine"] | {"name": name}})


def test_a_jetson_is_reached_over_ssh_or_by_a_copy():
    first, run, load = commands(report_of(estimated_content()), "tensorrt")
    measure, copy = first.splitlines()
    assert shlex.split(measure) == ["edgeprune", "measure", BUNDLE, "--target", "ssh://USER@DEVICE"]
    assert copy.startswith(f"tar -cf - {shlex.quote(BUNDLE)} | ssh USER@DEVICE ")
    assert copy.endswith("/finish.pyz'")
    assert shlex.split(run) == ["edgeprune", "run", BUNDLE, "--prompt", PROMPT]
    assert load == f'transformers.AutoModelForCausalLM.from_pretrained("{BUNDLE}/model")'


def test_an_engine_for_rtx_is_loaded_or_where_none_could_be_built_built():
    plans = ("a.engine", "b.engine")
    assert commands(with_engine("tensorrt-rtx"), "tensorrt-rtx", plans)[0] == "engine/a.engine\nengine/b.engine"
    first = commands(with_engine("tensorrt-rtx"), "tensorrt-rtx")[0]
    assert first.splitlines() == ['pip install "edgeprune[rtx]"', AGAIN]


def test_a_processors_bundle_is_run_as_it_is():
    assert [
        command.split()[1] for command in commands(with_engine("onnxruntime"), "onnxruntime", checkpoint=False)
    ] == ["run"]


def test_pictures_are_drawn_and_only_a_checkpoint_that_transformers_knows_is_loaded():
    content = pictures_content()
    (run,) = commands(report_of(content | {"model": content["model"] | {"family": "llamagen"}}), "onnxruntime")
    assert shlex.split(run) == ["edgeprune", "run", BUNDLE, "--count", "16", "--output", "grid.png"]
    known = report_of(content | {"model": content["model"] | {"family": "imagegpt"}})
    assert "transformers.ImageGPTForCausalImageModeling.from_pretrained" in commands(known, "onnxruntime")[-1]


def test_a_gguf_file_is_loaded_by_its_name():
    report = report_of(measured_content())
    fitted = report.fitted.model_copy(update={"formats": {"q4_0": 3}})
    load = commands(report.model_copy(update={"fitted": fitted}), "onnxruntime")[-1]
    assert load.endswith(f'.from_pretrained("{BUNDLE}/model", gguf_file="model.gguf")')
