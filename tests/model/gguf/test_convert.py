import json
import shutil

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType

from edgeprune.cache import temporary_folder
from edgeprune.errors import InputError
from edgeprune.model.gguf import convert
from edgeprune.model.gguf.convert import converted
from edgeprune.model.load import load_model, load_shape
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.gguf_files import SETTINGS, write
from tests.support.reference import decoder_of, weights_of
from tests.support.tiny import llama


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))


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


def test_a_turn_may_end_with_another_token(tmp_path):
    write(tmp_path / "m.gguf", llama(**SETTINGS), more=lambda writer: writer.add_eot_token_id(7))
    settings = json.loads((converted(tmp_path / "m.gguf") / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 0, "eos_token_id": [0, 7]}


def test_a_turn_that_ends_with_a_text_is_refused(tmp_path):
    write(
        tmp_path / "m.gguf",
        llama(**SETTINGS),
        more=lambda writer: writer.add_string("tokenizer.ggml.eot_token_id", "<end>"),
    )
    with pytest.raises(InputError, match="eot_token_id '<end>' is no token id"):
        converted(tmp_path / "m.gguf")


def test_without_a_cache_it_is_converted_into_a_folder_that_goes(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", llama(**SETTINGS))
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "occupied"))
    folder = converted(tmp_path / "m.gguf")
    assert folder.parent == temporary_folder()
    assert load_model(str(folder)).decoder.hidden_size == 96


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_folder_is_made_again(tmp_path, name):
    write(tmp_path / "m.gguf", llama(**SETTINGS))
    path = converted(tmp_path / "m.gguf") / name
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert converted(tmp_path / "m.gguf") == path.parent
    assert path.read_bytes() == whole


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", llama(**SETTINGS))
    first = convert._convert

    def overtaken(source, path, folder):
        first(source, path, folder)
        shutil.copytree(folder, folder.with_name(folder.name.split(".")[0]))

    monkeypatch.setattr(convert, "_convert", overtaken)
    folder = converted(tmp_path / "m.gguf")
    assert load_model(str(folder)).decoder.hidden_size == 96
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.files"]


def test_the_file_is_converted_once(tmp_path):
    write(tmp_path / "m.gguf", llama(**SETTINGS))
    folder = converted(tmp_path / "m.gguf")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted(tmp_path / "m.gguf") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.files"]


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("architecture", "kind", "reason"),
    [
        ("llama", "adapter", "a LoRA adapter"),
        ("clip", "mmproj", "mmproj"),
        ("clip", None, "mmproj"),
        ("llama", "x", "x"),
    ],
)
def test_a_file_that_is_no_whole_model_is_named(tmp_path, architecture, kind, reason):
    writer = GGUFWriter(tmp_path / "m.gguf", architecture)
    if kind:
        writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for read in (load_model, load_shape):
        with pytest.raises(InputError, match=f"no model of its own: .*{reason}"):
            read(str(tmp_path / "m.gguf"))


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(InputError, match="is a pointer of Git LFS"):
        load_model(str(tmp_path / "m.gguf"))
