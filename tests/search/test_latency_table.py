"""The table of what widths cost: the design, the fit through known times, the cache, the estimator's table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.engine.engines import Exported, OnnxRuntime
from edgeprune.engine.onnx.graph import graph_weight_bytes
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, GraphRunner
from edgeprune.ondevice.worker import quiet
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.profiles import load_profile
from edgeprune.search import latency_table
from edgeprune.search.latency_table import BASE, KINDS, RandomWeights, design, fit, measured_times
from tests.support.durations import durations
from tests.support.graph_pictures import SIDE, imagegpt, llamagen
from tests.support.shapes import SMOLLM2, uniform

PROFILE = load_profile("cpu")
WORKLOAD = Workload(1, 128, 512)
DRAWN = Workload(2, 1, SIDE**2)  # of a picture
SMALL = uniform(32, 4, (4, 2, 16), 96, 200)


def true_time(decoder: Decoder, scale: float) -> float:
    """A machine whose costs add up: of heads, groups, channels, tokens, and a fixed part."""
    total = 0.3 + 2e-5 * decoder.vocab_size
    for layer in decoder.layers:
        if (attention := layer.attention) is not None:
            total += 0.02 + 0.01 * attention.num_attention_heads + 0.03 * attention.num_key_value_heads
        if layer.mlp is not None:
            total += 1e-4 * layer.mlp.intermediate_size
    return scale * total


def times_of(dense: Decoder, noise: float = 0.0) -> latency_table.Times:
    generator = np.random.default_rng(0)
    return {
        kind: {
            name: true_time(point.decoder(dense), scale) * (1 + noise * generator.standard_normal())
            for name, point in design(dense, "fp32", 32).items()
        }
        for kind, scale in (("prefill", 5.0), ("decode", 1.0))
    }


def test_the_change_by_a_format_of_the_cache_is_shared_by_query_heads() -> None:
    """Slower in a prefill, faster at a step; the rest of the table is that of floats."""
    int8, times, depth = CACHE_FORMATS["int8"], times_of(SMOLLM2), len(design(SMOLLM2, "fp32", 32)[BASE].layers)
    points = design(SMOLLM2, "fp32", 32, caches=(None, int8))
    assert [name for name in points if name not in design(SMOLLM2, "fp32", 32)] == ["int8 cache"]
    assert points["int8 cache"].decoder(SMOLLM2).cache_format == int8
    changes = {"prefill": 0.04, "decode": -0.01}
    for kind, change in changes.items():
        times[kind]["int8 cache"] = times[kind][BASE] + change * depth
    costs = fit(SMOLLM2, PROFILE, "fp32", times, "test", caches=(None, int8))
    for kind, table in costs.of(int8).items():
        plain = costs.of(None)[kind]
        assert np.isclose(table.attention[0, 3, 2] - plain.attention[0, 3, 2], changes[kind])
        assert np.isclose(table.attention[0, 2, 0] - plain.attention[0, 2, 0], changes[kind] * 2 / 9)
        assert table.attention[0, 0].tolist() == [0.0] * 3
        assert np.array_equal(table.mlp, plain.mlp)


def test_the_design_changes_one_width_at_a_time_and_holds_the_volume() -> None:
    points = design(SMOLLM2, "fp32", 32)
    assert next(iter(points)) == BASE
    base = points[BASE]
    layers = [replace(SMOLLM2, layers=SMOLLM2.layers[: len(base.layers) - n]) for n in (0, len(base.layers))]
    full, none = (graph_weight_bytes(decoder, "fp32") for decoder in layers)
    assert full - none >= latency_table.VOLUME_BYTES
    assert points["mlp 0"].decoder(SMOLLM2).layers[0].mlp is None
    assert [layer.attention is not None for layer in points["attention 1"].decoder(SMOLLM2).layers[:3]] == [1, 0, 0]
    for point in points.values():  # a graph without a cache is none that an engine is built for
        assert any(layer.attention for layer in point.decoder(SMOLLM2).layers)
    assert len(points["depth"].layers) < len(base.layers)
    assert points["vocabulary"].vocab_size < base.vocab_size
    assert all(k % 32 == 0 for point in points.values() for *_, k in point.layers)
    assert sum(point.mixed for point in points.values()) == latency_table.MIXES


@pytest.mark.parametrize("dense", [SMOLLM2, SMALL, uniform(64, 3, (8, 1, 16), 256, 500)], ids=["gqa", "small", "mqa"])
def test_the_fit_finds_costs_that_add_up(dense: Decoder) -> None:
    found = fit(dense, PROFILE, "fp32", times_of(dense), "test")
    assert max(worst for _, worst in found.error.values()) < 1e-6
    groups, heads, channels = dense.layer_widths[0]
    for widths in ([(1, heads, channels)] * 3, [(groups, 1, channels // 2)] * 2 + [(0, 1, channels)]):
        decoder = replace(dense, layers=dense.layers[:1] * 3, vocab_size=150).with_layer_widths(widths)
        for kind, scale in (("prefill", 5.0), ("decode", 1.0)):
            assert getattr(found, kind).total(widths, 150) == pytest.approx(true_time(decoder, scale), rel=1e-6)


FORMATS = (None, WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int4-32"])


def true_time_in_formats(decoder: Decoder, scale: float) -> float:
    """The same machine, on which matrices of few bits take a share of the time of floats, by the format."""
    shares = {None: 1.0, FORMATS[1]: 0.5, FORMATS[2]: 0.3}
    total = 0.3 + 2e-5 * decoder.vocab_size * shares[decoder.head_format]
    for layer in decoder.layers:
        if (attention := layer.attention) is not None:
            matrices = attention.num_attention_heads + attention.num_key_value_heads
            total += 0.02 + 0.01 * matrices * shares[attention.weight_format]
        if layer.mlp is not None:
            total += 1e-4 * layer.mlp.intermediate_size * shares[layer.mlp.weight_format]
    return scale * total


def test_the_fit_finds_costs_of_formats_that_add_up() -> None:
    dense, tables = replace(SMOLLM2, tie_word_embeddings=False), FORMATS[:2]
    points = design(dense, "fp32", 32, FORMATS, tables)
    times = {
        kind: {name: true_time_in_formats(point.decoder(dense), scale) for name, point in points.items()}
        for kind, scale in (("prefill", 5.0), ("decode", 1.0))
    }
    found = fit(dense, PROFILE, "fp32", times, "test", FORMATS, tables)
    assert max(worst for _, worst in found.error.values()) < 1e-6
    widths, places = [(2, 2, 768), (3, 3, 1536), (0, 1, 512)], [(1, 2), (2, 0), (0, 1)]
    decoder = replace(dense, layers=dense.layers[:3], vocab_size=150).with_layer_widths(widths)
    formats = [(FORMATS[a], FORMATS[m]) for a, m in places]
    for head in (0, 1):
        target = decoder.with_formats(formats, None, FORMATS[head])
        for kind, scale in (("prefill", 5.0), ("decode", 1.0)):
            total = getattr(found, kind).total(widths, 150, places, (0, head))
            assert total == pytest.approx(true_time_in_formats(target, scale), rel=1e-6)
    # A head that the engine does not run in a format, and channels that its groups do not divide.
    assert found.decode.base(150, (0, 2)) == np.inf
    assert found.decode.mlp[2, 48] == np.inf
    assert np.isfinite(found.decode.mlp[1, 48])


def test_the_fit_and_its_stated_error_under_noise() -> None:
    found = fit(SMOLLM2, PROFILE, "fp32", times_of(SMOLLM2, noise=0.01), "test")
    assert 0 < max(worst for _, worst in found.error.values()) < 0.06
    widths = [(2, 3, 1024)] * 15
    decoder = replace(SMOLLM2, layers=SMOLLM2.layers[:15]).with_layer_widths(widths)
    assert found.decode.total(widths, SMOLLM2.vocab_size) == pytest.approx(true_time(decoder, 1.0), rel=0.04)
    assert (found.decode.attention >= 0).all()
    assert (np.diff(found.decode.mlp) >= 0).all()


@dataclass
class DoubleEngine:
    """A test double of an engine that measures: its times are those of true_time."""

    version: str = "1"
    measured: list[list[str]] = field(default_factory=list)
    name: str = "double"
    one_width: bool = False
    setting: tuple[Workload, str] = (WORKLOAD, "fp32")

    def write(self, decoder: Decoder, weights: Any, folder: Path) -> None:
        OnnxRuntime(PROFILE, *self.setting, "test").write(decoder, weights, folder)

    def identity(self, on_progress: Any) -> dict[str, Any]:
        return {"engine": self.version}

    def latencies(self, models: dict[str, Exported], on_progress: Any) -> dict[str, dict[str, float]]:
        assert all(any(model.graphs.glob("*.onnx")) for model in models.values())
        self.measured.append(list(models))
        return {kind: {name: true_time(model.decoder, 1.0) for name, model in models.items()} for kind in KINDS}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def measured(
    folder: Path, dense: Decoder = SMALL, version: str = "1", workload: Workload = WORKLOAD, precision: str = "fp32"
) -> tuple[list[list[str]], latency_table.Times]:
    """The names of the models that were measured, by call of the engine; and the times."""
    engine = DoubleEngine(version, setting=(workload, precision))
    times = measured_times(engine, dense, PROFILE, workload, precision, folder, quiet)
    assert not list(folder.glob("costs-*"))  # the graphs are gone
    return engine.measured, times


def test_some_models_at_a_time_each_time_with_the_base(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_table, "CHUNK_BYTES", 300_000)
    calls, times = measured(cache)
    assert len(calls) > 1
    assert all(names[0] == BASE for names in calls)
    others = [name for names in calls for name in names[1:]]
    assert [BASE, *others] == list(design(SMALL, "fp32", PROFILE.channel_multiple))
    without = true_time(SMALL.with_widths(2, 2, 0), 1.0) / true_time(SMALL, 1.0)
    assert times["decode"]["mlp 0"] == pytest.approx(without)
    assert all(found[BASE] == 1.0 for found in times.values())


def test_what_was_measured_is_kept_by_engine_shape_and_workload(cache: Path) -> None:
    _, times = measured(cache)
    assert measured(cache) == ([], times)
    for change in (
        {"version": "2"},
        {"workload": Workload(1, 64, 512)},
        {"workload": Workload(2, 128, 512)},
        {"precision": "fp16"},
        {"dense": replace(SMALL, vocab_size=300)},
        {"dense": SMALL.with_widths(2, 2, 64)},
        {"dense": uniform(48, 4, (4, 2, 16), 96, 200)},
        {"dense": uniform(32, 4, (4, 2, 32), 96, 200)},
    ):
        assert measured(cache, **change)[0], change
        assert not measured(cache, **change)[0], change


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"times": {"prefill": {}}}', '{"times": {"prefill": 1, "decode": 2}}']
)
def test_damaged_times_are_measured_again(cache: Path, damage: str) -> None:
    _, times = measured(cache)
    (path,) = (cache / "cache" / "costs").iterdir()
    path.write_text(damage)
    assert measured(cache)[0]
    assert measured(cache) == ([], times)


def test_models_of_one_shape_share_what_was_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values do not count, nor does depth beyond that of the base model."""
    monkeypatch.setattr(latency_table, "VOLUME_BYTES", 1)
    _, times = measured(cache)
    for other in (replace(SMALL, norm_eps=1e-3), replace(SMALL, layers=SMALL.layers * 3)):
        assert measured(cache, other) == ([], times)


class RunningEngine(DoubleEngine):
    """It runs every graph once, as one that measures does again and again."""

    def latencies(self, models: dict[str, Exported], on_progress: Any) -> dict[str, dict[str, float]]:
        for model in models.values():
            runner = GraphRunner(model.graphs / GRAPH_FILE, DRAWN.batch, DRAWN.context, threads=1)
            runner.run(np.zeros((DRAWN.batch, DRAWN.prompt), np.int64))
            runner.reset(DRAWN.context - 1)
            runner.run(np.zeros((DRAWN.batch, 1), np.int64))
        return super().latencies(models, on_progress)


@pytest.mark.parametrize("dense", [llamagen(6, 2, 20), imagegpt()], ids=["classes", "no classes"])
def test_every_model_of_an_image_generator_s_design_draws(dense: Decoder, cache: Path) -> None:
    """From the class on, one token at a time, two streams: positions stay on the grid whatever the model's depth."""
    engine = RunningEngine(setting=(DRAWN, "fp32"))
    times = measured_times(engine, dense, PROFILE, DRAWN, "fp32", cache, quiet)
    assert set(sum(engine.measured, [])) == set(design(dense, "fp32", PROFILE.channel_multiple))
    assert measured_times(engine, dense, PROFILE, DRAWN, "fp32", cache, quiet) == times
    assert max(worst for _, worst in fit(dense, PROFILE, "fp32", times, "test").error.values()) < 0.1


@pytest.mark.slow
@pytest.mark.timing
def test_a_small_table_from_onnx_runtime(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*durations(survey_seconds=0.05).popitem())
    monkeypatch.setattr(latency_table, "SHARES", ())
    monkeypatch.setattr(latency_table, "MIXES", 0)
    dense, workload = uniform(64, 2, (2, 1, 16), 128, 300), Workload(1, 8, 24)
    engine = OnnxRuntime(PROFILE, workload, "fp32", "test")
    times = measured_times(engine, dense, PROFILE, workload, "fp32", cache, quiet)
    names = set(design(dense, "fp32", PROFILE.channel_multiple))
    assert all(set(found) == names and min(found.values()) > 0 for found in times.values())
    assert fit(dense, PROFILE, "fp32", times, "test").decode.total(dense.layer_widths, dense.vocab_size) > 0


def test_random_weights_differ_and_share_one_buffer() -> None:
    weights = RandomWeights(SMALL)
    assert list(weights) == list(SMALL.shapes())
    gate, up = weights["layers.0.mlp.gate"], weights["layers.0.mlp.up"]
    assert gate.shape == up.shape
    assert not gate.equal(up)
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()


def test_random_weights_of_formats_are_codes() -> None:
    decoder = SMALL.with_format(WEIGHT_FORMATS["int4-32-asymmetric"])
    weights = RandomWeights(decoder)
    for name, shape in decoder.shapes().items():
        weight = weights[name]
        assert tuple(weight.shape) == shape
        assert hasattr(weight, "codes") == (name in decoder.weight_formats)
    assert not weights["layers.0.mlp.gate"].codes.equal(weights["layers.0.mlp.up"].codes)


def test_every_format_of_the_design_runs(cache: Path) -> None:
    engine, dense = RunningText(), uniform(64, 2, (2, 1, 32), 128, 300)
    workload, formats = Workload(1, 8, 24), FORMATS
    times = measured_times(engine, dense, PROFILE, workload, "fp32", cache, quiet, formats, FORMATS[:2])
    assert set(sum(engine.measured, [])) == set(design(dense, "fp32", PROFILE.channel_multiple, formats, FORMATS[:2]))
    assert set(times["decode"]) == set(sum(engine.measured, []))


class RunningText(DoubleEngine):
    """It runs every graph once on a text."""

    def latencies(self, models: dict[str, Exported], on_progress: Any) -> dict[str, dict[str, float]]:
        for model in models.values():
            runner = GraphRunner(model.graphs / GRAPH_FILE, 1, 24, threads=1)
            runner.run(np.zeros((1, 8), np.int64))
        return super().latencies(models, on_progress)


def test_an_engine_of_one_width_gets_models_whose_layers_are_alike() -> None:
    """And its table says of every such model what it takes."""
    formats = (None, WEIGHT_FORMATS["q8_0"])
    points = design(SMOLLM2, "fp16", 32, formats, formats, one_width=True)
    models = {name: point.decoder(SMOLLM2) for name, point in points.items()}
    assert all(model.is_uniform for model in models.values())
    assert all(layer.attention and layer.mlp for model in models.values() for layer in model.layers)
    times = {kind: {name: true_time(model, 1.0) for name, model in models.items()} for kind in KINDS}
    costs = fit(SMOLLM2, PROFILE, "fp16", times, "test", formats, formats, one_width=True)
    assert max(worst for _, worst in costs.error.values()) < 0.05
