"""Guided pictures equal an independent LlamaGen's, code by code; the draws follow what was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.errors import EngineError, NumericalError
from edgeprune.model.load import load_directory
from edgeprune.model.model import Model
from edgeprune.ondevice.guided_sampling import Sampling, draw_pictures, random_points
from edgeprune.ondevice.onnxruntime import GraphRunner
from tests.support.llamagen import LlamaGen, random_llamagen, save_directory

VARIANT = GraphVariant("onnxruntime", "last")
REFERENCE = random_llamagen(side=4)
CLASSES = (0, 7, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("llamagen")
    save_directory(REFERENCE, folder)
    return load_directory(folder, "llamagen")


@pytest.fixture(scope="module")
def graph(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    return write_graphs(model.decoder, model.weights, folder, "fp32", [VARIANT]).graphs[VARIANT]


def drawn(
    model: Model, graph: Path, labels: tuple[int | None, ...], sampling: Sampling, seed: int = 0, first: int = 0
) -> np.ndarray:
    """(pictures, tokens)."""
    picture, size = model.decoder.picture, model.decoder.vocab_size
    openings = [picture.opening(size, label) for label in labels]
    runner = GraphRunner(graph, len(labels) * sampling.streams, picture.tokens)
    points = random_points(seed, first, len(labels), picture.tokens)
    steps = draw_pictures(runner, openings, picture.opening(size, None), sampling, points)
    return np.stack(list(steps), axis=1)


@torch.inference_mode()
def greedy(reference: LlamaGen, label: int, cfg: float) -> list[int]:
    """By whole sequences, one after the other, no cache: LlamaGen's own formula."""
    size, codes = reference.sizes.vocabulary, []
    for _ in range(reference.sizes.side**2):
        ids = torch.tensor([[size + one, *codes] for one in (label, reference.sizes.classes - 1)])
        with_class, without = reference(ids).logits[:, -1].double()
        codes.append(int((without + (with_class - without) * cfg).argmax()))
    return codes


@pytest.mark.parametrize("cfg", [1.0, 1.75, 4.0])
def test_greedy_codes_equal_the_reference(model: Model, graph: Path, cfg: float) -> None:
    expected = [greedy(REFERENCE, label, cfg) for label in CLASSES]
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(drawn(model, graph, CLASSES, Sampling(cfg, temperature=0)), expected)


def test_guidance_changes_what_a_class_draws_and_leaves_no_class_as_it_is(model: Model, graph: Path) -> None:
    plain, guided = (drawn(model, graph, (3, None), Sampling(cfg, temperature=0)) for cfg in (1.0, 4.0))
    assert (plain[0] != guided[0]).any()
    np.testing.assert_array_equal(plain[1], guided[1])


def test_a_picture_is_the_same_in_every_batch(model: Model, graph: Path) -> None:
    together = drawn(model, graph, (5, 5, 5), Sampling(1.5))
    assert (together[0] != together[1]).any()  # other draws of the same class
    alone = [drawn(model, graph, (5,), Sampling(1.5), first=place)[0] for place in range(3)]
    np.testing.assert_array_equal(together, alone)
    assert (drawn(model, graph, (5,), Sampling(1.5), seed=1) != together[:1]).any()


def test_first_codes_follow_the_guided_distribution(model: Model, graph: Path) -> None:
    """Of 2000 draws of the first code, against the reference's own probabilities at a temperature and a top-k."""
    from scipy import stats

    cfg, temperature, top_k = 1.5, 3.0, 6
    size, null = REFERENCE.sizes.vocabulary, REFERENCE.sizes.classes - 1
    with torch.inference_mode():
        with_class, without = REFERENCE(torch.tensor([[size + 2], [size + null]])).logits[:, -1].double()
    logits = (without + (with_class - without) * cfg) / temperature
    values, kept = logits.topk(top_k)
    count = 2000
    runner = GraphRunner(graph, 2 * count, model.decoder.picture.tokens)
    points = random_points(0, 0, count, model.decoder.picture.tokens)
    first = next(draw_pictures(runner, [size + 2] * count, size + null, Sampling(cfg, temperature, top_k), points))
    counts = np.array([(first == code).sum() for code in kept.numpy()])
    assert counts.sum() == count
    assert stats.chisquare(counts, count * values.softmax(0).numpy()).pvalue > 1e-3


def test_a_cache_that_is_too_short_is_one_message(model: Model, graph: Path) -> None:
    with pytest.raises(EngineError, match="16 tokens, the cache holds 8"):
        list(draw_pictures(GraphRunner(graph, 1, 8), [257], 267, Sampling(), random_points(0, 0, 1, 16)))


def test_guidance_beyond_floating_point_is_said(model: Model, graph: Path) -> None:
    with pytest.raises(NumericalError, match="guidance by 1e.308 is beyond floating point") as caught:
        drawn(model, graph, CLASSES, Sampling(cfg=1e308))
    assert "--cfg" in caught.value.remedy
