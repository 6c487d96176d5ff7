"""Weights as safetensors files: shards, types, and streams that are not the model's."""

import json
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgeprune.errors import NumericalError
from edgeprune.model.checkpoint import safetensors_file
from edgeprune.model.load import load_model
from edgeprune.model.quantised import QuantisedWeight
from edgeprune.model.save import save_checkpoint
from edgeprune.model.tokens.vocabulary import Vocabulary
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.rounding import round_table
from tests.support.checkpoints import save_llama
from tests.support.reference import weights_of


def test_shards_are_written_above_the_limit_and_the_bytes_are_equal(tmp_path, monkeypatch):
    save_llama(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    monkeypatch.setattr(safetensors_file, "SHARD_BYTES", 150_000)
    for name in ("one", "two"):
        save_checkpoint(dense.decoder, ((n, dense.weights[n]) for n in dense.decoder.shapes()), dense, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    for file in files:  # readers that map the file want its data aligned
        assert int.from_bytes((tmp_path / "one" / file).read_bytes()[:8], "little") % 8 == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", local_files_only=True)
    assert all(torch.equal(weights_of(loaded)[name], dense.weights[name]) for name in dense.weights)


def test_a_weight_beyond_the_dtype_is_refused(tmp_path):
    save_llama(tmp_path / "dense", torch.float16)
    dense = load_model(str(tmp_path / "dense"))
    tensors = {name: dense.weights[name].float() for name in dense.decoder.shapes()}
    tensors["layers.1.mlp.down"][0, 0] = 7e4
    with pytest.raises(NumericalError, match=r"mlp\.down_proj\.weight reaches 7e\+04, torch\.float16 holds 6\.55e\+04"):
        save_checkpoint(dense.decoder, tensors.items(), dense, tmp_path / "small")


@pytest.mark.parametrize("change", ["order", "shape", "missing", "extra"])
def test_a_wrong_stream_is_a_bug(tmp_path, change):
    save_llama(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    stream = [(name, dense.weights[name]) for name in dense.decoder.shapes()]
    if change == "order":
        stream[1], stream[2] = stream[2], stream[1]
    elif change == "shape":
        stream[1] = (stream[1][0], stream[1][1][:-1])
    elif change == "missing":
        stream.pop()
    else:
        stream.append(("more", torch.zeros(1)))
    with pytest.raises(ValueError, match="expected|not a weight"):
        save_checkpoint(dense.decoder, stream, dense, tmp_path / "small")


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_weight_is_freed_before_the_next_one_is_made(tmp_path, form):
    save_llama(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    decoder = dense.decoder if form is None else dense.decoder.with_format(*2 * [WEIGHT_FORMATS[form]])
    last, held = None, []

    def stream() -> Iterator[tuple[str, torch.Tensor | QuantisedWeight]]:
        nonlocal last
        for name in decoder.shapes():
            if last is not None and last() is not None:
                held.append(name)
            weight = dense.weights[name].clone()
            if name in decoder.weight_formats:
                weight = round_table(weight, decoder.weight_formats[name])
            last = weakref.ref(weight.codes if isinstance(weight, QuantisedWeight) else weight)
            yield name, weight
            del weight

    save_checkpoint(decoder, stream(), dense, tmp_path / "small", Vocabulary(np.arange(257)))
    assert held == []
