"""What the search offers, through the real command line on small random models."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgeprune.report.schema import Report
from tests.support.checkpoints import save_llama
from tests.support.commands import SHORT, run
from tests.support.vocabularies import byte_level

pytestmark = pytest.mark.slow

OWN = ("--samples", "8", "--length", "64", "--prompt", "16", "--context", "128")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_llama(
        folder / "model",
        num_hidden_layers=4,
        hidden_size=512,
        num_attention_heads=8,
        head_dim=64,
        intermediate_size=1024,
        initializer_range=0.05,
    )
    return folder


def fitted(*words: str | Path) -> tuple[int, Report]:
    result = run("fit", *words, "--json")
    assert result.returncode in (0, 3), result.stderr
    return result.returncode, Report.model_validate_json(result.stdout)


def test_free_widths_are_carried_by_graph_and_engine(home: Path) -> None:
    bundle = home / "free"
    words = ("--memory", "70%", "--weights", "float", "--layout", "per-layer", "--max-quality-loss", "off")
    code, report = fitted(home / "model", "--device", "jetson-orin", *words, "--output", bundle, *OWN)
    assert code == 0
    assert len({tuple(layer.values()) for layer in report.fitted.widths}) > 1
    assert not (bundle / "model").exists()
    assert any("Layers differ in width" in warning for warning in report.warnings)
    assert run("run", bundle, "--prompt", "the", "--max-new-tokens", "3").returncode == 0


def test_a_budget_beyond_the_quality_limit_ends_with_both_points(home: Path) -> None:
    """On its own text every cut of a random model costs quality."""
    bundle = home / "quality"
    code, report = fitted(
        home / "model",
        "--device",
        "jetson-orin",
        "--memory",
        "70%",
        "--weights",
        "float",
        "--max-quality-loss",
        "10",
        "--output",
        bundle,
        *OWN,
    )
    assert code == 3
    assert (report.status, report.quality_status) == ("missed", "met")
    stop = report.quality_stop
    limit = report.budget[0].limit
    assert stop.performance.memory_total.value <= limit < report.fitted.performance.memory_total.value
    assert report.fitted.performance.memory_total.value <= report.dense.performance.memory_total.value
    assert stop.rise_percent > 10 >= report.quality.rise_percent
    assert "within the quality limit of 10%; the smallest within it is kept" in report.headline
    page = (bundle / "report.html").read_text()
    assert "smallest model within the quality limit" in page
    spoken = run("report", bundle)
    assert spoken.returncode == 0


def test_a_smaller_vocabulary_is_chosen_where_it_is_cheap(home: Path) -> None:
    folder, bundle = home / "wordy", home / "wordy-small"
    save_llama(
        folder,
        num_hidden_layers=4,
        vocab_size=602,
        hidden_size=512,
        head_dim=64,
        num_attention_heads=8,
        intermediate_size=1024,
        initializer_range=0.05,
    )
    for path in folder.glob("*token*"):
        path.unlink()
    byte_level(folder)
    paragraphs = [" ".join(["the", "model", "and", "the", "device"] * 12) + f" {n}" for n in range(60)]
    (home / "few.txt").write_text("\n\n".join(paragraphs))
    code, report = fitted(
        folder,
        "--device",
        "jetson-orin",
        "--memory",
        "99.92%",  # which so few tokens less save
        "--weights",
        "float",
        "--vocabulary",
        "samples",
        "--calibration",
        home / "few.txt",
        "--output",
        bundle,
        *SHORT,
    )
    chosen = next(candidate for candidate in report.search.candidates if candidate.chosen)
    tokenizer = AutoTokenizer.from_pretrained(bundle / "tokenizer")
    assert len(tokenizer) == chosen.widths["tokens"] < 602
    text = "the device, naïve 火"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_pretrained(bundle / "model", local_files_only=True)
    assert model.config.vocab_size == len(tokenizer)
    assert code == 0
    assert run("run", bundle, "--prompt", "the device", "--max-new-tokens", "3").returncode == 0


def test_unknown_choices_are_refused(home: Path) -> None:
    for option in ("--layout", "--vocabulary"):
        result = run("fit", home / "model", "--device", "jetson-orin", "--memory", "90%", option, "free")
        assert result.returncode == 2
        assert f"unknown {option.strip('-')} 'free'" in result.stderr
        assert "Traceback" not in result.stderr
