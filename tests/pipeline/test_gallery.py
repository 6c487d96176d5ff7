"""Pictures of both models from the same seeds, drawn once, and their distances through a network."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.errors import InputError
from edgeprune.evaluate.distances import FEWEST_IMAGES
from edgeprune.evaluate.features import Network
from edgeprune.generate.guidance import sampling_of
from edgeprune.model.codec.codec import load_codec
from edgeprune.model.load import load_model
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.pipeline import gallery as module
from edgeprune.pipeline.gallery import OTHERS, Gallery
from edgeprune.pipeline.imaging import Imaging
from edgeprune.pipeline.journal import open_journal
from edgeprune.progress import Silent
from tests.support.llamagen import random_llamagen, save_directory
from tests.support.vq import small_vq

COUNT = FEWEST_IMAGES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random image generator, its graph and its codec."""
    folder = tmp_path_factory.mktemp("drawn")
    save_directory(random_llamagen(vocabulary=64, layers=1, side=4), folder / "model")
    torch.save({"model": small_vq(codes=64).state_dict()}, folder / "vq.pt")
    model = load_model(str(folder / "model"))
    write_graphs(model.decoder, model.weights, folder / "plain", "fp32", [ONNXRUNTIME_GRAPH], 17)
    imaging = Imaging(load_codec(folder / "vq.pt"), sampling_of(model.decoder, 1.0), COUNT, None)
    return SimpleNamespace(model=model, imaging=imaging, plain=folder / "plain")


def gallery(made, folder, **changes) -> Gallery:
    setup = SimpleNamespace(
        model=made.model,
        kind=SimpleNamespace(imaging=made.imaging),
        workload=Workload(4, 1, 16),
        request=SimpleNamespace(seed=0, evaluate=()),
    )
    for name, value in changes.items():
        setattr(setup, name, value)
    journal = open_journal(folder, {}, folder.exists(), False)
    journal.close()  # the test may go on with it
    return Gallery(setup, journal, Silent(), made.plain)


@pytest.fixture
def network(monkeypatch):
    """Mean colours: a small network that is there on every machine."""
    pytest.importorskip("torchmetrics", reason="pip install edgeprune[images]")
    colours = Network("mean colours", lambda images: images.mean(axis=(2, 3)), None)
    monkeypatch.setattr(module, "load_network", lambda path: colours)


def test_without_a_network_the_pictures_stand_alone_with_the_reason(made, tmp_path, monkeypatch):
    def missing(path):
        raise InputError("torchmetrics is not installed", "pip install it")

    monkeypatch.setattr(module, "load_network", missing)
    own = SimpleNamespace(runnable_graph=made.plain / GRAPH_FILE)
    found = gallery(made, tmp_path / "work").compare("0", own)
    assert found["missing"] == "torchmetrics is not installed. pip install it"
    assert (found["dense"], found["fitted"], found["difference"]) == (None, None, None)
    assert found["dense_grid"] == found["fitted_grid"]  # the same model from the same seeds
    assert re.match(r"data:image/\w+;base64,", found["dense_grid"])
    assert (found["images"], found["at_once"], found["reference"], found["side"]) == (COUNT, 4, OTHERS, 16)
    images = np.load(tmp_path / "work" / "dense-pictures" / "images.npy")
    assert (images.shape, images.dtype) == ((COUNT, 16, 16, 3), np.uint8)
    asked = replace(made.imaging, features=tmp_path / "mine.onnx")
    with pytest.raises(InputError):  # a network that the user named is no matter of luck
        gallery(made, tmp_path / "other", kind=SimpleNamespace(imaging=asked)).compare("0", own)


def test_a_model_is_as_far_from_the_reference_as_itself(made, network, tmp_path, monkeypatch):
    own = SimpleNamespace(runnable_graph=made.plain / GRAPH_FILE)
    found = gallery(made, tmp_path / "work").compare("0", own)
    assert found["missing"] == ""
    assert found["dense"] == found["fitted"]
    assert found["dense"]["network"] == "mean colours"
    assert found["difference"][0] == 0
    folders = {name: tmp_path / "work" / name for name in ("dense-pictures", "reference-pictures")}
    images = {name: np.load(folder / "images.npy") for name, folder in folders.items()}
    assert not np.array_equal(*images.values())  # the reference is of another seed
    seen = np.load(folders["dense-pictures"] / "features.npy")
    np.testing.assert_allclose(seen, images["dense-pictures"].mean(axis=(1, 2)) / 255, atol=1e-5)
    monkeypatch.setattr(module, "codes_from", lambda *arguments: pytest.fail("drawn again"))
    assert gallery(made, tmp_path / "work").compare("0", own) == found


def test_a_reference_of_few_pictures_gives_no_distances(made, network, tmp_path):
    (tmp_path / "few").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "few" / f"{number}.png")
    request = SimpleNamespace(seed=0, evaluate=(tmp_path / "few",))
    own = SimpleNamespace(runnable_graph=made.plain / GRAPH_FILE)
    found = gallery(made, tmp_path / "work", request=request).compare("0", own)
    assert found["missing"] == f"few holds 2 pictures, fewer than {FEWEST_IMAGES}. Give more by --evaluate."
    assert (found["reference"], found["fitted"]) == ("few", None)
