"""`fit --export gguf`: the rung's model as a file that llama.cpp runs, or a refusal before any work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from gguf import GGUFReader

from edgeprune.model.gguf.blocks import block_type
from edgeprune.model.gguf.file import read_gguf
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, GraphRunner
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
    return run("fit", model, "--export", "gguf", "--calibration", home / "text.txt", *SHORT, *more)


def types_of(path: Path) -> Counter[str]:
    """The types of a file's matrices, one for each attention, each MLP, and the table."""
    tensors = GGUFReader(path).tensors
    modules = {
        (name.split(".")[1], "ffn" in name) if name.startswith("blk") else name: kind
        for name, kind in ((tensor.name, tensor.tensor_type.name) for tensor in tensors if "norm" not in tensor.name)
    }
    return Counter(modules.values())


def test_llama_cpp_runs_the_file_in_the_bundle(home):
    """In few bits, of the types that the report names: greedily it says what `edgeprune run` says, but for near ties,
    since each rounds what such a matrix multiplies in a way of its own."""
    bundle = home / "fitted"
    options = ("--device", "jetson-orin", "--memory", "60%", "--weights", "int8,int4")
    result = fit(home, home / "model", *options, "--output", bundle)
    assert result.returncode == 0, result.stderr
    # The file is what the bundle's documents say.
    file = bundle / "gguf" / "model.gguf"
    assert open_bundle(bundle)["sha256"]["rungs/0/gguf/model.gguf"] == sha256(file)
    report = Report.model_validate_json((bundle / "report.json").read_text())
    assert "--export gguf" in report.command
    assert "`gguf/`" in (bundle / "README.md").read_text()
    types = Counter({block_type(WEIGHT_FORMATS[name]).name: count for name, count in report.fitted.formats.items()})
    assert types_of(file) == types
    assert types.keys() == {"Q8_0", "Q4_0"}
    # Both begin the same prompt.
    tokenizer, runner = load_tokenizer(bundle / "model"), GraphRunner(bundle / "onnx" / GRAPH_FILE, 1, 64)
    prompt = tokenizer(PROMPT)["input_ids"]
    ids = [int(tokens[0]) for tokens in generate(runner, [prompt], COUNT)]
    ids = ids[: ids.index(end)] if (end := tokenizer.eos_token_id) in ids else ids  # where `run` ends
    said = run("run", bundle, "--prompt", PROMPT, "--max-new-tokens", str(COUNT))
    assert said.stdout.rstrip("\n") == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd\n")
    assert_same_choices(runner, LlamaCpp(file), prompt, ids)


def test_llama_cpp_runs_layers_of_different_widths(home):
    """The search takes what loses least; greedily llama.cpp says of it what our own engine says."""
    bundle = home / "uneven"
    options = ("--device", "jetson-orin", "--memory", "80%", "--weights", "float", "--layout", "per-layer")
    result = fit(home, home / "model", *options, "--output", bundle)
    assert result.returncode == 0, result.stderr
    assert read_gguf(bundle / "gguf" / "model.gguf").fields["general.architecture"] == "deci"
    tokenizer, runner = load_tokenizer(home / "model"), GraphRunner(bundle / "onnx" / GRAPH_FILE, 1, 64)
    prompt = tokenizer(PROMPT)["input_ids"]
    ids = [int(tokens[0]) for tokens in generate(runner, [prompt], COUNT)]
    assert_same_choices(runner, LlamaCpp(bundle / "gguf" / "model.gguf"), prompt, ids)


REFUSED = {
    "layers of different widths": (
        "model",
        ("--export", "gptq", "--layout", "per-layer"),
        "a GPTQ checkpoint cannot hold layers of different widths",
    ),
    "a family that llama.cpp lacks": ("opt", (), "no architecture for the family opt"),
    "a format that is none": ("model", ("--export", "pickle"), "unknown export 'pickle'"),
}


@pytest.mark.parametrize(("model", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported_is_refused_before_any_work(home, tmp_path, model, options, reason):
    if model == "opt":
        save_family(home / "opt", "opt")
    result = fit(home, home / model, "--device", "jetson-orin", "--output", tmp_path / "out", *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert reason in result.stderr
    assert not list(tmp_path.iterdir())
