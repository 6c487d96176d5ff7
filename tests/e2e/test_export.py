"""`fit --export gguf`: the rung's model as a file that llama.cpp runs, or a refusal before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.report.schema import Report
from tests.support.checkpoints import save_llama
from tests.support.commands import SMALL, run
from tests.support.families import save_family
from tests.support.llamacpp import VOCABULARY, LlamaCpp, save_merging_tokenizer

pytestmark = pytest.mark.slow

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away", "from", "it")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
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


def fit(home: Path, model: Path, *more: str | Path):
    given = ("--device", "jetson-orin", "--memory", "90%", "--weights", "float", "--export", "gguf")
    return run("fit", model, *given, "--calibration", home / "text.txt", *SMALL, *more)


def test_llama_cpp_runs_the_file_in_the_bundle(home):
    bundle = home / "fitted"
    result = fit(home, home / "model", "--output", bundle)
    assert result.returncode == 0, result.stderr
    manifest = open_bundle(bundle)
    assert manifest["sha256"]["rungs/0/gguf/model.gguf"] == sha256(bundle / "gguf" / "model.gguf")
    report = Report.model_validate_json((bundle / "report.json").read_text())
    assert "--export gguf" in report.command
    assert "`gguf/`" in (bundle / "README.md").read_text()
    ids = [3, 5, 7, 11, 200, 100]
    small = AutoModelForCausalLM.from_pretrained(bundle / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.log_softmax(small(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()
    assert small.num_parameters() == report.fitted.parameters < report.dense.parameters
    found = LlamaCpp(bundle / "gguf" / "model.gguf").log_probabilities(ids)
    assert np.abs(found - expected).max() < 1e-4


REFUSED = {
    "layers of different widths": ("model", ("--layout", "per-layer"), "cannot hold layers of different widths"),
    "a family that llama.cpp lacks": ("opt", (), "no architecture for the family opt"),
    "a format that is none": ("model", ("--export", "pickle"), "unknown export 'pickle'"),
}


@pytest.mark.parametrize(("model", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported_is_refused_before_any_work(home, tmp_path, model, options, reason):
    if model == "opt":
        save_family(home / "opt", "opt")
    result = fit(home, home / model, "--output", tmp_path / "out", *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert reason in result.stderr
    assert not list(tmp_path.iterdir())
