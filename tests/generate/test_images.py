"""Images of a model: codes drawn in batches, documents by class, and bundles that draw."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.errors import InputError
from edgeprune.generate.images import (
    Drawn,
    Painter,
    codes_from,
    draw_codes,
    draw_documents,
    draw_grid,
    painter_of,
    read_description,
    steps_of,
)
from edgeprune.model.decoder import Picture
from edgeprune.ondevice.guided_sampling import Sampling
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.progress import Forwarded, Silent
from tests.support.graph_pictures import CLASSES, CODES, SIDE, llamagen, random_weights

VARIANT = GraphVariant("onnxruntime", "last")
DECODER = llamagen()
PICTURE = DECODER.picture
GUIDED = Sampling(2.0)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    return write_graphs(DECODER, random_weights(DECODER), folder, "fp32", [VARIANT]).graphs[VARIANT]


def codes(graph: Path, labels: list[int | None], streams: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """The codes, and how often they advanced."""
    runner, steps = GraphRunner(graph, streams, PICTURE.tokens), []
    found = draw_codes(runner, PICTURE, CODES, labels, GUIDED, seed, lambda: steps.append(1))
    return found, len(steps)


def test_pictures_are_the_same_in_every_batch_and_advance_as_announced(graph: Path) -> None:
    labels = [3, 0, None, 3, 6]
    for images_at_once in (1, 2, 4):
        found, steps = codes(graph, labels, 2 * images_at_once)
        assert found.shape == (5, SIDE**2)
        assert steps == steps_of(PICTURE, 5, images_at_once)
        np.testing.assert_array_equal(found, codes(graph, labels, 10)[0])
    assert 0 <= found.min() <= found.max() < CODES
    assert (found[0] != found[3]).any()  # another draw of the same class
    assert (codes(graph, labels, 4, seed=1)[0] != found).any()


def test_documents_begin_with_their_classes_and_some_with_none(graph: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    ids = draw_documents(graph, DECODER, GUIDED, 10, 0, Forwarded(lambda *step: steps.append(step)))
    assert (ids.shape, ids.dtype) == ((10, 1 + SIDE**2), np.int64)
    labels = ids[:, 0] - CODES
    assert labels[-1] == CLASSES  # the null class
    assert sorted(labels[:CLASSES]) == list(range(CLASSES))
    again = codes_from(graph, PICTURE, CODES, [*labels[:-1].tolist(), None], GUIDED, 0, lambda: None)
    np.testing.assert_array_equal(ids[:, 1:], again)
    assert steps[-1] == ("draw samples", 2 * SIDE**2, 2 * SIDE**2)


class Greys:
    """A codec whose images show their codes, a pixel each."""

    def pixels(self, codes: np.ndarray) -> np.ndarray:
        return np.repeat(codes.reshape(-1, SIDE, SIDE, 1), 3, axis=3).astype(np.uint8)


@pytest.mark.parametrize(
    ("classes", "labels"), [([4], [4] * 5), ([4, 1], [4, 1, 4, 1, 4]), ([], [0, 1, 2, 3, 4])], ids=str
)
def test_the_classes_that_are_given_are_drawn_in_turn(graph: Path, classes: list, labels: list, tmp_path: Path) -> None:
    drawn = Drawn(SIDE, CLASSES, True, CODES, 2.0)
    painter = Painter(drawn, GraphRunner(graph, 4, PICTURE.tokens), GUIDED, Greys())
    assert (painter.at_once, drawn.picture) == (2, PICTURE)
    pixels = painter.pixels(classes, 5, 0, lambda: None)
    np.testing.assert_array_equal(pixels[..., 0].reshape(5, -1), codes(graph, labels, 4)[0])
    assert draw_grid(painter, classes, 5, 0, tmp_path / "grid.png", Silent()) >= 0
    assert Image.open(tmp_path / "grid.png").mode == "RGB"


def bundled(folder: Path, drawn: Drawn) -> Path:
    """What a bundle needs before its graph is opened."""
    (folder / "codec").mkdir()
    (folder / "rungs" / "0").mkdir(parents=True)
    workload = {"batch": 1, "prompt": 1, "context": SIDE**2}
    (folder / "report.json").write_text(json.dumps({"workload": workload}))
    (folder / "manifest.json").write_text(json.dumps({"sha256": {}, "engine": "onnxruntime"}))
    (folder / "codec" / "picture.json").write_text(json.dumps(asdict(drawn)))
    return folder


def painted(bundle: Path, classes: list[int], cfg: float | None = None) -> Painter:
    return painter_of(bundle, classes, 1, cfg, 1.0, 0, 1.0, pytest.fail)


def test_a_description_is_read_back_or_refused(tmp_path: Path) -> None:
    drawn = Drawn(SIDE, CLASSES, True, CODES, 1.75)
    bundle = bundled(tmp_path, drawn)
    assert read_description(bundle) == drawn
    assert drawn.picture == Picture(SIDE, CLASSES, True)
    for content in ("{", "{}", "[]", '{"side": 4}', json.dumps(asdict(drawn) | {"cfg": "1.75"})):
        (bundle / "codec" / "picture.json").write_text(content)
        with pytest.raises(InputError, match=r"picture\.json") as caught:
            read_description(bundle)
        assert "Copy the whole bundle again" in caught.value.remedy
    (bundle / "codec" / "picture.json").unlink()
    with pytest.raises(InputError, match="is the bundle of a language model") as caught:
        read_description(bundle)
    assert "--prompt" in caught.value.remedy


@pytest.mark.parametrize(
    ("classes", "has_null", "asked", "cfg", "reason", "remedy"),
    [
        (7, True, [7], None, "unknown class 7: the model has 7 classes", "Give 0 to 6."),
        (7, True, [0, -1], None, "unknown class -1", "Give 0 to 6."),
        (0, True, [0], None, "the model has 0 classes", "Leave --class out."),
        (7, True, [0], 0.5, "--cfg 0.5 is not 1 or more", "try 1.75"),
        (7, False, [0], 2.0, "this model has no null class to guide with", "Leave --cfg out."),
    ],
)
def test_what_the_model_cannot_draw_is_refused(tmp_path, classes, has_null, asked, cfg, reason, remedy) -> None:
    bundle = bundled(tmp_path, Drawn(SIDE, classes, has_null, CODES, 1.0))
    with pytest.raises(InputError) as caught:
        painted(bundle, asked, cfg)
    assert reason in caught.value.message
    assert remedy in caught.value.remedy
