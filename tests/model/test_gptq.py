"""A checkpoint in GPTQ's layout: what another library unpacks from it are the codes, and a float stays a float."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from edgeprune.errors import InputError
from edgeprune.model.gptq import check_gptq, export_gptq, gptq_format, pack
from edgeprune.model.load import load_model
from edgeprune.model.quantised import QuantisedWeight
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.families import PICTURES, save_family
from tests.support.genai_loaders import unpacked
from tests.support.gguf_models import narrowed, saved
from tests.support.rounded_models import rounded

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
FORMATS = ("int8", "int4-32", "int4-64", "int4-128")


def with_format(folder: Path, dense, form: str, tables: str | None = "int8"):
    return rounded(dense, dense.decoder.with_format(WEIGHT_FORMATS[form], tables and WEIGHT_FORMATS[tables]), folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3_text"])
def test_another_library_unpacks_the_same_numbers(tmp_path, case, form):
    model = with_format(tmp_path / "rounded", saved(tmp_path / "dense", case, dtype=torch.float32, **WIDE), form)
    export_gptq(model, tmp_path / "gptq")
    values = unpacked(tmp_path / "gptq", model.decoder)
    names = {"attention": "self_attn", "mlp": "mlp"}
    codes = {name: weight for name, weight in model.quantised.items() if name.startswith("layers.")}
    assert len(values) == len(codes) == 21
    for name, weight in codes.items():
        _, layer, kind, part = name.split(".")
        assert torch.equal(values[f"model.layers.{layer}.{names[kind]}.{part}_proj"], weight.dequantised()), name


@pytest.mark.parametrize("form", FORMATS)
def test_the_tensors_are_those_of_the_layout(form):
    """The words as the layout defines them, one code after the other."""
    weight_format = WEIGHT_FORMATS[form]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(weight_format.least, weight_format.most + 1, (16, 128), generator=generator)
    groups, bits = weight_format.groups_of(128), weight_format.bits
    scales = torch.arange(1, 16 * groups + 1).float().unflatten(0, (16, groups))
    packed = pack(QuantisedWeight(weight_format, codes.to(torch.int8), scales))
    packed = {name: tensor.numpy() for name, tensor in packed.items()}
    per_word, middle = 32 // bits, 2 ** (bits - 1)
    for i, o in ((0, 0), (1, 0), (7, 3), (127, 15), (64, 8)):
        word = int(packed["qweight"][i // per_word, o]) >> (i % per_word * bits) & (2**bits - 1)
        assert word == int(codes[o, i]) + middle
        zero = int(packed["qzeros"][packed["g_idx"][i], o // per_word]) >> (o % per_word * bits) & (2**bits - 1)
        assert zero + 1 == middle
        assert packed["scales"][packed["g_idx"][i], o] == scales[o, i * groups // 128]
    assert {name: (str(t.dtype), t.shape) for name, t in packed.items()} == {
        "qweight": ("int32", (128 // per_word, 16)),
        "qzeros": ("int32", (groups, 16 // per_word)),
        "scales": ("float16", (groups, 16)),
        "g_idx": ("int32", (128,)),
    }


def test_what_is_no_matrix_of_a_layer_is_fp16(tmp_path):
    model = with_format(tmp_path / "rounded", saved(tmp_path / "dense", "qwen2", **WIDE), "int4-64")
    export_gptq(model, tmp_path / "gptq")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    floats = {name for name, tensor in tensors.items() if tensor.dtype == torch.float16 and "scales" not in name}
    assert {name.split(".")[-1] for name in floats} == {"weight", "bias"}
    assert torch.equal(tensors["model.embed_tokens.weight"], model.weights["embedding"].half())
    config = AutoConfig.from_pretrained(tmp_path / "gptq")
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    assert config.quantization_config.items() >= expected.items()
    assert config.quantization_config["checkpoint_format"] == "gptq"
    own = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert own.items() >= config.quantization_config.items()
    assert (tmp_path / "gptq" / "tokenizer.json").is_file()


@pytest.mark.parametrize("form", FORMATS)
def test_it_is_read_back_as_the_numbers_of_its_codes(tmp_path, form):
    model = with_format(tmp_path / "rounded", saved(tmp_path / "dense", "qwen2", dtype=torch.float32, **WIDE), form)
    export_gptq(model, tmp_path / "gptq")
    again = load_model(str(tmp_path / "gptq"))
    assert again.dequantised.startswith("GPTQ, ")
    assert again.decoder == model.decoder.with_format(None)
    for name, weight in model.quantised.items():
        if name.startswith("layers."):
            assert torch.equal(again.weights[name], weight.dequantised())


def test_fused_matrices_and_heads_of_zeros_keep_their_rows(tmp_path):
    """q, k and v stand head by head in one matrix; a third of the heads is gone, and zeros take their place."""
    dense = saved(tmp_path / "dense", "gpt_neox", hidden_size=128, num_attention_heads=4)
    model = with_format(tmp_path / "rounded", narrowed(dense, tmp_path / "narrow", (3, 1, 96)), "int4-32")
    export_gptq(model, tmp_path / "gptq")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    floats = load_file(tmp_path / "rounded" / "model.safetensors")
    for name in ("attention.query_key_value", "attention.dense", "mlp.dense_4h_to_h"):
        key = f"gpt_neox.layers.1.{name}"
        words = tensors[f"{key}.qweight"].T.contiguous().numpy().view(np.uint32)  # (out, words)
        codes = torch.from_numpy((words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).astype(np.int64) - 8)
        scales = tensors[f"{key}.scales"].float().T[:, tensors[f"{key}.g_idx"].long()]
        assert torch.equal(codes.flatten(1) * scales, floats[f"{key}.weight"])


def test_granites_factor_is_multiplied_into_the_weights(tmp_path):
    model = with_format(tmp_path / "rounded", saved(tmp_path / "dense", "granite", **WIDE), "int8")
    export_gptq(model, tmp_path / "gptq")
    values = unpacked(tmp_path / "gptq", model.decoder)
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["residual_multiplier"] == 1.0
    expected = model.quantised["layers.2.mlp.down"].dequantised()
    assert torch.equal(values["model.layers.2.mlp.down_proj"], expected)


@pytest.mark.parametrize(
    ("attention", "mlp", "reason"),
    [
        ("int8", "int4-32", "the attention of layer 0 is in int8, the MLP of layer 0 in int4-32"),
        ("int4-32", None, "has no format float, which the MLP of layer 0 is in"),
        ("int4-32-asymmetric",) * 2 + ("has no format int4-32-asymmetric, which the attention of layer 0 is in",),
    ],
)
def test_another_format_than_one_for_all_is_refused(tmp_path, attention, mlp, reason):
    decoder = saved(tmp_path / "dense", "llama").decoder
    formats = [(WEIGHT_FORMATS[attention], mlp and WEIGHT_FORMATS[mlp])] * 3
    with pytest.raises(InputError) as caught:
        gptq_format(decoder.with_formats(formats, None, None))
    assert reason in caught.value.message
    assert caught.value.remedy == "Give one of them: --weights int8|int4-32|int4-64|int4-128."


@pytest.mark.parametrize("case", [*PICTURES, "mixtral", "gpt2"])
def test_what_the_layout_cannot_hold_is_refused_before_any_work(tmp_path, case):
    save_family(tmp_path / case, case)
    with pytest.raises(InputError, match=case.replace("mixtral", "of experts")):
        check_gptq(load_model(str(tmp_path / case)).decoder)


def test_widths_that_fill_no_words_are_refused(tmp_path):
    dense = narrowed(saved(tmp_path / "dense", "llama"), tmp_path / "narrow", (2, 2, 78))
    model = with_format(tmp_path / "rounded", dense, "int8")
    with pytest.raises(InputError, match=r"mlp\.gate_proj\.weight of 78x64 does not fill words of 4 codes"):
        export_gptq(model, tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()
