"""A checkpoint as GGUF: llama.cpp itself computes what transformers does, and the file reads back as it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.errors import InputError
from edgeprune.model.gguf.export import check_exportable, export_gguf
from edgeprune.model.gguf.file import read_gguf
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, GraphRunner
from edgeprune.ondevice.sampling import generate
from tests.support.checkpoints import save_llama
from tests.support.families import EXPORTED
from tests.support.gguf_models import LONGROPE, narrowed, saved, without_layers
from tests.support.llamacpp import LlamaCpp

PROMPT = [3, 5, 7, 11, 200, 100, 50, 25, 12, 6, 9, 8, 4]
TABLE = ("gemma2", "gemma3_text", "gpt2", "gpt_neox", "starcoder2")  # llama.cpp has their GELU in a table of fp16
ROUNDED = {torch.float32: 0.0, torch.float16: 0.03, torch.bfloat16: 0.1}  # it rounds what such a matrix multiplies
NARROWER = {
    "gpt2": (3, 1, 80),
    "gpt_neox": (1, 1, 80),
    "gpt_neox, serial residual": (3, 1, 80),
    "llama, multi-query": (1, 2, 80),
    "llama, multi-head": (3, 1, 80),
    LONGROPE: (1, 1, 80),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))


def reference(directory: Path, prompt: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()


def check_parity(model, path: Path) -> None:
    """llama.cpp, and the checkpoint that the file reads back as, against transformers."""
    export_gguf(model, path)
    seen = [window for window in model.decoder.windows if window]
    prompt = PROMPT if not seen or model.decoder.family.startswith("gemma") else PROMPT[: min(seen) - 1]
    expected = reference(model.directory, prompt)
    table = 6e-3 if model.decoder.family in TABLE else 5e-5
    tolerance = max(table, ROUNDED[model.weights["embedding"].dtype])
    found = LlamaCpp(path).log_probabilities(prompt)
    assert np.abs(found - expected).max() < tolerance, np.abs(found - expected).max()
    again = reference(load_model(str(path)).directory, prompt)
    rounded = model.weights["embedding"].dtype == torch.bfloat16  # as the checkpoint is that it reads back as
    assert np.abs(again - expected).max() < (5e-3 if rounded else 2e-5), np.abs(again - expected).max()


@pytest.mark.parametrize("case", EXPORTED)
def test_llama_cpp_computes_what_transformers_does(tmp_path, case):
    check_parity(saved(tmp_path / "dense", case), tmp_path / "m.gguf")


@pytest.mark.parametrize("case", EXPORTED)
def test_and_of_a_narrower_model_too(tmp_path, case):
    dense = saved(tmp_path / "dense", case)
    attention = dense.decoder.layers[0].attention
    widths = NARROWER.get(case, (attention.num_key_value_heads, attention.heads_per_group - 1, 80))
    check_parity(narrowed(dense, tmp_path / "small", widths), tmp_path / "m.gguf")


@pytest.mark.parametrize(("case", "kept"), [("gemma2", [1, 2]), ("gemma3_text", [1, 2]), ("olmo2", [0])])
def test_layers_may_go_and_those_that_are_left_keep_their_windows(tmp_path, case, kept):
    check_parity(without_layers(saved(tmp_path / "dense", case), tmp_path / "small", kept), tmp_path / "m.gguf")


def rope(**parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | parameters}


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = {
    "opt": ("opt", {}, "no architecture for the family opt"),
    "unnormalised experts": ("qwen3_moe", {"norm_topk_prob": False}, "qwen3moe cannot compute this model: MLP of"),
    "biases": ("qwen3", {"attention_bias": True}, "qwen3 does not load attention.o bias"),
    "llama3 rope": ("qwen3", rope(original_max_position_embeddings=64, **LLAMA3), "qwen3 has no rope scaling llama3"),
    "no biases": ("starcoder2", {"use_bias": False, "num_attention_heads": 4}, "starcoder2 cannot compute this model"),
    "heads beyond": ("olmo2", {"num_attention_heads": 6}, "6 of 16 do not"),
}


@pytest.mark.parametrize(("case", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_before_any_work(tmp_path, case, changes, reason):
    model = saved(tmp_path / "dense", case, **changes)
    with pytest.raises(InputError) as caught:
        export_gguf(model, tmp_path / "m.gguf")
    assert reason in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_tokenizer_without_merges_is_refused(tmp_path):
    save_llama(tmp_path / "dense")
    with pytest.raises(InputError, match="no merges"):
        check_exportable(load_model(str(tmp_path / "dense")))


def test_the_file_is_complete_or_absent(tmp_path, monkeypatch):
    model = saved(tmp_path / "dense", "llama")
    (tmp_path / "m.gguf").write_text("older")

    class Breaking(dict):
        def __getitem__(self, name):
            if name == "layers.2.mlp.up":
                raise OSError(28, "No space left on device")
            return model.weights[name]

        def __contains__(self, name):
            return name in model.weights

    with pytest.raises(InputError, match="No space left"):
        export_gguf(replace(model, weights=Breaking()), tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "older"
    with pytest.raises(InputError, match="cannot write"):
        export_gguf(model, tmp_path / "no folder" / "m.gguf")


def test_stored_types_are_those_of_the_checkpoint(tmp_path):
    model = saved(tmp_path / "dense", "mixtral", dtype=torch.float16)
    export_gguf(model, tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    kinds = {name: tensor.type.name for name, tensor in file.tensors.items()}
    fp32 = {name for name, kind in kinds.items() if kind == "F32"}
    assert fp32 == {name for name in kinds if "norm" in name or "ffn_gate_inp" in name}
    assert file.tensors["blk.0.ffn_down_exps.weight"].shape == (4, 64, 96)
    assert (file.fields["general.file_type"], file.fields["llama.expert_count"]) == (1, 4)


class Cut(dict):
    """Weights of a model with the MLP channels alone that weigh most."""

    def __init__(self, model, decoder):
        self.model, self.channels = model, decoder.layers[0].mlp.intermediate_size
        super().__init__(dict.fromkeys(decoder.shapes()))

    def __getitem__(self, name):
        weight = self.model.weights[name]
        if ".mlp." not in name or name.endswith("norm"):
            return weight
        prefix = name.rsplit(".", 1)[0]
        norms = self.model.weights[f"{prefix}.down"].norm(dim=0) * self.model.weights[f"{prefix}.up"].norm(dim=1)
        kept = norms.topk(self.channels).indices.sort().values
        return weight[:, kept] if name.endswith("down") else weight[kept]


QUESTIONS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was a",
    "Water boils at",
    "The three laws of thermodynamics say that",
)


@pytest.mark.slow
@pytest.mark.demo
def test_a_pruned_demo_says_in_llama_cpp_what_our_engine_says(tmp_path):
    dense = load_model("demo")
    decoder = dense.decoder.with_widths(3, 3, 1528)
    model = replace(dense, decoder=decoder, weights=Cut(dense, decoder))
    held = export_gguf(model, tmp_path / "demo.gguf")
    assert read_gguf(held).fields["tokenizer.ggml.pre"] == "smollm"
    graphs = tmp_path / "graphs"
    write_graphs(decoder, model.weights, graphs, "fp32", [ONNXRUNTIME_GRAPH], 64)
    other, runner = LlamaCpp(held), GraphRunner(graphs / GRAPH_FILE, 1, 64)
    tokenizer = load_tokenizer(dense.directory)
    for question in QUESTIONS:
        ids = tokenizer(question)["input_ids"]
        ours = [int(tokens[0]) for tokens in generate(runner, [ids], 32)]
        theirs = [token["id"] for token in other.generate(question, 32)]
        assert len(theirs) == 32
        if ours != theirs:
            agreed = next(index for index in range(32) if ours[index] != theirs[index])
            runner.reset()
            logits = runner.run(np.array([ids + ours[:agreed]]))[0]
            assert np.ptp(np.sort(logits)[-2:]) < 0.05, question
