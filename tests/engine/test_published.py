"""The published points: what they are of, and the bytes and FLOPs that are counted for them."""

from __future__ import annotations

import json

import pytest

from edgeprune.engine.published import FAMILIES, FILE, RUNTIMES, PublishedPoint, points_of, published
from edgeprune.engine.work import bytes_per_token, prefill_flops
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import WEIGHT_FORMATS

POINTS, TRIALS = published()
FORMATS = {"int4_awq": WEIGHT_FORMATS["int4-128"], "w4a16_g128": WEIGHT_FORMATS["int4-128"], "fp16": None, "bf16": None}


def formatted(point: PublishedPoint) -> Decoder:
    """The decoder of a point in its format, for formats that the product has."""
    return point.decoder.with_format(FORMATS[point.precision])


def test_the_bytes_of_a_point_are_the_estimators() -> None:
    """Norms apart, which the published runtimes read too, and the rounding of few tokens' caches."""
    checked = 0
    for point in POINTS:
        if point.precision in FORMATS and point.decode_ms is not None and point.decoder.hidden_size % 128 == 0:
            workload = Workload(1, 1, point.past + 1)
            counted = bytes_per_token(formatted(point), "fp16", workload, in_place=True).total
            assert point.decode_bytes == pytest.approx(counted, rel=1e-3)
            checked += 1
    assert checked > 25


def test_the_bytes_of_a_point_by_hand() -> None:
    """Qwen3-0.6B: 4 bits and a scale of 16 for 128 weights, an fp16 head, and 2049 tokens in the cache."""
    point = points_of("AGX Orin 64 GB", "tensorrt-edge-llm")[0]
    linear = 28 * 1024 * (2 * 16 * 128 + 2 * 8 * 128 + 3 * 3072)
    assert point.model == "Qwen3-0.6B"
    assert point.decode_bytes == linear * (0.5 + 2 / 128) + 2 * 151936 * 1024 + 28 * 2 * 8 * 128 * 2 * 2049
    assert point.decode_ms == pytest.approx(1e3 / 162.5)
    assert point.prefill_flops == prefill_flops(point.decoder, Workload(1, 2048, 4096))


def test_every_point_says_where_it_is_from_and_what_is_assumed() -> None:
    for point in (*POINTS, *TRIALS):
        assert point.source
        assert point.runtime_class in RUNTIMES
        assert point.note or not point.uncertain
        assert any(value is not None for value in (point.decode_ms, point.prefill_ms, point.request_ms))
        assert (point.past is None) == (point.decode_ms is None)
        assert point.prompt is not None or point.prefill_ms is None
    nvidia = {point.precision for point in (*POINTS, *TRIALS) if point.runtime_class.startswith("tensorrt")}
    assert nvidia <= FAMILIES.keys()


def test_no_trial_is_a_point_of_the_fit() -> None:
    def key(point: PublishedPoint) -> tuple:
        return point.device, point.precision, point.model, point.decode_ms, point.prefill_ms

    assert not {key(point) for point in POINTS} & {key(trial) for trial in TRIALS}


def test_all_that_the_file_names_is_used() -> None:
    data = json.loads(FILE.read_text(encoding="utf-8"))
    rows = data["points"] + data["trials"]
    assert {row["model"] for row in rows} == data["models"].keys()
    assert {row["source"] for row in rows} == data["sources"].keys()
