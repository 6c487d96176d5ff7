"""docs/python.md: its example runs as it stands, and a bundle's run.toml makes the bundle again."""

from __future__ import annotations

import re
import tomllib

import pytest

import edgeprune
from edgeprune.cli.options import OPTIONS
from edgeprune.commands.result import Result
from edgeprune.errors import BudgetError, InputError
from edgeprune.pipeline.run_file import read_run_file
from edgeprune.report.schema import Report
from tests.support import ROOT
from tests.support.checkpoints import save_llama

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it {} "


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the example's model and texts, after the example ran in it."""
    folder = tmp_path_factory.mktemp("python")
    save_llama(
        folder / "my-model",
        num_hidden_layers=3,
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        intermediate_size=768,
        initializer_range=0.05,
        max_position_embeddings=512,
    )
    (folder / "our-texts").mkdir()
    paragraphs = [TEXT.format(number) * (3 + number % 5) for number in range(80)]
    (folder / "our-texts" / "notes.txt").write_text("\n\n".join(paragraphs))
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EDGEPRUNE_TIMING", '{"cross_check_seconds": 0.3, "block_ms": 10}')
        names: dict[str, object] = {"__name__": "example"}
        exec(compile(example, "docs/python.md", "exec"), names)
    return folder, names


def test_the_example_of_the_page_runs(home):
    folder, names = home
    result = names["result"]
    assert isinstance(result, Result)
    assert isinstance(result.report, Report)
    assert result.bundle == folder / "fitted"
    assert result.met == (result.report.outcome == "met")
    assert result.report.exit_code() == (0 if result.met else 3)


def test_progress_is_told_to_a_function(tmp_path, home):
    calls = []
    # The journal of the finished run is gone: what is asked again is refused before anything is written.
    with pytest.raises(InputError, match="is not empty"):
        edgeprune.fit(
            home[0] / "my-model",
            device="jetson-orin",
            memory="90%",
            calibration=home[0] / "our-texts",
            output=home[0] / "fitted",
            progress=lambda *call: calls.append(call),
        )
    assert not calls


def test_errors_are_ours_and_nothing_is_written(tmp_path, monkeypatch, home):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        edgeprune.fit(home[0] / "my-model", device="jetson-orinn")
    assert caught.value.remedy
    with pytest.raises(BudgetError, match="below the floor"):
        edgeprune.fit(
            home[0] / "my-model",
            device="jetson-orin",
            decode=0.001,
            prompt=128,
            context=256,
            calibration=home[0] / "our-texts",
        )
    with pytest.raises(InputError, match="there is no option 'budget'"):
        edgeprune.frontier(home[0] / "my-model", budget="90%")
    with pytest.raises(InputError, match="malformed ratios"):
        edgeprune.compare(home[0] / "my-model", ratios="twenty", calibration=home[0] / "our-texts")
    with pytest.raises(InputError):
        edgeprune.load_bundle(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_plan_needs_no_weights(home):
    plans = edgeprune.plan(home[0] / "my-model").report
    assert len(plans) > 10
    assert edgeprune.plan(home[0] / "my-model", device="l4").report == [
        plan for plan in plans if plan.profile.name == "l4"
    ]


def test_the_functions_are_those_of_the_page():
    documented = set(re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE))
    assert documented == set(edgeprune.__all__) - {"__version__"}
    assert set(dir(edgeprune)) == set(edgeprune.__all__)
    with pytest.raises(AttributeError):
        edgeprune.nothing  # noqa: B018


def test_the_configuration_of_the_page_holds_options_alone(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "run.toml").write_text(text)
    assert set(read_run_file(tmp_path / "run.toml")) <= set(OPTIONS)


def test_the_run_file_of_a_bundle_makes_it_again(tmp_path, monkeypatch, home):
    """From another folder: its paths are whole."""
    folder, names = home
    options = tomllib.loads((folder / "fitted" / "run.toml").read_text())
    assert options["memory"] == "90%"
    assert options["model"] == str(folder / "my-model")
    assert {"precision", "batch", "prompt", "context", "length"} <= set(options)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEPRUNE_TIMING", '{"cross_check_seconds": 0.3, "block_ms": 10}')
    from edgeprune.cli.app import main

    words = ["fit", "--config", str(folder / "fitted" / "run.toml"), "--output", "again"]
    monkeypatch.setattr("sys.argv", ["edgeprune", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == names["result"].report.exit_code()
    again = edgeprune.load_bundle(tmp_path / "again")
    same = ("model/model.safetensors", "onnx/model.onnx.data", "onnx/embedding.data", "run.toml")
    for name in same:
        assert (tmp_path / "again" / name).read_bytes() == (folder / "fitted" / name).read_bytes(), name
    assert again.report.budget[0].asked == names["result"].report.budget[0].asked
