"""The real command line with llama.cpp as the engine, the real one of xllamacpp, on small random models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFReader

from edgeprune.model.gguf.blocks import block_type
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.ondevice.llamacpp import MODEL_FILE, LlamaRunner
from edgeprune.ondevice.sampling import generate
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.report.schema import Report
from tests.support.checkpoints import save_llama
from tests.support.commands import SHORT, run
from tests.support.families import save_family
from tests.support.llamacpp import VOCABULARY, LlamaCpp, assert_same_choices, save_merging_tokenizer

pytestmark = pytest.mark.slow

PROMPT, COUNT = "the quick brown", 16
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away", "from", "it")
ENGINE = ("--device", "cpu", "--engine", "llama.cpp")


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """llama.cpp takes all cores, and its threads wait for each other in loops: other tests would hold them up."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_llama(
        folder / "model",
        vocab_size=len(VOCABULARY),
        num_hidden_layers=2,
        hidden_size=512,
        num_attention_heads=8,
        head_dim=64,
        intermediate_size=1024,
        initializer_range=0.05,
    )
    save_merging_tokenizer(folder / "model")
    paragraphs = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 60)) + f" {i}" for i in range(80)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    return folder


@pytest.fixture(scope="module")
def bundle(home: Path) -> Path:
    """Of two rungs, the first within 60 % of the memory's prunable part."""
    result = run(
        *("fit", home / "model", *ENGINE, "--weights", "int8,q4_k", "--memory", "65%", "--rungs", "2"),
        *("--calibration", home / "text.txt", "--output", home / "fitted", *SHORT),
    )
    assert result.returncode in (0, 3), result.stderr
    return home / "fitted"


def report_of(bundle: Path) -> Report:
    hashes = open_bundle(bundle)["sha256"]
    assert {name: sha256(bundle / name) for name in hashes} == hashes
    return Report.model_validate_json((bundle / "report.json").read_text())


def test_a_fit_measures_what_it_ships(bundle: Path) -> None:
    """The file of the rung has the formats that the report names, its logits were checked, and all was measured."""
    report = report_of(bundle)
    assert (report.engine.name, report.rests_on) == ("llama.cpp", "measured")
    assert any(choice.name == "engine" and "llama.cpp 20" in choice.reason for choice in report.choices)
    performance = report.fitted.performance
    assert any("logits against the fp32 graph" in name for name in performance.conditions)
    for figure in (performance.prefill, performance.decode, *performance.memory.values()):
        assert figure.source == "measured", figure
    file = bundle / "engine" / "model.gguf"
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors if "norm" not in tensor.name}
    assert kinds == {block_type(WEIGHT_FORMATS[name]).name for name in report.fitted.formats}
    assert (bundle / "rungs" / "1" / "engine" / "model.gguf").is_file()


def test_the_bundle_runs_in_llama_cpp(bundle: Path) -> None:
    """Greedily, `edgeprune run` says what our runner of llama.cpp does, and that what llama.cpp's own server does."""
    result = run("run", bundle, "--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", str(COUNT))
    assert result.returncode == 0, result.stderr
    assert "ONNX" not in result.stderr
    file, tokenizer = bundle / "engine" / MODEL_FILE, load_tokenizer(bundle / "model")
    prompt, runner = tokenizer(PROMPT)["input_ids"], LlamaRunner(file, 64)
    ids = [int(tokens[0]) for tokens in generate(runner, [prompt], COUNT)]
    assert result.stdout.rstrip("\n") == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd\n")
    assert_same_choices(runner, LlamaCpp(file), prompt, ids)


def test_measured_again(bundle: Path) -> None:
    result = run("measure", bundle, "--json")
    assert result.returncode in (0, 3), result.stderr
    measured = report_of(bundle).measurement
    assert (measured.engine, measured.where, measured.rungs[0].sources["decode"]) == (
        "llama.cpp",
        "this machine",
        "measured",
    )
    assert json.loads((bundle / "measurement.json").read_text())["version"].startswith("20")


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        (("--layout", "per-layer"), "llama.cpp cannot run layers of different widths", "--layout uniform"),
        (("--batch", "2"), "one sequence at once, not with 2", "--batch 1"),
        (("--precision", "fp32"), "llama.cpp keeps its KV cache in fp16", "--precision fp16"),
        (("--tensorrt", "10.3"), "does not run TensorRT", "Leave --tensorrt out"),
        (("--weights", "int4-64"), "does not run weights in int4-64 well", "--weights auto"),
        (("--cache", "int8"), "int8", "float"),
    ],
)
def test_what_it_cannot_do_is_refused(home: Path, options: tuple[str, ...], message: str, remedy: str) -> None:
    """One message with a remedy, before any work."""
    result = run("fit", home / "model", *ENGINE, "--output", home / "nothing", *SHORT, *options)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert remedy in result.stderr
    assert "Traceback" not in result.stderr
    assert not (home / "nothing").exists()


def test_a_family_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    save_family(tmp_path / "model", "opt")
    for command in (("fit", tmp_path / "model", "--output", tmp_path / "nothing"), ("plan", tmp_path / "model")):
        result = run(*command, *ENGINE)
        assert result.returncode == 2, result.stderr
        assert "llama.cpp has no architecture for the family opt" in result.stderr


def test_without_the_package_the_command_that_installs_it_is_told(home: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('libstdc++ is too old')")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("fit", home / "model", *ENGINE, "--output", home / "nothing", *SHORT)
    assert result.returncode == 2, result.stderr
    assert "the engine llama.cpp is not usable here: ImportError: libstdc++ is too old" in result.stderr
    assert 'pip install "edgeprune[llama]"' in result.stderr
