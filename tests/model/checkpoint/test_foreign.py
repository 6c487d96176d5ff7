"""Checkpoints that other programs quantised: loaded as floats, described in words, or refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM, Mxfp4Config

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.foreign import foreign_of
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.load import load_model, load_outline, load_shape
from edgeprune.model.save import save_checkpoint
from tests.support.checkpoints import save_llama
from tests.support.families import save_family
from tests.support.foreign import arguments, awq, compressed, compressed_config, fp8, gptq, ordered, requantised
from tests.support.genai_loaders import unpacked
from tests.support.quantised import in_transformers, logits_of

INT4 = arguments(4, strategy="group", group_size=32)
UNEVEN = arguments(4, strategy="group", group_size=16, symmetric=False)
INT8 = arguments(8, strategy="channel")
FLOAT8 = arguments(8, strategy="channel", type="float")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [32, 32]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def is_layers(module):
    return "layers." in module or ".h." in module


def is_experts(module):
    return ".experts." in module


def packed_by(pack, chosen=is_layers):
    return lambda module, weight: pack(weight) if chosen(module) else None


MIXED = compressed_config(
    {
        "group_0": (["Linear"], INT4),
        "group_1": (["re:.*self_attn.*"], INT8),
        "group_2": (["model.layers.1.mlp.down_proj"], UNEVEN),
    },
    "pack-quantized",
    ignore=["lm_head", "re:.*layers.2.*"],
)


def pack_mixed(module, weight):
    if "layers.2" in module or not is_layers(module):
        return None
    args = UNEVEN if module == "model.layers.1.mlp.down_proj" else INT8 if "self_attn" in module else INT4
    return compressed(weight, "pack-quantized", args)


READ = {
    "several groups": ("llama", MIXED, pack_mixed, "8 bits with a scale for each output and 4 bits in groups of 16"),
    "in another order": (
        "qwen2",
        compressed_config({"group_0": (["Linear"], INT4)}, "pack-quantized", ignore=["lm_head"]),
        packed_by(lambda weight: ordered(weight, INT4)),
        "compressed-tensors, 4 bits in groups of 32",
    ),
    "int8": (
        "gemma2",
        compressed_config({"group_0": (["Linear"], INT8)}, "int-quantized"),
        packed_by(lambda weight: compressed(weight, "int-quantized", INT8)),
        "compressed-tensors, 8 bits with a scale for each output",
    ),
    "fp8, with the table": (
        "llama, llama3 rope, biases, untied",
        compressed_config({"group_0": (["Linear", "Embedding"], FLOAT8)}, "float-quantized"),
        lambda _, weight: compressed(weight, "float-quantized", FLOAT8),
        "compressed-tensors, FP8 with a scale for each output",
    ),
    "fp8 in blocks": ("qwen3_moe", FP8, packed_by(lambda weight: fp8(weight, [32, 32])), "FP8 in blocks of 32 x 32"),
    "fp8, fused": ("phi3", FP8, packed_by(lambda weight: fp8(weight, [32, 32])), "FP8 in blocks of 32 x 32"),
    "GPTQ": ("qwen2", GPTQ, packed_by(lambda weight: gptq(weight, 4, 32, 1, False, True)), "GPTQ, 4 bits in groups"),
    "GPTQ, transposed": ("gpt2", GPTQ, packed_by(lambda weight: gptq(weight, 4, 32, 1, False, True)), "GPTQ, 4 bits"),
    "GPTQ, other modules": (
        "granite",
        GPTQ
        | {
            "checkpoint_format": "gptq_v2",
            "desc_act": False,
            "dynamic": {"-:.*gate_proj": {}, "+:.*down": {"bits": 8}},
        },
        lambda module, weight: (
            None if "gate" in module or not is_layers(module) else gptq(weight, 8 if "down" in module else 4, 32, 2)
        ),
        "GPTQ, 4 bits in groups of 32 and 8 bits in groups of 32",
    ),
    "AWQ": ("phi3", AWQ, packed_by(lambda weight: awq(weight, 32)), "AWQ, 4 bits in groups of 32"),
    "AWQ of experts": (
        "mixtral",
        AWQ,
        packed_by(lambda weight: awq(weight, 32), is_experts),
        "AWQ, 4 bits in groups of 32",
    ),
}


@pytest.mark.parametrize(("case", "details", "pack", "words"), READ.values(), ids=READ)
def test_what_others_quantised_is_read_as_their_floats(tmp_path, case, details, pack, words):
    """Stacked and transposed tensors, norms that are shifted, factors, experts; what was left in floats stays so."""
    save_family(tmp_path / "dense", case)
    dense = load_model(str(tmp_path / "dense"))
    expected = requantised(tmp_path / "dense", tmp_path / "small", details, pack)
    model = load_model(str(tmp_path / "small"))
    assert model.decoder == dense.decoder == load_shape(str(tmp_path / "small"))[1]
    assert not model.quantised
    assert words in model.dequantised
    changed = [name for name in expected if not torch.equal(expected[name], dense.weights[name])]
    assert changed
    for name, weight in expected.items():
        assert torch.equal(model.weights[name], weight), name
        assert model.weights[name].dtype == (torch.float32 if name in changed else dense.weights[name].dtype)
    outline = load_outline(str(tmp_path / "small"))
    assert outline[1] == dense.decoder
    assert "the checkpoint is quantised" in outline[2][0]
    # What is made of it is a plain checkpoint.
    save_checkpoint(model.decoder, ((n, model.weights[n]) for n in model.decoder.shapes()), model, tmp_path / "again")
    assert not load_model(str(tmp_path / "again")).dequantised
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_experts_in_mxfp4_are_read_as_transformers_reads_them(tmp_path):
    """Every code and powers of two on both sides of one; the rest of the model is floats, and so are the biases."""
    save_family(tmp_path / "dense", "gpt_oss")
    folder, generator = tmp_path / "mxfp4", torch.Generator().manual_seed(0)
    shutil.copytree(tmp_path / "dense", folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(key).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 129, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(str(folder))
    assert model.dequantised == "MXFP4 in groups of 32; activations are floats here"
    assert "the checkpoint is quantised (mxfp4)" in load_outline(str(folder))[2][0]
    theirs = GptOssForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    held = dict(theirs.named_parameters())
    for layer in range(3):
        for name, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2)), ("down", slice(None))):
            stacked = held[f"model.layers.{layer}.mlp.experts.{'down' if name == 'down' else 'gate_up'}_proj"]
            for expert in range(4):
                own = model.weights[f"layers.{layer}.mlp.experts.{expert}.{name}"]
                assert torch.equal(own, stacked[expert].t()[rows])
    ids = torch.randint(0, 257, (2, 20), generator=generator)
    with torch.inference_mode():
        wanted = theirs(ids).logits[:, :-1]
    torch.testing.assert_close(token_logits(model.decoder, weight_stream(model), ids), wanted, rtol=1e-4, atol=1e-4)


LOGITS = {"int4": ("pack-quantized", INT4), "int8": ("pack-quantized", INT8), "fp8": ("float-quantized", FLOAT8)}


@pytest.mark.parametrize(("form", "args"), LOGITS.values(), ids=LOGITS)
def test_transformers_has_the_same_logits(tmp_path, form, args):
    """compressed-tensors is what it loads without a GPU or other packages."""
    save_family(tmp_path / "dense", "llama")
    details = compressed_config({"group_0": (["Linear"], args)}, form, ignore=["lm_head"])
    pack = packed_by(lambda weight: compressed(weight, form, args, torch.float32))
    requantised(tmp_path / "dense", tmp_path / "small", details, pack)
    model = load_model(str(tmp_path / "small"))
    save_checkpoint(model.decoder, ((n, model.weights[n]) for n in model.decoder.shapes()), model, tmp_path / "floats")
    ids = torch.arange(40).unflatten(0, (2, 20))
    theirs, ours = (logits_of(in_transformers(tmp_path / name), ids) for name in ("small", "floats"))
    assert torch.allclose(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


GENAI = {
    "GPTQ, 4 bits": (GPTQ | {"desc_act": False}, lambda weight: gptq(weight, 4, 32, 1, False)),
    "GPTQ, 8 bits": (GPTQ | {"desc_act": False, "bits": 8, "sym": True}, lambda weight: gptq(weight, 8, 32)),
    "AWQ": (AWQ, lambda weight: awq(weight, 32)),
}


@pytest.mark.parametrize(("details", "pack"), GENAI.values(), ids=GENAI)
def test_another_library_reads_the_same_numbers(tmp_path, details, pack):
    """Zeros of 0 are in none: that library does not borrow from the neighbours of a word."""
    save_llama(tmp_path / "dense", intermediate_size=96)
    requantised(tmp_path / "dense", tmp_path / "small", details, packed_by(pack))
    model = load_model(str(tmp_path / "small"))
    theirs = unpacked(tmp_path / "small", model.decoder)
    assert len(theirs) == 14
    for module, values in theirs.items():
        _, _, layer, kind, part = module.split(".")
        name = f"layers.{layer}.{kind.replace('self_attn', 'attention')}.{part.removesuffix('_proj')}"
        assert torch.equal(model.weights[name], values), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    save_llama(folder / "dense", hidden_size=96, intermediate_size=96)
    requantised(folder / "dense", folder / "gptq", GPTQ, packed_by(lambda weight: gptq(weight, 4, 32, 1, False, True)))
    requantised(folder / "dense", folder / "fp8", FP8, packed_by(lambda weight: fp8(weight, [32, 32])))
    details = compressed_config({"group_0": (["Linear"], UNEVEN)}, "pack-quantized")
    requantised(
        folder / "dense", folder / "packed", details, packed_by(lambda w: compressed(w, "pack-quantized", UNEVEN))
    )
    return folder


def edited(folder, change, **fields):
    path, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    stored = json.loads(config.read_text())
    config.write_text(json.dumps(stored | {"quantization_config": stored["quantization_config"] | fields}))


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(**changed):
    return lambda tensors: tensors.update({DOWN + name: tensor for name, tensor in changed.items()})


DOWN = "model.layers.0.mlp.down_proj."
NONE = without()
BAD = {
    "no zeros": ("gptq", without(DOWN + "qzeros"), {}, f"has no tensor {DOWN}qzeros"),
    "no codes": ("gptq", without(DOWN + "qweight"), {}, f"has no tensor {DOWN}qweight"),
    "no order": ("gptq", without(DOWN + "g_idx"), {}, f"has no tensor {DOWN}g_idx"),
    "other bits": ("gptq", NONE, {"bits": 8}, "config.json asks for"),
    "other groups": ("gptq", NONE, {"group_size": 64}, "config.json asks for"),
    "codes of another type": ("gptq", put(qweight=torch.zeros(12, 96)), {}, "is of type F32"),
    "scales of another type": ("gptq", put(scales=torch.zeros(3, 96, dtype=torch.int32)), {}, "is of type I32"),
    "floats beside codes": ("gptq", put(weight=torch.zeros(96, 96)), {}, "does not have"),
    "a bias that is none": ("gptq", put(bias=torch.ones(96)), {}, "biases that config.json does not describe"),
    "a quantised head that is tied": (
        "gptq",
        lambda held: held.update({"lm_head.qweight": held[DOWN + "qweight"].clone()}),
        {},
        "lm_head",
    ),
    "no scales": ("fp8", without(DOWN + "weight_scale_inv"), {}, f"has no tensor {DOWN}weight_scale_inv"),
    "scales of AutoFP8": (
        "fp8",
        lambda held: held.update({DOWN + "weight_scale": held.pop(DOWN + "weight_scale_inv")}),
        {},
        f"quantised: it has {DOWN}weight_scale",
    ),
    "scales of floats": ("fp8", put(weight=torch.zeros(96, 96)), {}, "is of type F32"),
    "other blocks": ("fp8", NONE, {"weight_block_size": [48, 96]}, "config.json asks for"),
    "another shape": ("packed", put(weight_shape=torch.tensor([96, 90])), {}, "says (96, 90)"),
    "no packed zeros": ("packed", without(DOWN + "weight_zero_point"), {}, f"has no tensor {DOWN}weight_zero_point"),
}


@pytest.mark.parametrize(("method", "change", "fields", "reason"), BAD.values(), ids=BAD)
def test_damage_is_said(tmp_path, whole, method, change, fields, reason):
    shutil.copytree(whole / method, tmp_path / "model")
    edited(tmp_path / "model", change, **fields)
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "model"))
    assert reason in caught.value.message
    assert caught.value.remedy


def test_weights_are_dequantised_when_they_are_asked_for(tmp_path, whole):
    shutil.copytree(whole / "gptq", tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    assert model.weights["layers.0.mlp.down"].any()
    edited(tmp_path / "model", lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "scales" in name])
    assert not model.weights["layers.0.mlp.down"].any()


def test_what_quantises_activations_is_left_out(tmp_path, whole):
    """And the zeros that older writers of GPTQ put beside matrices without a bias."""
    for method in ("gptq", "packed"):
        shutil.copytree(whole / method, tmp_path / method)
        before = dict(load_model(str(tmp_path / method)).weights)
        names = (
            ("bias", "input_scale", "output_zero_point") if method == "gptq" else ("input_scale", "activation_scale")
        )
        extra = {DOWN + name: torch.zeros(96) for name in names} | {"model.layers.0.self_attn.k_scale": torch.ones(1)}
        edited(tmp_path / method, lambda tensors, extra=extra: tensors.update(extra))
        after = load_model(str(tmp_path / method)).weights
        assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_pickled_weights_are_not_read(tmp_path, whole):
    shutil.copytree(whole / "gptq", tmp_path / "model")
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="read from safetensors alone"):
        load_model(str(tmp_path / "model"))


def one_group(form="pack-quantized", **weights):
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32} | weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


REFUSED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "(bitsandbytes)"),
    "hqq": ({"quant_method": "hqq"}, "(hqq)"),
    "quark": ({"quant_method": "quark"}, "(quark)"),
    "a word": ("int8", "(by an unnamed method)"),
    "no method": ({"bits": 4}, "(by an unnamed method)"),
    "a list for a method": ({"quant_method": ["gptq"]}, "(by an unnamed method)"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "(gptq, marlin)"),
    "marlin, older": (GPTQ | {"is_marlin_format": True}, "(gptq, is_marlin_format)"),
    "five bits": (GPTQ | {"bits": 5}, "(gptq, 5 bits"),
    "true bits": (GPTQ | {"bits": True}, "(gptq, True bits"),
    "bits in words": (GPTQ | {"bits": "4"}, "(gptq, 4 bits"),
    "no bits": ({"quant_method": "gptq"}, "(gptq, None bits"),
    "groups of none": (GPTQ | {"group_size": 0}, "in groups of 0"),
    "no pattern": (GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, "is no pattern"),
    "other modules of a list": (GPTQ | {"dynamic": []} | {"dynamic": [1]}, "dynamic: it is not"),
    "AWQ's gemv": (AWQ | {"version": "GEMV"}, "(awq, gemv"),
    "AWQ of 3 bits": (AWQ | {"bits": 3}, "(awq, gemm, 3 bits"),
    "llm-awq": (AWQ | {"backend": "llm-awq"}, "(awq,"),
    "scales of eight bits": (FP8 | {"scale_fmt": "ue8m0"}, "(fp8, ue8m0)"),
    "experts in fp4": (FP8 | {"expert_dtype": "fp4"}, "(fp8, fp4)"),
    "e5m2": (FP8 | {"fmt": "e5m2"}, "(fp8, e5m2)"),
    "half a block": (FP8 | {"weight_block_size": [128]}, "(fp8, [128])"),
    "nvfp4": (
        one_group("nvfp4-pack-quantized", type="float", strategy="tensor_group"),
        "nvfp4-pack-quantized of float4",
    ),
    "three bits": (one_group(num_bits=3), "pack-quantized of int3 by group"),
    "groups of a word": (one_group(group_size="32"), "of int4 by group"),
    "blocks of one number": (one_group(strategy="block", block_structure=[8]), "of int4 by block"),
    "a strategy that is none": (one_group(strategy=["group"]), "of int4"),
    "a type that is none": (one_group(type=["int"]), "compressed-tensors"),
    "not compressed": (one_group() | {"quantization_status": "frozen"}, "(compressed-tensors, frozen)"),
    "sparse": (one_group() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "(compressed-tensors, sparse)"),
    "turned": (one_group() | {"transform_config": {"config_groups": {"r3": {}}}}, "(compressed-tensors, transformed)"),
    "groups of a list": (one_group() | {"config_groups": []}, "config_groups is not"),
    "an ignored number": (one_group() | {"ignore": [3]}, "ignore: [0] is not"),
}


@pytest.mark.parametrize(("details", "reason"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_by_name(details, reason):
    with pytest.raises(InputError) as caught:
        foreign_of({"quantization_config": details})
    assert reason in caught.value.message
    assert caught.value.remedy


def test_floats_and_edgeprunes_own_are_of_nobody_else():
    assert foreign_of({"vocab_size": 3}) is None
    assert foreign_of({"quantization_config": None}) is None
    assert foreign_of(one_group() | {"edgeprune_embedding_format": "float"}) is None


def test_older_names_are_read():
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}
    assert foreign_of({"quantization_config": old}).words == "AWQ, 4 bits in groups of 64"
    assert foreign_of({"compression_config": one_group(strategy=None)}).words.endswith("4 bits in groups of 32")
    by_matrix = foreign_of({"quantization_config": FP8 | {"weight_block_size": None}})
    assert by_matrix.words.startswith("FP8 with one scale for each matrix; activations are floats here")
    rounded = one_group()
    rounded["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    assert foreign_of({"quantization_config": rounded}).words.endswith("; activations are floats here")
