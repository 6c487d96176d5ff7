"""A checkpoint as GGUF: llama.cpp itself computes what transformers does, and the file reads back as it was."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM

from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.errors import InputError
from edgeprune.model.gguf.export import check_exportable, export_gguf
from edgeprune.model.gguf.file import read_gguf
from edgeprune.model.gguf.metadata import FILLING
from edgeprune.model.load import load_model
from edgeprune.model.save import save_checkpoint
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, GraphRunner
from edgeprune.ondevice.sampling import generate
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.checkpoints import save_llama
from tests.support.families import EXPORTED
from tests.support.gguf_models import LONGROPE, narrowed, saved, without_layers
from tests.support.llamacpp import LlamaCpp
from tests.support.parity import torch_logits
from tests.support.quantised import PACKED_FORMATS
from tests.support.rounded_models import as_floats, rounded

PROMPT = [3, 5, 7, 11, 200, 100, 50, 25, 12, 6, 9, 8, 4]
TABLE = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "starcoder2",
)  # llama.cpp has their GELU in a table of fp16
ROUNDED = {torch.float32: 0.0, torch.float16: 0.03, torch.bfloat16: 0.1}  # it rounds what such a matrix multiplies
MIXED = ("int8", "int4-32", "int8")  # attention, MLP, tables
NARROWER = {
    "gpt2": (3, 1, 80),
    "olmoe": (3, 1, 80),
    "gpt_neox": (1, 1, 80),
    "gpt_neox, serial residual": (3, 1, 80),
    "llama, multi-query": (1, 2, 80),
    "llama, multi-head": (3, 1, 80),
    LONGROPE: (1, 1, 80),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))


def reference(directory: Path, prompt: list[int], rounds_inputs: bool = False) -> np.ndarray:
    """rounds_inputs: of linear layers, to Q8_0, as llama.cpp does where their weights have few bits."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for module in model.modules():
        if rounds_inputs and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (in_q8_0(inputs[0]),))
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()


def in_q8_0(values: torch.Tensor) -> torch.Tensor:
    kind = GGMLQuantizationType.Q8_0
    return torch.from_numpy(dequantize(quantize(values.numpy(), kind), kind)).reshape(values.shape)


def prompt_of(model) -> list[int]:
    """As long as llama.cpp, which has no windows of most families, sees what they see."""
    seen = [window for window in model.decoder.windows if window]
    return PROMPT if not seen or model.decoder.family.startswith("gemma") else PROMPT[: min(seen) - 1]


def check_parity(model, path: Path) -> None:
    """llama.cpp, and the checkpoint that the file reads back as, against transformers."""
    export_gguf(model, path)
    prompt = prompt_of(model)
    expected = reference(model.directory, prompt)
    table = 6e-3 if model.decoder.family in TABLE else 5e-5
    tolerance = max(table, ROUNDED[model.weights["embedding"].dtype])
    found = LlamaCpp(path).log_probabilities(prompt)
    assert np.abs(found - expected).max() < tolerance, np.abs(found - expected).max()
    again = reference(load_model(str(path)).directory, prompt)
    rounded = model.weights["embedding"].dtype == torch.bfloat16  # as the checkpoint is that it reads back as
    assert np.abs(again - expected).max() < (5e-3 if rounded else 2e-5), np.abs(again - expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED)
def test_llama_cpp_computes_what_transformers_does(tmp_path, case):
    check_parity(saved(tmp_path / "dense", case), tmp_path / "m.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED)
def test_and_of_a_narrower_model_too(tmp_path, case):
    dense = saved(tmp_path / "dense", case)
    attention = dense.decoder.layers[0].attention
    widths = NARROWER.get(case, (attention.num_key_value_heads, attention.heads_per_group - 1, 80))
    check_parity(narrowed(dense, tmp_path / "small", widths), tmp_path / "m.gguf")


@pytest.mark.parametrize(("case", "kept"), [("gemma2", [1, 2]), ("gemma3_text", [1, 2]), ("olmo2", [0])])
def test_layers_may_go_and_those_that_are_left_keep_their_windows(tmp_path, case, kept):
    check_parity(without_layers(saved(tmp_path / "dense", case), tmp_path / "small", kept), tmp_path / "m.gguf")


def test_heads_of_zeros_between_a_models_own_change_nothing(tmp_path):
    """6 heads divide no hidden size of 64: the checkpoint has 4 in each group, the graph and the file 3."""
    dense = saved(tmp_path / "dense", "gemma3_text", num_attention_heads=8, num_key_value_heads=2, dtype=torch.float32)
    small = narrowed(dense, tmp_path / "small", (2, 3, 80))
    assert small.decoder.layer_widths[0] == (2, 3, 80)
    expected = own_log_probabilities(small, PROMPT)
    assert np.abs(reference(small.directory, PROMPT) - expected).max() < 2e-5
    file = export_gguf(small, tmp_path / "m.gguf")
    assert np.abs(LlamaCpp(file).log_probabilities(PROMPT) - expected).max() < 6e-3


UNEVEN = {
    "all differ": [(2, 2, 64), (1, 1, 96), (2, 1, 32)],
    "without attention": [(0, 1, 96), (2, 2, 64), (0, 1, 32)],
    "without MLP": [(2, 2, 0), (1, 2, 96), (2, 1, 0)],
    "without both": [(2, 2, 64), (0, 1, 0), (0, 1, 96)],
}


@pytest.mark.parametrize("case", ["llama", "llama, llama3 rope, biases, untied", "mistral, sliding window", "qwen2"])
@pytest.mark.parametrize("widths", UNEVEN.values(), ids=UNEVEN)
def test_layers_of_different_widths_are_those_of_our_own_walk(tmp_path, case, widths):
    """In llama.cpp's architecture of layers that differ, and in the checkpoint that the file reads back as."""
    dense = saved(tmp_path / "dense", case)
    target = dense.decoder.with_layer_widths(widths)
    tensors = ((name, dense.weights[name][tuple(map(slice, shape))]) for name, shape in target.shapes().items())
    save_checkpoint(target, tensors, dense, tmp_path / "small")
    model = load_model(str(tmp_path / "small"))
    export_gguf(model, tmp_path / "m.gguf")
    again = load_model(str(tmp_path / "m.gguf"))
    first, *others = widths
    needed = [first if first[0] else (1, *first[1:]), *others]
    filled = [(groups, heads, channels or (FILLING if groups else 0)) for groups, heads, channels in needed]
    assert again.decoder.layer_widths == filled
    prompt = prompt_of(model)
    expected = own_log_probabilities(model, prompt)
    assert np.abs(LlamaCpp(tmp_path / "m.gguf").log_probabilities(prompt) - expected).max() < 5e-5
    assert np.abs(own_log_probabilities(again, prompt) - expected).max() < 2e-5


def own_log_probabilities(model, prompt: list[int]) -> np.ndarray:
    logits = torch_logits(model.decoder, model.weights, torch.tensor([[*prompt, 0]]))
    return torch.log_softmax(torch.from_numpy(logits)[0, -1].double(), -1).numpy()


def rope(**parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | parameters}


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = {
    "opt": ("opt", {}, "no architecture for the family opt"),
    "unnormalised experts": ("qwen3_moe", {"norm_topk_prob": False}, "qwen3moe cannot compute this model: MLP of"),
    "biases": ("qwen3", {"attention_bias": True}, "qwen3 does not load attention.o bias"),
    "llama3 rope": ("qwen3", rope(original_max_position_embeddings=64, **LLAMA3), "qwen3 has no rope scaling llama3"),
    "no biases": ("starcoder2", {"use_bias": False, "num_attention_heads": 4}, "starcoder2 cannot compute this model"),
    "output biases": ("ernie4_5", {"use_bias": True}, "ernie4_5 does not load attention.o bias"),
    "no rope beside windows": (
        "exaone4, windows, others without rope",
        {"num_attention_heads": 4},
        "exaone4 cannot compute this model: attention of layer 1: rotary",
    ),
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


def with_formats(folder: Path, dense, attention: str | None, mlp: str | None, tables: str | None):
    """The dense model rounded to formats by name."""
    attention, mlp, tables = (WEIGHT_FORMATS[name] if name else None for name in (attention, mlp, tables))
    target = dense.decoder.with_formats([(attention, mlp)] * len(dense.decoder.layers), tables, tables)
    return rounded(dense, target, folder)


def check_values(model, path: Path) -> dict[str, str]:
    """The file holds, as the gguf package reads it, exactly what a file of the same values in floats does, and reads
    back as these; returns the types of its tensors."""
    export_gguf(model, path)
    plain = as_floats(replace(model, decoder=replace(model.decoder, residual_scale=1.0)))  # as it is with codes
    plain_path = export_gguf(plain, path.with_name("floats.gguf"))
    expected = read_gguf(plain_path).tensors
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        values = dequantize(tensor.data, tensor.tensor_type).reshape(expected[name].shape)
        assert np.array_equal(values, expected[name].values()), name
    ours, theirs = load_model(str(path)), load_model(str(plain_path))
    assert ours.decoder == theirs.decoder
    for name, weight in theirs.weights.items():
        assert torch.equal(ours.weights[name], weight), name
    return {name: tensor.tensor_type.name for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED)
def test_weights_of_few_bits_keep_their_values(tmp_path, case):
    """llama.cpp rounds the inputs to 8 bits, which changes the logits of these small models by up to 0.65 nats; another
    order of the rows of q and k changes them by 1.2 to 7."""
    model = with_formats(tmp_path / "rounded", saved(tmp_path / "dense", case, dtype=torch.float32), *MIXED)
    kinds = Counter(check_values(model, tmp_path / "m.gguf").values())
    assert kinds["Q8_0"] >= 7
    assert kinds["Q4_0"] >= 6
    expected = reference(model.directory, prompt_of(model))
    found = LlamaCpp(tmp_path / "m.gguf").log_probabilities(prompt_of(model))
    assert np.abs(found - expected).max() < 0.8, np.abs(found - expected).max()


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "phi3", "smollm3", "granite"])
def test_llama_cpp_rounds_the_inputs_to_8_bits_and_nothing_else(tmp_path, case):
    model = with_formats(tmp_path / "rounded", saved(tmp_path / "dense", case), *MIXED)
    found = LlamaCpp(export_gguf(model, tmp_path / "m.gguf")).log_probabilities(prompt_of(model))
    plain, expected = (reference(model.directory, prompt_of(model), rounds) for rounds in (False, True))
    # Of the inputs, one that lies between two codes may fall on either side.
    assert np.abs(found - expected).max() < 0.5 * np.abs(plain - expected).max()


KINDS = {
    "int8": ("Q8_0", 7),
    "int4-32": ("Q4_0", 2),
    "w8a8": ("Q8_0", 7),  # the weights alone: llama.cpp rounds activations in its own way
    "int4-64": ("Q4_0", 2),
    "int4-128": ("Q4_0", 2),
    "int4-32-asymmetric": ("Q4_1", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", PACKED_FORMATS)
def test_every_format_has_its_type(tmp_path, form):
    widths = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    dense = saved(tmp_path / "dense", "llama", tie_word_embeddings=True, **widths)
    model = with_formats(tmp_path / "rounded", dense, form, form, form)
    kinds = check_values(model, tmp_path / "m.gguf")
    kind, file_type = KINDS[form]
    assert {name for name, other in kinds.items() if other != kind} == {name for name in kinds if "norm" in name}
    assert "output.weight" not in kinds  # the table is tied
    assert read_gguf(tmp_path / "m.gguf").fields["general.file_type"] == file_type
    again = load_model(str(tmp_path / "m.gguf"))
    for name, codes in model.quantised.items():
        assert torch.equal(again.weights[name], codes.dequantised())
    expected = reference(model.directory, PROMPT)
    found = LlamaCpp(tmp_path / "m.gguf").log_probabilities(PROMPT)
    assert np.abs(found - expected).max() < 0.6, np.abs(found - expected).max()


def test_floats_beside_weights_of_few_bits_keep_their_type(tmp_path):
    dense = saved(tmp_path / "dense", "mixtral", dtype=torch.float16)
    model = with_formats(tmp_path / "rounded", dense, None, "int4-32-asymmetric", "int8")
    export_gguf(model, tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    kinds = {name: tensor.type.name for name, tensor in file.tensors.items()}
    assert {kinds[f"blk.1.attn_{part}.weight"] for part in ("q", "k", "v", "output")} == {"F16"}
    assert {kinds[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"Q4_1"}
    assert (kinds["token_embd.weight"], kinds["blk.1.ffn_gate_inp.weight"]) == ("Q8_0", "F32")
    assert file.fields["general.file_type"] == 3
    experts = torch.stack([model.quantised[f"layers.1.mlp.experts.{e}.down"].dequantised() for e in range(4)])
    assert np.array_equal(file.tensors["blk.1.ffn_down_exps.weight"].values(), experts.numpy())


def test_a_tied_table_that_the_architecture_needs_twice_is_written_twice(tmp_path):
    dense = saved(tmp_path / "dense", "olmo2", tie_word_embeddings=True)
    kinds = check_values(with_formats(tmp_path / "rounded", dense, *MIXED), tmp_path / "m.gguf")
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q8_0", "Q8_0")


def test_weights_whose_rows_are_no_whole_blocks_become_fp32(tmp_path, caplog):
    dense = narrowed(saved(tmp_path / "dense", "llama"), tmp_path / "narrow", (1, 1, 80))
    kinds = check_values(with_formats(tmp_path / "rounded", dense, "int8", "int8", "int8"), tmp_path / "m.gguf")
    fp32 = {name for name, kind in kinds.items() if kind == "F32" and "norm" not in name}
    assert fp32 == {f"blk.{layer}.{part}.weight" for layer in range(3) for part in ("attn_output", "ffn_down")}
    assert "6 matrices of few bits, such as blk.0.attn_output.weight, are fp32 in the GGUF file" in caplog.text


FILLED = {  # widths of the heads that are left, and the matrices that heads of zeros change
    "whole blocks": ("starcoder2", {"hidden_size": 128, "head_dim": 32}, ()),
    "parts of blocks": ("starcoder2", {}, ("attn_output",)),
    "a norm over all heads": ("olmo2", {"hidden_size": 128, "head_dim": 32}, ("attn_q", "attn_k")),
}


@pytest.mark.parametrize(("case", "changes", "fp32"), FILLED.values(), ids=FILLED)
def test_heads_of_zeros_are_blocks_of_zeros(tmp_path, case, changes, fp32):
    dense = narrowed(saved(tmp_path / "dense", case, **changes), tmp_path / "narrow", (2, 1, 96))
    kinds = check_values(with_formats(tmp_path / "rounded", dense, "int8", "int4-32", "int8"), tmp_path / "m.gguf")
    attention = {name: kind for name, kind in kinds.items() if "attn" in name and "norm" not in name}
    matrices = {name: kind for name, kind in attention.items() if name.endswith("weight")}
    assert {name.split(".")[2] for name, kind in matrices.items() if kind == "F32"} == set(fp32)


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
