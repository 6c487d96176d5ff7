"""A checkpoint as GGUF: llama.cpp itself computes what transformers does, and the file reads back as it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.errors import InputError
from edgeprune.model.decoder import Layer
from edgeprune.model.export import check_exports
from edgeprune.model.gguf.export import check_exportable, export_gguf
from edgeprune.model.gguf.file import read_gguf
from edgeprune.model.load import load_model
from edgeprune.model.save import save_checkpoint
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, GraphRunner
from edgeprune.ondevice.sampling import generate
from tests.support.checkpoints import save_llama
from tests.support.families import CASES, EXPORTED, PICTURES, random_model, save_family
from tests.support.llamacpp import VOCABULARY, LlamaCpp, save_merging_tokenizer

LONGROPE = "phi3, longrope, partial rotary, sliding window"
CHANGES = {
    "qwen2": {"num_attention_heads": 4},
    "olmo2": {"num_attention_heads": 4},
    "starcoder2": {"num_attention_heads": 4},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 5},
    # llama.cpp gives a context 256 places at least, and takes the long factors beyond the original context
    LONGROPE: {
        "original_max_position_embeddings": 256,
        "max_position_embeddings": 512,
        "rope_parameters": CASES[LONGROPE]["rope_parameters"] | {"original_max_position_embeddings": 256},
    },
    "llama, linear rope": {"dtype": torch.float16},
    "gemma3_text": {"dtype": torch.bfloat16},
}
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


def saved(folder: Path, case: str, **changes):
    """The random model of a case, with a tokenizer that has merges."""
    changes = CHANGES.get(case, {}) | changes
    dtype = changes.pop("dtype", torch.float32)
    random_model(case, vocab_size=len(VOCABULARY), **changes).to(dtype).save_pretrained(folder)
    save_merging_tokenizer(folder)
    return load_model(str(folder))


def narrowed(model, folder: Path, widths):
    """The first heads and channels alone."""
    target = model.decoder.with_widths(*widths)
    tensors = ((name, model.weights[name][tuple(map(slice, shape))]) for name, shape in target.shapes().items())
    save_checkpoint(target, tensors, model, folder)
    return load_model(str(folder))


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


def without_layers(model, folder: Path, kept: list[int]):
    layers = tuple(model.decoder.layers[index] for index in kept)
    target = replace(model.decoder, layers=layers)
    source = {f"layers.{new}.": f"layers.{old}." for new, old in enumerate(kept)}

    def stream():
        for name in target.shapes():
            prefix = next((p for p in source if name.startswith(p)), "")
            yield name, model.weights[source.get(prefix, "") + name.removeprefix(prefix)]

    save_checkpoint(target, stream(), model, folder)
    return load_model(str(folder))


@pytest.mark.parametrize(("case", "kept"), [("gemma2", [1, 2]), ("gemma3_text", [1, 2]), ("olmo2", [0])])
def test_layers_may_go_and_those_that_are_left_keep_their_windows(tmp_path, case, kept):
    check_parity(without_layers(saved(tmp_path / "dense", case), tmp_path / "small", kept), tmp_path / "m.gguf")


def test_a_layer_that_does_not_turn_has_its_place(tmp_path):
    """llama.cpp lets every fourth layer of a smollm3 not turn, whatever layers are left."""
    dense = saved(tmp_path / "dense", "smollm3")
    assert (
        check_exportable(without_layers(dense, tmp_path / "last", [0, 1, 2, 3])).decoder.layers[3].attention.rotary
        is None
    )
    with pytest.raises(InputError, match="smollm3 cannot compute this model: attention of layer 2: rotary None"):
        check_exportable(without_layers(dense, tmp_path / "first", [1, 2, 3, 4]))


def test_a_narrow_qwen2_is_held_without_heads_of_zeros(tmp_path):
    """llama.cpp's qwen2 wants heads that fill the hidden size; its llama does not, and reads the biases too."""
    dense = saved(tmp_path / "dense", "qwen2", num_attention_heads=4)
    assert check_exportable(dense).architecture.name == "qwen2"
    held = check_exportable(narrowed(dense, tmp_path / "small", (2, 1, 80)))
    assert (held.architecture.name, held.decoder.layers[0].attention.num_attention_heads) == ("llama", 2)


def test_a_narrow_olmo2_is_filled_with_as_few_groups_as_may_be(tmp_path):
    dense = saved(tmp_path / "dense", "olmo2", num_attention_heads=4)
    held = check_exportable(narrowed(dense, tmp_path / "small", (1, 1, 80)))
    attention = held.decoder.layers[0].attention
    assert (attention.num_key_value_heads, attention.num_attention_heads) == (1, 4)


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
    "half turned": ("qwen3", rope(partial_rotary_factor=0.5), "rotates 8 of 16"),
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


def test_gemma2_without_its_caps_is_refused(tmp_path):
    model = saved(tmp_path / "dense", "gemma2")
    with pytest.raises(InputError, match="gemma2 cannot compute this model: logits softcap None"):
        check_exportable(replace(model, decoder=replace(model.decoder, logits_softcap=None)))


@pytest.mark.parametrize("case", PICTURES)
def test_image_generators_are_refused(tmp_path, case):
    save_family(tmp_path / case, case)
    with pytest.raises(InputError, match=f"no architecture for the family {case}"):
        check_exports(["gguf"], load_model(str(tmp_path / case)), "uniform", reduced=False)


def test_layers_of_different_widths_are_refused(tmp_path):
    model = saved(tmp_path / "dense", "llama")
    first, *others = model.decoder.layers
    layers = (Layer(first.attention, replace(first.mlp, intermediate_size=32)), *others)
    with pytest.raises(InputError, match="one width for all"):
        check_exportable(replace(model, decoder=replace(model.decoder, layers=layers)))


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


def test_a_gpt2_of_fewer_heads_is_filled_with_heads_of_their_own(tmp_path):
    dense = saved(tmp_path / "dense", "gpt2")
    target = dense.decoder.with_widths(2, 1, 96)
    attention = check_exportable(replace(dense, decoder=target)).decoder.layers[0].attention
    assert (attention.num_key_value_heads, attention.num_attention_heads) == (4, 4)
