import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from edgeprune.errors import InputError
from edgeprune.model.gguf import LAYER, OUTER, converted
from edgeprune.model.load import load_model, load_tokenizer
from tests.checkpoints import LETTERS, SPECIAL
from tests.reference import decoder_of, weights_of
from tests.tiny import llama

SETTINGS = {"vocab_size": 257, "hidden_size": 96, "head_dim": 16, "max_position_embeddings": 256}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The row order of q and k in GGUF files: llama.cpp's converter, `permute`."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, reference, quantised=None, architecture="llama", pre="gpt-2", model="gpt2", drop=()):
    config, decoder = reference.config, decoder_of(reference.config)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(96)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(SPECIAL + LETTERS)
    writer.add_token_types([3] + [1] * 256)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    weights = weights_of(reference)
    for name in decoder.shapes():
        weight = weights[name]
        if name.startswith("layers."):
            _, index, part = name.split(".", 2)
            target = f"blk.{index}.{LAYER[part]}.weight"
            if part in ("attention.q", "attention.k"):
                weight = interleaved(weight, 6 if part.endswith("q") else 2)
        else:
            target = f"{OUTER[name]}.weight"
        if target in drop:
            continue
        data = weight.float().numpy()
        if quantised is not None and data.ndim == 2:
            writer.add_tensor(target, quantize(data, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_gives_the_weights_it_was_made_from(tmp_path, tied):
    reference = llama(**SETTINGS, tie_word_embeddings=tied)
    write(tmp_path / "m.gguf", reference)
    model = load_model(str(tmp_path / "m.gguf"))
    assert model.decoder.rotary.inverse_frequencies == pytest.approx(
        decoder_of(reference.config).rotary.inverse_frequencies
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


BAD = {
    "another architecture": ({"architecture": "rwkv"}, "unsupported GGUF architecture 'rwkv'"),
    "another pre-tokenizer": ({"pre": "klingon"}, "unsupported GGUF pre-tokenizer 'klingon'"),
    "another tokenizer": ({"model": "morse"}, "unsupported GGUF tokenizer 'morse'"),
    "a missing tensor": ({"drop": ("blk.1.ffn_up.weight",)}, "has no tensor blk.1.ffn_up.weight"),
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
