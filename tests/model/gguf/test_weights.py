"""A folder in ggml's formats: its one file of weights is llama.cpp's, and reads back as exactly what was written."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from edgeprune.errors import InputError
from edgeprune.evaluate.walked import WalkRunner
from edgeprune.model.decoder import Decoder
from edgeprune.model.gguf.weights import MODEL_FILE
from edgeprune.model.load import load_model, load_shape
from edgeprune.model.model import Model
from edgeprune.model.quantised import QuantisedWeight
from edgeprune.model.save import save_checkpoint
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.model.tokens.vocabulary import Vocabulary
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.grids import choose_grid
from tests.support.families import EXPORTED
from tests.support.ggml_blocks import GGML_FORMATS, assert_equal
from tests.support.gguf_models import saved
from tests.support.llamacpp import LlamaCpp

PROMPT = [3, 5, 7, 11, 200]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
NEAR_TIE = 0.5  # of two logits
CHANGED = ("gemma2", "gemma3_text")  # have a scale of the scores that llama.cpp does not know
Stored = dict[str, torch.Tensor | QuantisedWeight]


def with_formats(decoder: Decoder, *names: str | None) -> Decoder:
    """names: of the formats of attentions, MLPs and tables."""
    attention, mlp, tables = (WEIGHT_FORMATS[name] if name else None for name in names)
    return decoder.with_formats([(attention, mlp)] * len(decoder.layers), tables, tables)


def rounded(dense: Model, decoder: Decoder) -> Stored:
    """The first heads and channels of the dense model, to nearest on the formats' grids."""
    weights: Stored = {}
    for name, shape in decoder.shapes().items():
        weight = dense.weights[name][tuple(map(slice, shape))]
        if form := decoder.weight_formats.get(name):
            weight = choose_grid(weight.float(), torch.ones(shape[1]), form, "starts").nearest(weight.float())
        weights[name] = weight
    return weights


def write(dense: Model, decoder: Decoder, folder: Path) -> tuple[Model, Stored]:
    weights = rounded(dense, decoder)
    save_checkpoint(decoder, weights.items(), dense, folder)
    return load_model(str(folder)), weights


def check_read_back(model: Model, decoder: Decoder, weights: Stored) -> None:
    assert model.decoder.weight_formats == decoder.weight_formats
    assert list(model.quantised) == list(decoder.weight_formats)
    for name, weight in weights.items():
        if isinstance(weight, QuantisedWeight):
            assert_equal(model.quantised[name], weight)
            assert torch.equal(model.weights[name], weight.dequantised())
        else:
            assert torch.allclose(model.weights[name].float(), weight.float(), rtol=1e-6, atol=1e-6), name


def in_transformers(folder: Path) -> torch.nn.Module:
    """As transformers reads the file; from_pretrained(folder, gguf_file=...) does the same, but asks for accelerate."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, gguf_file=MODEL_FILE))
    tensors = load_gguf_checkpoint(folder / MODEL_FILE, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.float().eval()


def rounded_inputs(module: torch.nn.Module, inputs: tuple[torch.Tensor], block: int) -> tuple[torch.Tensor]:
    """As llama.cpp rounds what a matrix of few bits reads: to 8 bits, blocks of 32 by a scale in fp16, those of K types
    by one in fp32."""
    values = inputs[0].unflatten(-1, (-1, block))
    scales = values.abs().amax(dim=-1, keepdim=True) / 127
    codes = (values / scales).round()
    return (codes * (scales.half().float() if block == 32 else scales)).flatten(-2)


def log_probabilities(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1].double(), -1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EXPORTED if case not in CHANGED])
def test_every_family_reads_back_as_what_was_written(tmp_path, case):
    dense = saved(tmp_path / "dense", case, dtype=torch.float32)
    decoder = with_formats(dense.decoder, "q5_1", "q4_0", "q8_0")
    model, weights = write(dense, decoder, tmp_path / "blocks")
    check_read_back(model, decoder, weights)
    assert sorted(path.name for path in (tmp_path / "blocks").iterdir() if "token" not in path.name) == [
        "config.json",
        "generation_config.json",
        MODEL_FILE,
    ]
    assert load_shape(str(tmp_path / "blocks"))[1] == model.decoder
    # Written again it is the same file.
    save_checkpoint(model.decoder, model.stored.items(), model, tmp_path / "again")
    assert load_model(str(tmp_path / "again")).decoder == model.decoder


@pytest.mark.slow
@pytest.mark.parametrize("form", GGML_FORMATS)
def test_llama_cpp_and_transformers_read_every_format(tmp_path, form):
    dense = saved(tmp_path / "dense", "llama", **WIDE)
    decoder = with_formats(dense.decoder, form, form, "q6_k")
    model, weights = write(dense, decoder, tmp_path / "blocks")
    check_read_back(model, decoder, weights)
    transformers_model = in_transformers(tmp_path / "blocks")
    values = transformers_model.state_dict()
    assert torch.equal(values["model.layers.1.mlp.down_proj.weight"], weights["layers.1.mlp.down"].dequantised())
    assert torch.equal(values["model.layers.2.self_attn.q_proj.weight"], weights["layers.2.attention.q"].dequantised())
    assert torch.equal(values["model.embed_tokens.weight"], weights["embedding"].dequantised())
    text = "the the there"
    ids = AutoTokenizer.from_pretrained(tmp_path / "blocks")(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "dense")(text)["input_ids"]
    # With inputs rounded to 8 bits as well: one that lies between two codes may fall on either side.
    plain, found = log_probabilities(transformers_model), LlamaCpp(tmp_path / "blocks" / MODEL_FILE)
    for name, module in transformers_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            block = 256 if name == "lm_head" else GGML_FORMATS[form].multiple
            module.register_forward_pre_hook(partial(rounded_inputs, block=block))
    expected = log_probabilities(transformers_model)
    share = 2.0 if form in ("q4_1", "q5_1") else 0.8  # of these it has the sums of inputs in fp16 too
    assert np.abs(found.log_probabilities(PROMPT) - expected).max() < share * np.abs(plain - expected).max()


NARROWER = {"llama": (1, 2, 64), "qwen2": (1, 2, 64), "starcoder2": (2, 1, 64), "gpt2": (3, 1, 64)}


@pytest.mark.parametrize("case", NARROWER)
def test_heads_of_zeros_in_the_file_are_not_the_models(tmp_path, case):
    dense = saved(tmp_path / "dense", case, dtype=torch.float32, hidden_size=128, num_attention_heads=4, head_dim=32)
    decoder = with_formats(dense.decoder.with_widths(*NARROWER[case]), "q4_1", "q5_0", None)
    model, weights = write(dense, decoder, tmp_path / "blocks")
    assert model.decoder.layer_widths[0] == NARROWER[case]
    check_read_back(model, decoder, weights)
    assert np.isfinite(LlamaCpp(tmp_path / "blocks" / MODEL_FILE).log_probabilities(PROMPT)).all()


def test_floats_beside_codes_keep_the_type_that_was_asked_for(tmp_path):
    dense = saved(tmp_path / "dense", "mixtral", dtype=torch.float32)
    decoder = with_formats(dense.decoder, None, "q4_0", None)
    weights = rounded(dense, decoder)
    save_checkpoint(decoder, weights.items(), dense, tmp_path / "blocks", dtype=torch.bfloat16)
    model = load_model(str(tmp_path / "blocks"))
    assert model.weights["layers.0.attention.q"].dtype == torch.bfloat16
    assert model.weights["layers.0.attention.norm"].dtype == torch.float32
    assert torch.equal(model.weights["layers.0.attention.q"], weights["layers.0.attention.q"].bfloat16())
    assert_equal(model.quantised["layers.1.mlp.experts.2.down"], weights["layers.1.mlp.experts.2.down"])


def test_a_smaller_vocabulary_keeps_the_rows_of_its_tokens(tmp_path):
    dense = saved(tmp_path / "dense", "llama", tie_word_embeddings=False)
    kept = np.array([*range(200), *range(220, 260)])
    vocabulary = Vocabulary(kept)
    decoder = with_formats(dense.decoder, "q4_0", "q4_0", "q8_0")
    weights = rounded(dense, decoder)
    save_checkpoint(decoder.with_vocabulary(240), weights.items(), dense, tmp_path / "blocks", vocabulary)
    model = load_model(str(tmp_path / "blocks"))
    for name in ("embedding", "head"):
        assert_equal(model.quantised[name], weights[name].rows(torch.from_numpy(kept)))


def test_the_fingerprint_is_of_the_weights(tmp_path):
    dense = saved(tmp_path / "dense", "llama")
    decoder = with_formats(dense.decoder, "q4_0", "q4_0", None)
    first, _ = write(dense, decoder, tmp_path / "a")
    other = replace(dense, weights={name: weight * 1.01 for name, weight in dense.weights.items()})
    second, _ = write(other, decoder, tmp_path / "b")
    again, _ = write(dense, decoder, tmp_path / "c")
    assert first.fingerprint == again.fingerprint != second.fingerprint


REFUSED = {
    "olmo2": ({}, (1, 2, 96), "holds olmo2 with a norm over more heads"),
    "starcoder2": ({}, (1, 2, 96), "blocks of q4_0 do not hold blk.0.attn_output.weight: llama.cpp's starcoder2 needs"),
    "gemma2": ({}, (2, 2, 96), "holds gemma2 with another scale of the scores"),
    "opt": ({}, (4, 1, 96), "no architecture for the family opt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_file_holds_is_one_message(tmp_path, case):
    changes, widths, message = REFUSED[case]
    dense = saved(tmp_path / "dense", case, **changes)
    decoder = with_formats(dense.decoder.with_widths(*widths), "q4_0", None, None)
    with pytest.raises(InputError) as caught:
        write(dense, decoder, tmp_path / "blocks")
    assert message in caught.value.message
    assert caught.value.remedy


def test_formats_of_two_kinds_are_refused(tmp_path):
    dense = saved(tmp_path / "dense", "llama")
    with pytest.raises(InputError, match="no file holds the weight formats int8, q4_0 together"):
        write(dense, with_formats(dense.decoder, "int8", "q4_0", None), tmp_path / "blocks")


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


DAMAGE = {
    "no file": (lambda folder: (folder / MODEL_FILE).unlink(), f"has no {MODEL_FILE}, which its config.json asks for"),
    "cut off": (
        lambda folder: (folder / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes()[:9999]),
        "is damaged or truncated",
    ),
    "another format": (
        lambda folder: change_config(folder, edgeprune_formats={"layers.0.mlp": "q4_1"}),
        "of type Q4_0 and shape",
    ),
    "an unknown one": (
        lambda folder: change_config(folder, edgeprune_formats={"layers.0.mlp": "q9_9"}),
        "edgeprune_formats 'q9_9' is not a weight format",
    ),
    "an unknown module": (
        lambda folder: change_config(folder, edgeprune_formats={"layers.7.mlp": "q4_0"}),
        "edgeprune_formats names layers.7.mlp, which is no module",
    ),
    "not a table": (lambda folder: change_config(folder, edgeprune_formats=[1]), "edgeprune_formats"),
    "other widths": (lambda folder: change_config(folder, intermediate_size=64), "config.json asks for"),
    "another tie": (lambda folder: change_config(folder, tie_word_embeddings=False), "differ in the tensor output"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_one_message(tmp_path, damage, message):
    dense = saved(tmp_path / "dense", "llama", tie_word_embeddings=True)
    write(dense, with_formats(dense.decoder, "q4_0", "q4_0", None), tmp_path / "blocks")
    damage(tmp_path / "blocks")
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "blocks"))
    assert message in caught.value.message
    assert caught.value.remedy


@pytest.mark.slow
@pytest.mark.demo
def test_llama_cpp_continues_with_the_tokens_of_our_own_walk(tmp_path):
    """Of the demo in formats of 32, which its rows take; but for near ties, since llama.cpp rounds what it multiplies
    with such matrices to 8 bits."""
    dense = load_model("demo")
    model, _ = write(dense, with_formats(dense.decoder, "q5_0", "q4_1", "q8_0"), tmp_path / "blocks")
    prompt = load_tokenizer(dense.directory)("The capital of France is")["input_ids"]
    theirs = [token["id"] for token in LlamaCpp(tmp_path / "blocks" / MODEL_FILE).generate(prompt, 8)]
    runner = WalkRunner(model, 64)
    logits = runner.run(np.array([prompt]))[0]
    agreed = 0
    for token in theirs:
        ours = int(np.argmax(logits))
        if ours != token:
            assert logits[ours] - logits[token] < NEAR_TIE
            break
        logits, agreed = runner.run(np.array([[token]]))[0], agreed + 1
    assert agreed >= 4
