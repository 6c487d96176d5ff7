import json
import shutil

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import quantize

from edgeprune.errors import InputError
from edgeprune.model.gguf import convert
from edgeprune.model.gguf.convert import converted
from edgeprune.model.gguf.names import LAYER, OUTER
from edgeprune.model.load import load_model, load_shape
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.checkpoints import LETTERS, SPECIAL
from tests.support.reference import decoder_of, weights_of
from tests.support.tiny import llama

SETTINGS = {"vocab_size": 257, "hidden_size": 96, "head_dim": 16, "max_position_embeddings": 256}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The row order of q and k in GGUF files: llama.cpp's converter, `permute`."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, reference, quantised=None, architecture="llama", pre="gpt-2", model="gpt2", drop=(), more=None):
    """A reference model as llama.cpp's converter writes it; `more` gets the writer before it writes."""
    config, decoder = reference.config, decoder_of(reference.config)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(96)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(SPECIAL + LETTERS)
    writer.add_token_types([3] + [1] * 256)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    weights = weights_of(reference)
    heads = {"attention.q": config.num_attention_heads, "attention.k": config.num_key_value_heads}
    for name in decoder.shapes():
        weight = weights[name]
        if name.startswith("layers."):
            _, index, part = name.split(".", 2)
            target = f"blk.{index}.{LAYER[part]}.weight"
            if part in heads:
                weight = interleaved(weight, heads[part])
        else:
            target = OUTER[name]
        if target in drop:
            continue
        data = weight.float().numpy()
        if quantised is not None and data.ndim == 2:
            writer.add_tensor(target, quantize(data, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(target, data)
    if more is not None:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_gives_the_weights_it_was_made_from(tmp_path, tied):
    reference = llama(**SETTINGS, tie_word_embeddings=tied)
    write(tmp_path / "m.gguf", reference)
    shape = load_shape(str(tmp_path / "m.gguf"))
    model = load_model(str(tmp_path / "m.gguf"))
    assert shape == ("m", model.decoder)
    assert model.decoder.rotaries[0].inverse_frequencies == pytest.approx(
        decoder_of(reference.config).rotaries[0].inverse_frequencies
    )
    assert model.decoder.norm_eps == reference.config.rms_norm_eps
    assert all(torch.equal(model.weights[name], weight) for name, weight in weights_of(reference).items())


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.F16])
def test_quantised_types_are_dequantised(tmp_path, kind):
    reference = llama(**SETTINGS)
    write(tmp_path / "m.gguf", reference, kind)
    model = load_model(str(tmp_path / "m.gguf"))
    step = {"Q8_0": 1 / 127, "Q4_1": 2 / 15, "F16": 1e-3}[kind.name]
    for name, weight in weights_of(reference).items():
        assert (model.weights[name].float() - weight).abs().max() <= step * weight.abs().max()
    expected = torch.float16 if kind.name == "F16" else torch.float32
    assert model.weights["layers.0.mlp.up"].dtype == expected


def test_matrices_of_several_types_become_fp32(tmp_path):
    """Only the embedding is fp16; nothing of the fp32 matrices may be lost."""
    reference = llama(**SETTINGS)
    embedding = weights_of(reference)["embedding"].half()

    def more(writer):
        writer.add_tensor("token_embd.weight", embedding.numpy())

    write(tmp_path / "m.gguf", reference, drop=("token_embd.weight",), more=more)
    model = load_model(str(tmp_path / "m.gguf"))
    assert torch.equal(model.weights["embedding"], embedding.float())
    assert torch.equal(model.weights["layers.1.mlp.up"], weights_of(reference)["layers.1.mlp.up"])


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}], ids=str)
def test_rope_scalings_come_along(tmp_path, rope):
    settings = SETTINGS | {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    reference = llama(**settings, rope_parameters=dict(rope))
    expected = np.array(decoder_of(reference.config).rotaries[0].inverse_frequencies)

    def more(writer):
        if rope is LLAMA3:
            dense = 10000.0 ** -(np.arange(0, 64, 2) / 64)
            writer.add_tensor("rope_freqs.weight", (dense / expected).astype(np.float32))
        else:
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(2.0)

    write(tmp_path / "m.gguf", reference, more=more)
    model = load_model(str(tmp_path / "m.gguf"))
    assert np.allclose(model.decoder.rotaries[0].inverse_frequencies, expected, rtol=1e-5)
    weights = weights_of(reference)
    assert all(torch.equal(model.weights[name], weight) for name, weight in weights.items())


SPELLINGS = {
    "no type": ({"llama.rope.scaling.factor": 2.0}, 2.0),
    "the old name": ({"llama.rope.scale_linear": 2.0}, 2.0),
    "both names": ({"llama.rope.scale_linear": 4.0, "llama.rope.scaling.factor": 2.0}, 2.0),
    "linear by nothing": ({"llama.rope.scaling.type": "linear"}, 1.0),
    "none": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, 1.0),
}


@pytest.mark.parametrize(("fields", "factor"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_linear_rope_scaling_is_read(tmp_path, fields, factor):
    def more(writer):
        for key, value in fields.items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)

    reference = llama(**SETTINGS)
    write(tmp_path / "m.gguf", reference, more=more)
    expected = np.array(decoder_of(reference.config).rotaries[0].inverse_frequencies) / factor
    ours = load_model(str(tmp_path / "m.gguf")).decoder.rotaries[0].inverse_frequencies
    assert np.allclose(ours, expected, rtol=1e-6)


def test_a_turn_may_end_with_another_token(tmp_path):
    write(tmp_path / "m.gguf", llama(**SETTINGS), more=lambda writer: writer.add_eot_token_id(7))
    settings = json.loads((converted(tmp_path / "m.gguf") / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 0, "eos_token_id": [0, 7]}


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", llama(**SETTINGS))
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(InputError) as caught:
        converted(tmp_path / "m.gguf")
    assert "EDGEPRUNE_CACHE" in caught.value.remedy


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", llama(**SETTINGS))
    first = convert._convert

    def overtaken(source, path, folder):
        first(source, path, folder)
        shutil.copytree(folder, folder.with_name(folder.name.split(".")[0]))

    monkeypatch.setattr(convert, "_convert", overtaken)
    folder = converted(tmp_path / "m.gguf")
    assert load_model(str(folder)).decoder.hidden_size == 96
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_file_is_converted_once(tmp_path):
    write(tmp_path / "m.gguf", llama(**SETTINGS))
    folder = converted(tmp_path / "m.gguf")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted(tmp_path / "m.gguf") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_tokenizer_and_its_template_come_along(tmp_path):
    write(tmp_path / "m.gguf", llama(**SETTINGS))
    tokenizer = load_tokenizer(converted(tmp_path / "m.gguf"))
    ids = tokenizer("naïve 12 <|end|> x")["input_ids"]
    assert 0 in ids
    assert tokenizer.decode(ids) == "naïve 12 <|end|> x"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi<|end|>"
    assert tokenizer.eos_token_id == 0


def with_tensor(name, size):
    return lambda writer: writer.add_tensor(name, np.linspace(5, 1, size, dtype=np.float32))


def unknown_type(writer):
    writer.add_tensor("blk.1.ffn_up.weight", np.zeros((64, 96), np.int8))


BAD = {
    "another architecture": ({"architecture": "rwkv"}, "unsupported GGUF architecture 'rwkv'"),
    "another pre-tokenizer": ({"pre": "klingon"}, "unsupported GGUF pre-tokenizer 'klingon'"),
    "another tokenizer": ({"model": "morse"}, "unsupported GGUF tokenizer 'morse'"),
    "a missing tensor": ({"drop": ("blk.1.ffn_up.weight",)}, "has no tensor blk.1.ffn_up.weight"),
    "half of the biases": ({"more": with_tensor("blk.0.attn_q.bias", 96)}, "has no tensor blk.0.attn_k.bias"),
    "one of several files": ({"more": lambda writer: writer.add_uint16("split.count", 3)}, "one of 3 parts"),
    "another type": ({"more": unknown_type, "drop": ("blk.1.ffn_up.weight",)}, "ffn_up.weight of type I8"),
    "experts": ({"more": with_tensor("blk.0.ffn_gate_inp.weight", 8)}, "has the tensor blk.0.ffn_gate_inp.weight"),
    "too few rope factors": ({"more": with_tensor("rope_freqs.weight", 4)}, "4 rope_freqs.weight for 8 pairs"),
    "half rotated": ({"more": lambda writer: writer.add_rope_dimension_count(8)}, "rotates 8 of 16"),
    "another rope": ({"more": lambda writer: writer.add_rope_scaling_type(RopeScalingType.YARN)}, "'yarn'"),
    "widths by layer": ({"more": lambda writer: writer.add_feed_forward_length([64, 32])}, "differs between layers"),
    "no layers": ({"more": lambda writer: writer.add_block_count(0)}, "num_hidden_layers 0"),
    "far too many layers": ({"more": lambda writer: writer.add_block_count(2**31)}, "num_hidden_layers 2147483648"),
}


@pytest.mark.parametrize(("options", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_be_converted_is_named_and_leaves_nothing(tmp_path, options, reason):
    write(tmp_path / "m.gguf", llama(**SETTINGS), **options)
    with pytest.raises(InputError) as caught:
        converted(tmp_path / "m.gguf")
    assert reason in caught.value.message
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("size", [2, 200, 3000, -50])
def test_a_truncated_or_foreign_file_is_refused(tmp_path, size):
    write(tmp_path / "m.gguf", llama(**SETTINGS))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:size])
    with pytest.raises(InputError):
        converted(tmp_path / "cut.gguf")


@pytest.mark.demo
def test_the_demo_is_read_as_its_package_says():
    model = load_model("demo")
    attention = model.decoder.layers[0].attention
    assert (model.decoder.parameters, len(model.decoder.layers)) == (134_515_008, 30)
    assert (attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim) == (9, 3, 64)
    tokenizer = load_tokenizer(model.directory)
    for text in ("Hello  world 1234", "été\n\tdef f(x):\n", "日本語 🙂", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode([i]) for i in tokenizer("a 123")["input_ids"]] == ["a", " ", "1", "2", "3"]
    assert json.loads((model.directory / "config.json").read_text())["rms_norm_eps"] == 1e-5
    assert np.isfinite(model.weights["layers.29.mlp.down"].numpy()).all()
