"""The codec against an independent implementation and transformers' image processor; what files it refuses."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgeprune.errors import InputError, NumericalError
from edgeprune.model.codec.codec import check_codec, clusters_of, load_codec
from edgeprune.model.codec.layers import CODEBOOK
from edgeprune.model.decoder import Decoder, Picture
from tests.support.vq import small_vq


def stored(model, kind, path):
    """The model in one of the forms in which codecs are found."""
    weights = model.state_dict()
    args = Namespace(codebook_size=64, vq_model="VQ-16", data_path="/data")
    forms = {
        "model": {
            "model": weights,
            "ema": {name: tensor + 1 for name, tensor in weights.items()},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
            "steps": 7,
            "args": args,
        },
        "state_dict": {"state_dict": weights},
        "bare": weights,
    }
    if kind == "safetensors":
        save_file(weights, path / "vq.safetensors")
        return path / "vq.safetensors"
    torch.save(forms[kind], path / "vq.pt")
    return path / "vq.pt"


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("model", {}),
        ("state_dict", {"base": 64, "multipliers": (1, 2), "blocks": 1}),
        ("bare", {"multipliers": (2, 3, 3), "size": 4, "latent": 96, "codes": 100}),
        ("safetensors", {"multipliers": (1, 2, 2, 1)}),
    ],
)
def test_every_form_and_size_decodes_and_encodes_as_the_modules_do(tmp_path, kind, sizes):
    model = small_vq(**sizes)
    codec = load_codec(stored(model, kind, tmp_path))
    codes_known, levels = model.quantize.embedding.weight.shape[0], len(model.decoder.conv_blocks)
    assert (codec.vocab_size, codec.downsample, codec.has_encoder) == (codes_known, 2 ** (levels - 1), True)
    codes = torch.randint(0, codes_known, (3, 25))
    images = codec.decode(codes)
    assert images.shape == (3, 3, 5 * codec.downsample, 5 * codec.downsample)
    torch.testing.assert_close(images, model.decode(codes), atol=1e-5, rtol=1e-5)
    images = torch.rand(3, 3, 4 * codec.downsample, 6 * codec.downsample) * 2 - 1
    encoded = codec.encode(images)
    assert encoded.shape == (3, 24)
    assert torch.equal(encoded, model.encode(images))
    assert len(encoded.unique()) > 3


def test_images_pass_in_pieces_and_half_precision_is_read(tmp_path, monkeypatch):
    model = small_vq()
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, tmp_path / "vq.pth")
    codec = load_codec(tmp_path / "vq.pth")
    model.half().float()
    codes = torch.randint(0, 64, (5, 16))
    whole = codec.decode(codes)
    torch.testing.assert_close(whole, model.decode(codes), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("edgeprune.model.codec.codec.PIXELS_AT_ONCE", 2 * 16 * 16)
    torch.testing.assert_close(codec.decode(codes), whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(codec.encode(whole), model.encode(whole))


def test_a_decoder_alone_decodes_and_says_that_it_cannot_encode(tmp_path):
    model = small_vq(multipliers=(2, 3))
    weights = {name: t for name, t in model.state_dict().items() if not name.startswith(("encoder.", "quant_conv."))}
    torch.save({"model": weights}, tmp_path / "vq.pt")
    codec = load_codec(tmp_path / "vq.pt")
    assert not codec.has_encoder
    codes = torch.randint(0, 64, (1, 9))
    torch.testing.assert_close(codec.decode(codes), model.decode(codes), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="no encoder"):
        codec.encode(torch.zeros(1, 3, 8, 8))


def test_the_fingerprint_tells_files_apart(tmp_path):
    prints = set()
    for seed in (0, 1):
        torch.save(small_vq(seed).state_dict(), tmp_path / "vq.pt")
        prints |= {load_codec(tmp_path / "vq.pt").fingerprint, load_codec(tmp_path / "vq.pt").fingerprint}
    assert len(prints) == 2
    assert all(len(print_) == 64 for print_ in prints)


CUT, ODD = "decoder.mid.1.k.bias", "decoder.conv_blocks.1.res.0.nin_shortcut.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({CUT: None}, f"no tensor {CUT}"),
        ({ODD: torch.zeros(32, 64, 3, 3)}, rf"tensor {ODD} .* \(32, 64, 3, 3\), LlamaGen's codec \(32, 64, 1, 1\)"),
        ({"decoder.mid.3.norm.weight": torch.zeros(64)}, "a tensor decoder.mid.3.norm.weight"),
        ({CODEBOOK: None}, f"no tensor {CODEBOOK}"),
        ({CODEBOOK: torch.zeros(64)}, rf"{CODEBOOK} .* \(64,\)"),
        ({CODEBOOK: torch.full((64, 8), torch.nan)}, "not finite"),
        ({CODEBOOK: torch.zeros(64, 8, dtype=torch.int32)}, "of type torch.int32"),
        ({"encoder.conv_in.weight": None}, "no tensor encoder.conv_in.weight"),
        ({"encoder.conv_in.weight": torch.zeros(16, 3, 3, 3)}, "16 channels, which 32 groups do not divide"),
        ({"decoder.conv_blocks.7.res.0.conv1.weight": torch.zeros(32, 32, 3, 3)}, r"no tensor decoder.conv_blocks.3"),
    ],
)
def test_a_codec_with_other_tensors_is_refused_by_name(tmp_path, change, named):
    weights = small_vq().state_dict() | change
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, tmp_path / "vq.pt")
    with pytest.raises(InputError, match=named) as raised:
        load_codec(tmp_path / "vq.pt")
    assert "\n" not in raised.value.message
    assert raised.value.remedy
    assert isinstance(raised.value, NumericalError) == ("finite" in named)


class Mkdir:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_files_that_are_no_codec_are_one_message_each(tmp_path):
    file, victim = tmp_path / "vq.pt", tmp_path / "victim"

    def refused(match):
        with pytest.raises(InputError, match=match) as raised:
            load_codec(file)
        assert "\n" not in raised.value.message

    refused("is not a file")
    torch.save({"model": small_vq().state_dict(), "args": Mkdir(str(victim))}, file)
    refused("does not hold tensors alone")
    assert not victim.exists()
    torch.save({"model": small_vq().state_dict()}, file)
    file.write_bytes(file.read_bytes()[:-1000])
    refused("truncated")
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(64, 32), "output.weight": torch.zeros(64, 32)}}, file)
    refused(f"no tensor {CODEBOOK}")
    file = tmp_path / "vq.safetensors"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    refused("not a safetensors file")


def processor(side=32, colours=512):
    from transformers import ImageGPTImageProcessor

    clusters = np.random.default_rng(0).uniform(-1, 1, (colours, 3)).astype(np.float32)
    return ImageGPTImageProcessor(clusters=clusters, size={"height": side, "width": side})


def test_clusters_encode_as_transformers_does_and_decode_to_colours(tmp_path):
    own = processor()
    own.save_pretrained(tmp_path)
    codec = clusters_of(tmp_path)
    assert (codec.vocab_size, codec.side, codec.downsample) == (512, 32, 1)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    codes = codec.encode(torch.from_numpy(pixels).float() / 127.5 - 1)
    theirs = own(list(torch.from_numpy(pixels)), return_tensors="pt").input_ids
    assert (codes == theirs).float().mean() > 0.999  # but for ties
    images = codec.decode(codes)
    assert images.shape == (2, 3, 32, 32)
    row, column = 5, 17
    assert torch.equal(images[1, :, row, column], codec.clusters[codes[1, 32 * row + column]])
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"size": 32}))
    assert clusters_of(tmp_path).fingerprint == codec.fingerprint
    config.write_text(json.dumps(json.loads(config.read_text()) | {"size": 24}))
    assert clusters_of(tmp_path).fingerprint != codec.fingerprint


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"clusters": [[0, 0, 0], [1]], "size": 32}', "no table of colours"),
        ('{"clusters": [[0, 0]], "size": 32}', r"\(colours, 3\)"),
        ('{"clusters": [[0, 0, 255]], "size": 32}', r"in \[-1, 1\]"),
        ('{"clusters": [[0, 0, NaN]], "size": 32}', r"in \[-1, 1\]"),
        ('{"clusters": [[0, 0, 1]]}', "`size` .* is None"),
        ('{"clusters": [[0, 0, 1]], "size": {"height": 32, "width": [1]}}', "not that of a square image"),
        ('{"clusters": [[0, 0, 1]], "size": true}', "not that of a square image"),
    ],
)
def test_broken_clusters_are_one_message(tmp_path, text, what):
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=what) as raised:
        clusters_of(tmp_path)
    assert "preprocessor_config.json" in raised.value.remedy


def test_a_codec_of_other_codes_or_another_size_is_refused(tmp_path):
    processor(side=8, colours=64).save_pretrained(tmp_path)
    torch.save(small_vq().state_dict(), tmp_path / "vq.pt")
    decoder = Decoder("llamagen", 32, 64, 65, 1e-5, False, (), picture=Picture(8, 10))
    for codec in (load_codec(tmp_path / "vq.pt"), clusters_of(tmp_path)):
        check_codec(codec, decoder)
        with pytest.raises(InputError, match="draws 16384 codes, the codec knows 64"):
            check_codec(codec, replace(decoder, vocab_size=16384))
    larger = replace(decoder, picture=Picture(16, 10))
    check_codec(load_codec(tmp_path / "vq.pt"), larger)
    with pytest.raises(InputError, match="16 x 16 codes, .* 8 x 8"):
        check_codec(clusters_of(tmp_path), larger)


def test_codes_and_images_that_do_not_fit_are_refused(tmp_path):
    torch.save(small_vq().state_dict(), tmp_path / "vq.pt")
    codec = load_codec(tmp_path / "vq.pt")
    for codes, what in (([[0] * 8], "8 codes do not make"), ([[0, 1, 2, 64]], "from 0 to 64"), ([[]], "0 codes")):
        with pytest.raises(InputError, match=what):
            codec.decode(torch.tensor(codes, dtype=torch.int64))
    for shape in ((1, 3, 10, 8), (3, 8, 8), (1, 1, 8, 8)):
        with pytest.raises(InputError, match="multiples of 4"):
            codec.encode(torch.zeros(shape))
