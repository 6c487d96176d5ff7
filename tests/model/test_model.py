"""A model as its description and weights that are read on each access."""

from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from edgeprune.model.forward import layer_weights
from edgeprune.model.load import load_model
from edgeprune.model.quantised import as_float
from edgeprune.model.save import save_checkpoint
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.checkpoints import save_llama
from tests.support.roundings import rounded
from tests.support.tiny import as_model, llama


class Counting(Mapping[str, torch.Tensor]):
    """Weights that note which of them were read."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights, self.read = weights, []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_a_layer_is_read_when_it_is_asked_for_and_alone():
    model = as_model(llama())
    counting = Counting(model.weights)
    lazy = replace(model, weights=counting)
    assert counting.read == []
    layer_weights(lazy, 1)
    assert sorted(counting.read) == sorted(model.decoder.layer_shapes(1))


def test_a_model_is_fixed_and_a_changed_one_keeps_its_weights():
    model = as_model(llama())
    with pytest.raises(FrozenInstanceError):
        model.name = "another"
    other = replace(model, decoder=model.decoder.with_widths(1, 1, 8))
    assert other.weights is model.weights
    assert model.decoder.layers[0].mlp.intermediate_size == 64


def test_nothing_of_a_loaded_model_is_kept_between_accesses(tmp_path):
    save_llama(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    assert model.directory == tmp_path / "model"
    assert model.weights["norm"] is not model.weights["norm"]
    assert model.weights.keys() == model.decoder.shapes().keys()


def test_a_model_of_codes_is_one_of_floats_too(tmp_path):
    save_llama(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    assert dense.as_floats is dense
    decoder = dense.decoder.with_format(WEIGHT_FORMATS["int8"])
    weights = rounded(decoder, {name: dense.weights[name] for name in decoder.shapes()})
    save_checkpoint(decoder, weights.items(), dense, tmp_path / "small")
    model = load_model(str(tmp_path / "small"))
    floats = model.as_floats
    assert (floats.decoder, dict(floats.quantised)) == (dense.decoder, {})
    assert floats.dequantised == "edgeprune's own, int8"
    assert all(torch.equal(floats.stored[name], as_float(weight)) for name, weight in weights.items())
