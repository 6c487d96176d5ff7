"""The cost of every width and weight format, fitted to the engine's own latencies of models of random weights.

It does not know a model's weights: a latency does not depend on their values. Every model that is measured differs
from the model `base` in one kind of width or format. The other modules stay as they are, because a stack of narrow
modules alone would fit into a cache and be measured too fast. The times are explained by

    t = fixed + token * vocabulary + sum over layers (attention + mlp)
    attention = a + b * groups * heads_per_group + c * groups        mlp: linear between the measured widths

and of each weight format by a token of its own, attention = a + d * (share of the matrices that is kept), and an MLP
that is linear between two widths; with no coefficient below zero. A format of the KV cache changes the time of each
attention by the same amount for each query head, which may be less or more. Cuts of several kinds save more together
than one by one. So some models of mixed widths are among those of the fit, and the distance of each from the fit
through all others is the table's stated error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, lcm
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.cache import cache_folder, cached
from edgeprune.engine.engines import Exported, Measuring
from edgeprune.engine.onnx.graph import graph_weight_bytes
from edgeprune.errors import EngineError
from edgeprune.files import scratch_folder
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.worker import OnProgress
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS, CacheFormat, WeightFormat
from edgeprune.profiles import DeviceProfile
from edgeprune.search.module_costs import ModuleCosts, Widths, additive
from edgeprune.search.widths import Cache, Format

if TYPE_CHECKING:
    import torch

    from edgeprune.model.quantised import QuantisedWeight

VERSION = 3  # of the kept times; another number measures again
KINDS = ("prefill", "decode")
VOLUME_BYTES = 192 * 2**20  # of the layers of `base`: more than a cache holds
CHUNK_BYTES = 2 * 2**30  # of the graphs that are on disk and in memory at a time
SHARES = (0.75, 0.5, 0.25)  # of the MLP channels, that are measured
MIXES = 6  # models of mixed widths
MIXES_OF_A_FORMAT = 2
BASE = "base"

Times = dict[str, dict[str, float]]
"""Latencies by kind and by name of the model, all of one kind on the same scale."""


@dataclass(frozen=True)
class LatencyCosts:
    """The tables of prefill and decode latencies.

    prefill, decode: on the scale of the times that they are fitted to, in ms where they are estimated; error: median
    and largest relative distance of the mixed models, each from the fit without it, by kind; source: a phrase for
    where the tables come from; cached: the table of each kind with a KV cache in each of its formats.
    """

    prefill: ModuleCosts
    decode: ModuleCosts
    error: dict[str, tuple[float, float]]
    source: str
    cached: Mapping[CacheFormat, Mapping[str, ModuleCosts]] = field(default_factory=dict)

    def of(self, cache: Cache) -> dict[str, ModuleCosts]:
        """Returns the tables by kind with a format of the KV cache."""
        return {"prefill": self.prefill, "decode": self.decode} if cache is None else dict(self.cached[cache])


@dataclass(frozen=True)
class TimedModel:
    """A model to measure: the widths of its layers, and the size of its vocabulary.

    mixed: it differs from the base model in several kinds of width; attention, mlp, head: the names of the weight
    formats of all attentions, all MLPs and the head, None for floats; cache: that of the KV cache's format.
    """

    layers: tuple[Widths, ...]
    vocab_size: int
    mixed: bool = False
    attention: str | None = None
    mlp: str | None = None
    head: str | None = None
    cache: str | None = None

    def decoder(self, dense: Decoder) -> Decoder:
        """Returns the description of this model, made of the first layers of the dense one."""
        layers = dense.layers[: len(self.layers)]
        decoder = replace(dense, layers=layers, vocab_size=self.vocab_size).with_layer_widths(self.layers)
        attention, mlp, head = (WEIGHT_FORMATS.get(name or "") for name in (self.attention, self.mlp, self.head))
        decoder = decoder.with_formats([(attention, mlp)] * len(layers), None, head).compact()
        return decoder.with_cache(CACHE_FORMATS.get(self.cache or ""))


def design(
    dense: Decoder,
    precision: str,
    multiple: int,
    formats: tuple[Format, ...] = (None,),
    table_formats: tuple[Format, ...] = (None,),
    caches: tuple[Cache, ...] = (None,),
    one_width: bool = False,
) -> dict[str, TimedModel]:
    """Returns the models to measure by name.

    The first is `base`, of as many dense layers as make VOLUME_BYTES. All others differ from it in one kind of width or
    format, but for the mixed ones. multiple: of the MLP channels; formats: of the modules; table_formats: of the head;
    caches: of the KV cache; one_width: the engine runs only models whose layers are alike.
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
    if not one_width:
        add("mlp 0", (groups, heads, 0))
    for g, r in _head_points(groups, heads):
        add(f"attention {g}x{r}", (g, r, channels))
    if depth > 1 and not one_width:  # one attention stays: no engine is built for a graph without a KV cache
        points["attention 1"] = TimedModel((full, *(Widths(0, 1, channels),) * (depth - 1)), vocabulary)
    add("depth", full, layers=max(1, depth // 2))
    add("vocabulary", full, tokens=max(64, vocabulary // 4))
    # Mixed widths, the same ones in every run.
    generator = np.random.default_rng(0)
    for number in range(MIXES):
        widths = _mixed(full, depth, multiple, generator)
        widths = widths[:1] * len(widths) if one_width else widths
        points[f"mix {number}"] = TimedModel(widths, vocabulary, mixed=True)
    # The same modules in every format.
    whole = (full,) * depth
    for form in formats:
        if form is None:
            continue
        name = form.name
        points[f"{name} attention"] = TimedModel(whole, vocabulary, attention=name)
        points[f"{name} mlp"] = TimedModel(whole, vocabulary, mlp=name)
        if (half := half_width(full, multiple, form)) < channels:
            points[f"{name} mlp {half}"] = TimedModel(((groups, heads, half),) * depth, vocabulary, mlp=name)
        in_head = name if form in table_formats else None
        if in_head is not None:
            points[f"{name} head"] = TimedModel(whole, vocabulary, head=name)
        step = multiple_of(multiple, form)
        for number in range(MIXES_OF_A_FORMAT):
            sizes = [aligned(share * channels, step) for share in generator.uniform(0.3, 1.0, depth)]
            sizes = sizes[:1] * depth if one_width else sizes
            layers = tuple((groups, heads, size if size < channels else channels) for size in sizes)
            points[f"{name} mix {number}"] = TimedModel(layers, vocabulary, True, name, name, in_head)
    # The same model with every format of the KV cache.
    for cache in caches:
        if cache is not None:
            points[_cached(cache)] = TimedModel(whole, vocabulary, cache=cache.name)
    return points


def _cached(form: CacheFormat) -> str:
    return f"{form.name} cache"


def multiple_of(multiple: int, form: WeightFormat) -> int:
    """Returns the multiple of MLP channels that the engine and the groups of a format ask for."""
    return lcm(multiple, form.multiple)


def half_width(full: Widths, multiple: int, form: WeightFormat) -> int:
    """Returns about half of the MLP channels, as a format takes them."""
    return aligned(full[2] / 2, multiple_of(multiple, form))


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


class RandomWeights(Mapping[str, "torch.Tensor | QuantisedWeight"]):
    """Random weights of any Decoder by name, fp32, all of them views of one buffer from different offsets on.

    Their values do not matter, but they must differ: ONNX Runtime keeps weights of equal content only once.
    """

    def __init__(self, decoder: Decoder) -> None:
        import torch

        self._shapes, self._formats = decoder.shapes(), decoder.weight_formats
        largest = max(int(np.prod(shape)) for shape in self._shapes.values())
        self._offsets = {name: 17 * index for index, name in enumerate(self._shapes)}
        self._buffer = torch.empty(largest + 17 * len(self._shapes)).normal_(
            0.0, 0.02, generator=torch.Generator().manual_seed(0)
        )

    def __getitem__(self, name: str) -> torch.Tensor | QuantisedWeight:
        shape, offset = self._shapes[name], self._offsets[name]
        weight = self._buffer[offset : offset + int(np.prod(shape))].view(shape)
        if (form := self._formats.get(name)) is None:
            return weight

        from edgeprune.model.levels import codes_of, nearest
        from edgeprune.model.quantised import of_one_scale

        middle = (form.least + form.most + 1) // 2
        levels = nearest(weight * 50 * (form.most - middle) + middle, form.levels, form.least, form.most)
        return of_one_scale(form, codes_of(levels, form.levels), 2.0**-9)

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
    formats: tuple[Format, ...] = (None,),
    table_formats: tuple[Format, ...] = (None,),
    caches: tuple[Cache, ...] = (None,),
) -> Times:
    """Returns the times that `fit` makes a table of, from the cache or measured now.

    They are kept by device, engine and its version, precision, shapes of the layers and workload, so that models of
    the same shapes share them. engine: one that measures; folder: where graphs are written for as long as they are
    measured; on_progress: called with the progress. Raises EngineError.
    """
    # The key holds all that the times depend on.
    points = design(dense, precision, profile.channel_multiple, formats, table_formats, caches, engine.one_width)
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
        lambda: _measure(engine, dense, points, precision, folder, on_progress),
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
    precision: str,
    folder: Path,
    on_progress: OnProgress,
) -> Times:
    """Returns the latencies as multiples of the base model's, by kind and name.

    Some models are measured at a time, the base model always among them.
    """
    times: Times = {kind: {BASE: 1.0} for kind in KINDS}
    for chunk in _chunks(dense, points, precision):
        with scratch_folder(folder, "costs-") as part:
            # Write the models of a chunk.
            exported = {}
            for index, point in enumerate(chunk):
                decoder, own = points[point].decoder(dense), part / str(index)
                own.mkdir()
                engine.write(decoder, RandomWeights(decoder), own)
                exported[point] = Exported(decoder, own, own, own / "none")
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


def fit(
    dense: Decoder,
    profile: DeviceProfile,
    precision: str,
    times: Times,
    source: str,
    formats: tuple[Format, ...] = (None,),
    table_formats: tuple[Format, ...] = (None,),
    caches: tuple[Cache, ...] = (None,),
    one_width: bool = False,
) -> LatencyCosts:
    """Returns the table that explains the times of the design's models best, by least squares of relative errors.

    Raises EngineError where the times cannot be explained.
    """
    points = design(dense, precision, profile.channel_multiple, formats, table_formats, caches, one_width)
    names = tuple(form.name for form in formats if form is not None)
    halves = {form.name: half_width(dense.layer_widths[0], profile.channel_multiple, form) for form in formats if form}
    # Count every coefficient in every model.
    knots = sorted(
        {k for point in points.values() if not point.mixed and point.mlp is None for *_, k in point.layers}
        | {0, dense.layer_widths[0][2]}
    )
    counting = _Counting(dense, knots, names, halves)
    in_cache = {cache: points.pop(_cached(cache)) for cache in caches if cache is not None}
    columns = {name: counting.columns(point) for name, point in points.items()}
    tables, errors = {}, {}

    def through(kind: str, names: Sequence[str]) -> np.ndarray:
        """Returns the coefficients of the fit through the times of these models."""
        return _least_squares(np.array([columns[name] for name in names]), np.array([times[kind][n] for n in names]))

    for kind in KINDS:
        # Fill the table with the fit through all models.
        tables[kind] = counting.table(through(kind, list(points)), formats, table_formats)
        # Predict every mixed model by the fit through all others.
        distances = []
        for left_out in (name for name, point in points.items() if point.mixed):
            others = through(kind, [name for name in points if name != left_out])
            distances.append(abs(float(np.dot(columns[left_out], others)) / times[kind][left_out] - 1))
        if distances:
            errors[kind] = (float(np.median(distances)), max(distances))
    cached = {
        cache: {
            kind: _with_cache(tables[kind], (times[kind][_cached(cache)] - times[kind][BASE]) / len(point.layers))
            for kind in KINDS
        }
        for cache, point in in_cache.items()
    }
    return LatencyCosts(tables["prefill"], tables["decode"], errors, source, cached)


def _with_cache(costs: ModuleCosts, change: float) -> ModuleCosts:
    """Returns a table with another KV cache; change: of an attention of the dense widths, which query heads share."""
    groups, heads = costs.attention.shape[1] - 1, costs.attention.shape[2]
    share = np.arange(groups + 1)[:, None] * np.arange(1, heads + 1) / (groups * heads)  # (groups + 1, heads)
    return replace(costs, attention=np.maximum(costs.attention + change * share, 0.0))


@dataclass(frozen=True)
class _Counting:
    """The coefficients of a table: how often each counts in a model, and the table that they make.

    The coefficients are fixed, token, a, b, c, the steps of the MLP's cost from each knot to the next, and for each
    format a token, the share of an attention's matrices, and the steps to half of the MLP's channels and to all.
    """

    dense: Decoder
    knots: Sequence[int]
    names: tuple[str, ...]
    halves: Mapping[str, int]

    def _steps(self, channels: np.ndarray, knots: Sequence[int]) -> np.ndarray:
        """Returns the share of each step that MLPs of these channels (layers,) take, summed over them."""
        at = np.asarray(knots, dtype=float)
        return np.clip((channels[:, None] - at[:-1]) / np.maximum(np.diff(at), 1e-9), 0.0, 1.0).sum(axis=0)

    def _knots_of(self, name: str) -> list[int]:
        return [0, self.halves[name], self.dense.layer_widths[0][2]]

    def _share(self, groups: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """Returns the share of an attention's matrices that is left."""
        all_groups, all_heads, _ = self.dense.layer_widths[0]
        return groups * (heads + 1) / (all_groups * (all_heads + 1))

    def columns(self, point: TimedModel) -> np.ndarray:
        """Returns how often each coefficient counts in a model."""
        groups, heads, channels = np.array(point.layers).T  # (layers,) each
        in_floats = point.attention is None
        none = np.zeros_like(channels)
        counts = [
            np.array([1.0, point.vocab_size * (point.head is None), (groups > 0).sum()]),
            np.array([(groups * heads).sum(), groups.sum()]) * in_floats,
            self._steps(channels if point.mlp is None else none, self.knots),
        ]
        for name in self.names:
            share = self._share(groups, heads).sum() * (point.attention == name)
            counts.append(np.array([point.vocab_size * (point.head == name), share]))
            counts.append(self._steps(channels if point.mlp == name else none, self._knots_of(name)))
        return np.concatenate(counts)

    def table(
        self, coefficients: np.ndarray, formats: tuple[Format, ...], table_formats: tuple[Format, ...]
    ) -> ModuleCosts:
        """Returns the costs of all widths and formats."""
        groups, heads, channels = self.dense.layer_widths[0]
        fixed, token, a, b, c = coefficients[:5]
        kept, of_group = np.arange(groups + 1)[:, None], np.arange(1, heads + 1)  # (groups + 1, 1), (heads,)
        every, at = np.arange(channels + 1), 5 + len(self.knots) - 1
        attention = [np.where(kept > 0, a + b * kept * of_group + c * kept, 0.0)]  # (groups + 1, heads) each
        steps = np.concatenate([[0.0], np.cumsum(coefficients[5:at])])
        mlp, tokens = [np.interp(every, self.knots, steps)], {None: token}  # (channels + 1,) each
        by_name = {form.name: form for form in formats if form is not None}
        for name in self.names:
            of_token, share, *steps = coefficients[at : at + 4]
            at += 4
            form = by_name[name]
            of_attention = np.where(kept > 0, a + share * self._share(kept, of_group), 0.0)
            features = kept * of_group * self.dense.layers[0].attention.head_dim
            attention.append(np.where(features % form.multiple == 0, of_attention, np.inf))
            of_mlp = np.interp(every, self._knots_of(name), np.concatenate([[0.0], np.cumsum(steps)]))
            mlp.append(np.where(every % form.multiple == 0, of_mlp, np.inf))
            tokens[form] = of_token
        tables = np.full((len(formats), len(formats), 2), np.inf)
        for e, embedding in enumerate(formats):
            for h, head in enumerate(formats):
                # An embedding's rows are gathered: their format takes no time.
                if head in table_formats and (embedding == head if self.dense.tie_word_embeddings else True):
                    tables[e, h] = fixed, tokens[head]
        return additive(np.stack(attention), np.stack(mlp), tables)


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
