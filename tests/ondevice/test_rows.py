"""Sequences of different lengths in one step: a row has the logits of its own tokens, whatever the others hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.search.latency_table import RandomWeights
from tests.support.shapes import uniform

VOCABULARY, CAPACITY = 257, 96
LENGTHS = (5, 41, 90, 17)
PLAIN = uniform(192, 2, (6, 2, 32), 512, VOCABULARY)


def windowed(decoder: Decoder) -> Decoder:
    """The same with one layer that sees 8 tokens."""
    first, *others = decoder.layers
    return replace(decoder, layers=(replace(first, attention=replace(first.attention, window=8)), *others))


def in_format(name: str) -> Decoder:
    form = WEIGHT_FORMATS[name]
    return PLAIN.with_formats([(form, form)] * len(PLAIN.layers), None, None)


DECODERS = {
    "floats": PLAIN,
    "a window": windowed(PLAIN),
    "int8": in_format("int8"),
    "int4": in_format("int4-32-asymmetric"),
    "a cache in int8": PLAIN.with_cache(CACHE_FORMATS["int8"]),
}


@pytest.fixture(params=DECODERS)
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> GraphRunner:
    decoder = DECODERS[request.param]
    write_graphs(decoder, RandomWeights(decoder), tmp_path, "fp32", [ONNXRUNTIME_GRAPH])
    return GraphRunner(tmp_path / ONNXRUNTIME_GRAPH.filename, len(LENGTHS), CAPACITY, 1)


def stepped(runner: GraphRunner, rows: list[np.ndarray], steps: int) -> np.ndarray:
    """The logits (steps, rows, vocabulary) behind the last tokens of sequences, whose others are read row by row."""
    pasts = np.array([len(row) - steps for row in rows])
    for place, row in enumerate(rows):
        runner.row(place).run(row[None, : pasts[place]])
    return np.stack(
        [
            runner.advance(np.array([row[past + n] for row, past in zip(rows, pasts, strict=True)]), pasts + n)
            for n in range(steps)
        ]
    )


def test_a_row_has_the_logits_of_its_own_tokens_whatever_the_others_hold(runner: GraphRunner) -> None:
    generator, steps = np.random.default_rng(0), 3
    rows = [generator.integers(0, VOCABULARY, length) for length in LENGTHS]
    together = stepped(runner, rows, steps)
    # One by one.
    for place, row in enumerate(rows):
        own = runner.another()
        own.hold(1)
        own.run(row[None, :-steps])
        alone = np.stack([own.run(row[None, len(row) - steps + n :][:, :1])[0] for n in range(steps)])
        assert np.abs(together[:, place] - alone).max() < 2e-2 * np.abs(alone).max()
    # Beside others, and at another place: to the last bit.
    for place, row in enumerate(rows):
        others = [generator.integers(0, VOCABULARY, length) for length in generator.integers(steps + 1, CAPACITY, 3)]
        at = int(generator.integers(len(rows)))
        again = stepped(runner, [*others[:at], row, *others[at:]], steps)
        np.testing.assert_array_equal(again[:, at], together[:, place])
