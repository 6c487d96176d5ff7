"""The cost of every width of a layer, fitted to the engine's own latencies of models of random weights.

It does not know a model's weights: a latency does not depend on their values. Every model that is measured differs
from the model `base` in one kind of width. The other modules stay as they are, because a stack of narrow modules
alone would fit into a cache and be measured too fast. The times are explained by

    t = fixed + token * vocabulary + sum over layers (attention + mlp)
    attention = a + b * groups * heads_per_group + c * groups        mlp: linear between the measured widths

with no coefficient below zero. Cuts of several kinds save more together than one by one. So some models of mixed
widths are among those of the fit, and the distance of each from the fit through all others is the table's stated
error. For a device that is not reachable, the estimator's formulas fill the same table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.cache import cache_folder, cached
from edgeprune.engine.engines import Exported, Measuring
from edgeprune.engine.estimate import activation_bytes, estimate_performance, resource_times
from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.errors import EngineError
from edgeprune.files import scratch_folder
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.worker import OnProgress
from edgeprune.profiles import DeviceProfile
from edgeprune.search.module_costs import ModuleCosts, Widths, additive, channel_options

if TYPE_CHECKING:
    import torch

VERSION = 1  # of the kept times; another number measures again
KINDS = ("prefill", "decode")
VOLUME_BYTES = 192 * 2**20  # of the layers of `base`: more than a cache holds
CHUNK_BYTES = 2 * 2**30  # of the graphs that are on disk and in memory at a time
SHARES = (0.75, 0.5, 0.25)  # of the MLP channels, that are measured
MIXES = 6  # models of mixed widths
BASE = "base"

Times = dict[str, dict[str, float]]
"""Latencies by kind and by name of the model, all of one kind on the same scale."""


@dataclass(frozen=True)
class LatencyCosts:
    """The tables of prefill and decode latencies.

    prefill, decode: on the scale of the times that they are fitted to, in ms where they are estimated; error: median
    and largest relative distance of the mixed models, each from the fit without it, by kind; source: a phrase for
    where the tables come from.
    """

    prefill: ModuleCosts
    decode: ModuleCosts
    error: dict[str, tuple[float, float]]
    source: str


@dataclass(frozen=True)
class TimedModel:
    """A model to measure: the widths of its layers, and the size of its vocabulary.

    mixed: it differs from the base model in several kinds of width.
    """

    layers: tuple[Widths, ...]
    vocab_size: int
    mixed: bool = False

    def decoder(self, dense: Decoder) -> Decoder:
        """Returns the description of this model, made of the first layers of the dense one."""
        layers = dense.layers[: len(self.layers)]
        return replace(dense, layers=layers, vocab_size=self.vocab_size).with_layer_widths(self.layers).compact()


def design(dense: Decoder, precision: str, multiple: int) -> dict[str, TimedModel]:
    """Returns the models to measure by name.

    The first is `base`, of as many dense layers as make VOLUME_BYTES. All others differ from it in one kind of width,
    but for the mixed ones. multiple: of the MLP channels.
    """
    # The base model.
    full, vocabulary = Widths(*dense.layer_widths[0]), dense.vocab_size
    one_layer, no_layer = (graph_weight_bytes(replace(dense, layers=dense.layers[:n]), precision) for n in (1, 0))
    depth = min(len(dense.layers), max(2, -(-VOLUME_BYTES // (one_layer - no_layer))))
    points = {BASE: TimedModel((full,) * depth, vocabulary)}

    def add(name: str, widths: Widths, layers: int = depth, tokens: int = vocabulary) -> None:
        if name not in points:
            points[name] = TimedModel((widths,) * layers, tokens)

    # Fewer MLP channels, fewer heads, fewer modules, and a smaller vocabulary.
    groups, heads, channels = full
    for share in SHARES:
        if aligned(share * channels, multiple) < channels:
            add(f"mlp {aligned(share * channels, multiple)}", (groups, heads, aligned(share * channels, multiple)))
    add("mlp 0", (groups, heads, 0))
    for g, r in _head_points(groups, heads):
        add(f"attention {g}x{r}", (g, r, channels))
    if depth > 1:  # one attention stays: no engine is built for a graph without a KV cache
        points["attention 1"] = TimedModel((full, *(Widths(0, 1, channels),) * (depth - 1)), vocabulary)
    add("depth", full, layers=max(1, depth // 2))
    add("vocabulary", full, tokens=max(64, vocabulary // 4))
    # Mixed widths, the same ones in every run.
    generator = np.random.default_rng(0)
    for number in range(MIXES):
        points[f"mix {number}"] = TimedModel(_mixed(full, depth, multiple, generator), vocabulary, mixed=True)
    return points


def aligned(size: float, multiple: int) -> int:
    """Returns the positive multiple that is nearest to a size."""
    return max(1, round(size / multiple)) * multiple


def _head_points(groups: int, heads: int) -> list[tuple[int, int]]:
    """Returns pairs of groups and query heads per group to measure: fewer groups, fewer query heads, fewer of both."""
    fewer_groups = sorted({max(1, round(groups * share)) for share in (2 / 3, 1 / 3)} - {groups})
    fewer_heads = sorted({max(1, round(heads * share)) for share in (2 / 3, 1 / 3)} - {heads})
    fewer_of_both = [(fewer_groups[0], fewer_heads[0])] if fewer_groups and fewer_heads else []
    return [(g, heads) for g in fewer_groups] + [(groups, r) for r in fewer_heads] + fewer_of_both


def _mixed(full: Widths, depth: int, multiple: int, generator: np.random.Generator) -> tuple[Widths, ...]:
    """Returns the widths of a mixed model: most of the layers, with one pair of head counts and free MLP channels."""
    groups, heads, channels = full
    g, r = int(generator.integers(1, groups + 1)), int(generator.integers(1, heads + 1))
    layers = max(1, depth - int(generator.integers(0, 1 + depth // 4)))
    sizes = [aligned(share * channels, multiple) for share in generator.uniform(0.3, 1.0, layers)]
    return tuple((g, r, min(size, channels)) for size in sizes)


class RandomWeights(Mapping[str, "torch.Tensor"]):
    """Random weights of any Decoder by name, fp32, all of them views of one buffer from different offsets on.

    Their values do not matter, but they must differ: ONNX Runtime keeps weights of equal content only once.
    """

    def __init__(self, decoder: Decoder) -> None:
        import torch

        self._shapes = decoder.shapes()
        largest = max(int(np.prod(shape)) for shape in self._shapes.values())
        self._offsets = {name: 17 * index for index, name in enumerate(self._shapes)}
        self._buffer = torch.empty(largest + 17 * len(self._shapes)).normal_(
            0.0, 0.02, generator=torch.Generator().manual_seed(0)
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        shape, offset = self._shapes[name], self._offsets[name]
        return self._buffer[offset : offset + int(np.prod(shape))].view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def measured_times(
    engine: Measuring,
    dense: Decoder,
    profile: DeviceProfile,
    workload: Workload,
    precision: str,
    folder: Path,
    on_progress: OnProgress,
) -> Times:
    """Returns the times that `fit` makes a table of, from the cache or measured now.

    They are kept by device, engine and its version, precision, shapes of the layers and workload, so that models of
    the same shapes share them. engine: one that measures; folder: where graphs are written for as long as they are
    measured; on_progress: called with the progress. Raises EngineError.
    """
    # The key holds all that the times depend on.
    points = design(dense, precision, profile.channel_multiple)
    shape = {
        "version": VERSION,
        "engine": engine.identity(on_progress),
        "precision": precision,
        "workload": asdict(workload),
        "decoder": _shape_of(dense),
        "points": {name: asdict(point) for name, point in points.items()},
    }
    key = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "costs" / f"{key}.json"

    def decode(data: bytes) -> Times:
        times = json.loads(data)["times"]
        if any(not isfinite(times[kind][name]) or times[kind][name] <= 0 for kind in KINDS for name in (BASE, *points)):
            raise ValueError("times are positive")
        return times

    return cached(
        path,
        decode,
        lambda: _measure(engine, dense, points, profile, workload, precision, folder, on_progress),
        lambda times: (json.dumps({"of": shape, "times": times}, indent=1) + "\n").encode(),
    )


def _shape_of(dense: Decoder) -> dict[str, object]:
    """Returns all that a latency depends on beside the widths, without the model's name and depth."""
    kinds = [
        asdict(replace(layer.attention, num_attention_heads=1, num_key_value_heads=1, rotary=None))
        | {"turned": len(layer.attention.rotary.inverse_frequencies) if layer.attention.rotary else 0}
        | asdict(replace(layer.mlp, intermediate_size=1))
        for layer in dense.layers
    ]
    own = asdict(replace(dense, layers=(), family="", norm_eps=0.0, max_position_embeddings=0, vocab_size=0))
    return own | {"layers": [kind for index, kind in enumerate(kinds) if kind not in kinds[:index]]}


def _measure(
    engine: Measuring,
    dense: Decoder,
    points: Mapping[str, TimedModel],
    profile: DeviceProfile,
    workload: Workload,
    precision: str,
    folder: Path,
    on_progress: OnProgress,
) -> Times:
    """Returns the latencies as multiples of the base model's, by kind and name.

    Some models are measured at a time, the base model always among them.
    """
    variant = GraphVariant(profile.dialect, "last")
    times: Times = {kind: {BASE: 1.0} for kind in KINDS}
    for chunk in _chunks(dense, points, precision):
        with scratch_folder(folder, "costs-") as part:
            # Write the graphs of a chunk.
            exported = {}
            for index, point in enumerate(chunk):
                decoder, graphs = points[point].decoder(dense), part / str(index)
                graphs.mkdir()
                write_graphs(decoder, RandomWeights(decoder), graphs, precision, [variant], workload.context)
                exported[point] = Exported(decoder, graphs, graphs / "engine", graphs / "none")
            # Measure them side by side.
            for kind, latencies in engine.latencies(exported, on_progress).items():
                times[kind] |= {point: value / latencies[BASE] for point, value in latencies.items()}
    return times


def _chunks(dense: Decoder, points: Mapping[str, TimedModel], precision: str) -> list[list[str]]:
    """Returns the names of the models in chunks of at most CHUNK_BYTES, each with the base model first."""
    sizes = {name: graph_weight_bytes(point.decoder(dense), precision) for name, point in points.items()}
    chunks: list[list[str]] = []
    used = CHUNK_BYTES
    for name in points:
        if name == BASE:
            continue
        if used + sizes[name] > CHUNK_BYTES:
            chunks.append([BASE])
            used = sizes[BASE]
        chunks[-1].append(name)
        used += sizes[name]
    return chunks


def fit(dense: Decoder, profile: DeviceProfile, precision: str, times: Times, source: str) -> LatencyCosts:
    """Returns the table that explains the times of the design's models best, by least squares of relative errors.

    Raises EngineError where the times cannot be explained.
    """
    points = design(dense, precision, profile.channel_multiple)
    groups, heads, channels = dense.layer_widths[0]
    # Count every coefficient in every model.
    knots = sorted({k for point in points.values() if not point.mixed for *_, k in point.layers} | {0, channels})
    columns = {name: _columns(point, knots) for name, point in points.items()}
    tables, errors = {}, {}

    def through(kind: str, names: Sequence[str]) -> np.ndarray:
        """Returns the coefficients of the fit through the times of these models."""
        return _least_squares(np.array([columns[name] for name in names]), np.array([times[kind][n] for n in names]))

    for kind in KINDS:
        # Fill the table with the fit through all models.
        coefficients = through(kind, list(points))
        fixed, token, a, b, c, *steps = coefficients
        kept = np.arange(groups + 1)[:, None]  # (groups + 1, 1)
        # (groups + 1, heads)
        attention = np.where(kept > 0, a + b * kept * np.arange(1, heads + 1) + c * kept, 0.0)
        # (channels + 1,)
        mlp = np.interp(np.arange(channels + 1), knots, np.concatenate([[0.0], np.cumsum(steps)]))
        tables[kind] = additive(attention, mlp, fixed, token)
        # Predict every mixed model by the fit through all others.
        distances = []
        for left_out in (name for name, point in points.items() if point.mixed):
            others = through(kind, [name for name in points if name != left_out])
            distances.append(abs(float(np.dot(columns[left_out], others)) / times[kind][left_out] - 1))
        if distances:
            errors[kind] = (float(np.median(distances)), max(distances))
    return LatencyCosts(tables["prefill"], tables["decode"], errors, source)


def _columns(point: TimedModel, knots: Sequence[int]) -> np.ndarray:
    """Returns how often each coefficient counts in a model, (5 + len(knots) - 1,).

    The coefficients are fixed, token, a, b, c, and the steps of the MLP's cost from each knot to the next.
    """
    groups, heads, channels = np.array(point.layers).T  # (layers,) each
    knots_ = np.asarray(knots, dtype=float)
    steps = np.clip((channels[:, None] - knots_[:-1]) / np.diff(knots_), 0.0, 1.0).sum(axis=0)
    return np.concatenate([[1.0, point.vocab_size, (groups > 0).sum(), (groups * heads).sum(), groups.sum()], steps])


def _least_squares(columns: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns the coefficients (coefficients,) of least relative error, none of them below zero.

    columns: (models, coefficients), how often each counts; times: (models,). Solved by the algorithm of Lawson and
    Hanson (1974, in SciPy), with the columns scaled to a common size first. Raises EngineError where it has no
    solution.
    """
    from scipy.optimize import nnls

    weighted = columns / times[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    scaled, _ = nnls(weighted / scale, np.ones(len(times)))
    if not np.isfinite(scaled).all():
        raise EngineError("no costs of layers fit the measured latencies", "Measure again on an idle machine.")
    return scaled / scale


def estimated_costs(dense: Decoder, profile: DeviceProfile, workload: Workload, precision: str) -> LatencyCosts:
    """Returns the table from the estimator, for a device that is not reachable.

    It holds the times of the resource that binds the dense model, and is exact as long as that resource binds.
    """
    setting = (profile, workload, precision)
    bound = {kind: max(times, key=times.get) for kind, times in resource_times(dense, *setting).items()}

    def times(decoder: Decoder) -> np.ndarray:
        resources = resource_times(decoder, *setting)
        return np.array([resources[kind][bound[kind]] for kind in KINDS])

    attention, mlp, (fixed, token) = _by_difference(dense, profile.channel_multiple, times)
    overhead = 1e3 * profile.decode_overhead.si
    prefill, decode = (additive(attention[..., i], mlp[..., i], fixed[i] + overhead, token[i]) for i in (0, 1))
    return LatencyCosts(prefill, decode, {}, f"the estimator's formulas for {profile.name}")


def memory_costs(dense: Decoder, profile: DeviceProfile, workload: Workload, precision: str) -> ModuleCosts:
    """Returns the bytes of weights, KV cache and buffers by module, and the peaks of the activations, as estimated."""
    # The activations that are there even without a module.
    empty = replace(dense, layers=dense.layers[:1]).with_layer_widths([(0, 1, 0)])
    floor = activation_bytes(empty, precision, workload, profile.dialect)

    def held(decoder: Decoder) -> np.ndarray:
        memory = estimate_performance(decoder, profile, workload, precision).memory
        return np.array([memory.total - memory.activations.value])

    def peak(widths: Widths) -> float:
        one_layer = replace(dense, layers=dense.layers[:1]).with_layer_widths([widths])
        return activation_bytes(one_layer, precision, workload, profile.dialect) - floor

    # All else adds up over the modules.
    attention, mlp, (fixed, token) = _by_difference(dense, profile.channel_multiple, held)
    groups, heads, channels = dense.layer_widths[0]
    # The peak of every width on top of these activations: (groups + 1, heads) and (channels + 1,).
    attention_peak = np.array([[peak((g, r, 0)) if g else 0.0 for r in range(1, heads + 1)] for g in range(groups + 1)])
    sizes = [0, *channel_options(channels, profile.channel_multiple)]
    mlp_peak = np.interp(np.arange(channels + 1), sizes, [peak((0, 1, k)) if k else 0.0 for k in sizes])
    return ModuleCosts(
        attention[..., 0], mlp[..., 0], attention_peak, mlp_peak, float(fixed[0]) + floor, float(token[0])
    )


def _by_difference(
    dense: Decoder, multiple: int, costs: Callable[[Decoder], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what an attention, an MLP, and all else add to the costs (n,) of a Decoder.

    They are (groups + 1, heads, n), (channels + 1, n), and (2, n): a fixed part, and a part for each token of the
    vocabulary. Each is the difference between models that differ in one kind of width in all layers. costs: returns
    the costs (n,) of a Decoder.
    """
    groups, heads, channels = dense.layer_widths[0]
    layers = len(dense.layers)
    without_attention, without_mlp = (costs(dense.with_widths(*w)) for w in ((0, 1, channels), (groups, heads, 0)))
    # The attentions, on top of models without any; the row of 0 groups is zero.
    attention = np.array(
        [
            [(costs(dense.with_widths(g, r, channels)) - without_attention) / layers for r in range(1, heads + 1)]
            for g in range(1, groups + 1)
        ]
    )
    attention = np.concatenate([np.zeros_like(attention[:1]), attention])  # (groups + 1, heads, n)
    # The MLPs, on top of models without any; between the possible sizes by interpolation.
    sizes = [0, *channel_options(channels, multiple)]
    added = np.array(
        [(costs(dense.with_widths(groups, heads, k)) - without_mlp) / layers if k else 0 * without_mlp for k in sizes]
    )
    # (channels + 1, n)
    mlp = np.stack([np.interp(np.arange(channels + 1), sizes, column) for column in added.T], axis=1)
    # All else, from half the vocabulary.
    half = dense.vocab_size // 2
    token = (costs(dense) - costs(replace(dense, vocab_size=half))) / (dense.vocab_size - half)
    fixed = costs(dense) - token * dense.vocab_size - layers * (attention[groups, heads - 1] + mlp[channels])
    return attention, mlp, np.stack([fixed, token])
