"""The cells and tables of docs/bytes.md: at equal bytes, what llama.cpp, AutoRound, GPTQ and edgeprune lose.

They are run by tools/quality.py (`python -m tools.quality bytes`) on its texts, a novel among them. Everybody has the
same 16 samples. The model is the demo's, turned (tools/turned.py); embedding and head stay floats, so that a row is of
its grid alone. For ggml's K types rows of 576 inputs are filled up with zeros to 768 (tools/padded.py).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from edgeprune.engine.work import layer_bytes
from edgeprune.errors import InputError
from edgeprune.model.attention import LayerWeights, Tables
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import OUTPUT, WeightStream, embed, layer_weights, module_inputs, module_states, modules_of
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from edgeprune.pruning.grids import choose_grid
from edgeprune.pruning.methods import DEFAULT, METHODS
from edgeprune.pruning.moments import gram
from edgeprune.pruning.prune import prune
from edgeprune.pruning.quantize import gptq
from edgeprune.search.planner import uncut
from edgeprune.search.solve import uniform
from tools.ggml_files import RECIPES, recipe, rounded_by_ggml
from tools.ggml_files import bits_of as ggml_bits
from tools.padded import narrowed, padded
from tools.pages import table
from tools.precision import CALIBRATION, FLOAT, PrecisionBench
from tools.turned import check_turned, turned

if TYPE_CHECKING:
    from tools.quality import Texts

Rows = Mapping[str, Mapping[str, Any]]  # the finished cells' lines by their keys

TEXTS = ("speeches", "novel", "handbook")
BOUND_TEXTS = TEXTS[:2]  # that the bounds speak of
EXCERPTS = 16  # of each text: 8192 tokens
LLAMA, GPTQ, OURS, AUTOROUND = "llama.cpp", "gptq", "edgeprune", "autoround"
TYPES = ("q4_k", "q4_0", "q3_k", "q4_1", "q5_0", "q5_k", "q6_k", "q5_1", "q8_0")
SYMMETRIC, OFFSET, SAME_BYTES = "int4-64", "int4-offset", "int4-32"
FILE_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # whose blocks divide the rows of the file


@dataclass(frozen=True)
class BytesCell:
    """One model. by: who rounds it; form: the name of the weight format of all layers, or of a recipe, which edgeprune
    answers with what its search chooses at most at the same bytes."""

    by: str
    form: str

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


def bytes_cells(with_autoround: bool) -> Iterator[BytesCell]:
    """Returns all cells, those that decide most first; with_autoround: what it rounded is there."""
    yield from (BytesCell(LLAMA, form) for form in (*TYPES, *RECIPES))
    if with_autoround:
        yield BytesCell(AUTOROUND, SYMMETRIC)
    yield from (BytesCell(OURS, form) for form in (SYMMETRIC, OFFSET, SAME_BYTES, *TYPES, *RECIPES))
    yield from (BytesCell(GPTQ, form) for form in (SYMMETRIC, *TYPES))


Rounder = Callable[[int, LayerWeights, torch.Tensor], LayerWeights]
"""Of a layer's matrices, by their names within it, that read the same inputs (n, in_features)."""


@torch.inference_mode()
def rounded_one_by_one(model: Model, ids: torch.Tensor, rounder: Rounder) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a model's weights, the layers' matrices rounded on what they read in the dense model.

    ids: (b, t) int64. No matrix makes up for another one.
    """
    decoder = model.decoder
    hidden, tables = embed(model, ids), Tables(decoder, ids.shape[1])  # (b, t, c)
    yield "embedding", model.weights["embedding"]
    for index in range(len(decoder.layers)):
        new: LayerWeights = {}
        for kind in modules_of(decoder, index):
            weights, output = layer_weights(model, index, kind), OUTPUT[kind]
            states = module_states(decoder, kind, weights, hidden).flatten(0, 1)  # (n, c)
            inputs = module_inputs(decoder, index, kind, weights, hidden, tables)  # (b, t, in_features)
            before = {name: weight for name, weight in weights.items() if weight.dim() == 2 and name != output}
            new |= weights | rounder(index, before, states)
            new |= rounder(index, {output: weights[output]}, inputs.flatten(0, 1))
            hidden += F.linear(inputs, weights[output])
        prefix = f"layers.{index}."
        for name in decoder.layer_shapes(index):
            yield name, new[name.removeprefix(prefix)]
    for name in ("norm", "head"):
        yield name, model.weights[name]


def by_ggml(types: Sequence[Mapping[str, str]]) -> Rounder:
    """Returns the rounder that llama.cpp is; types: of ggml, of every layer's matrices by their names within it."""

    def rounder(index: int, weights: LayerWeights, inputs: torch.Tensor) -> LayerWeights:
        importance = inputs.square().mean(dim=0)  # as llama-imatrix gathers it
        return {name: rounded_by_ggml(weight, importance, types[index][name]) for name, weight in weights.items()}

    return rounder


def by_gptq(form: WeightFormat) -> Rounder:
    """Returns GPTQ on a format's grids."""

    def rounder(index: int, weights: LayerWeights, inputs: torch.Tensor) -> LayerWeights:
        moments, weight = gram(inputs), torch.cat(list(weights.values()))
        rounded = gptq(weight, moments, choose_grid(weight, moments.diagonal(), form, "starts")).dequantised()
        return dict(zip(weights, rounded.split([len(one) for one in weights.values()]), strict=True))

    return rounder


class BytesBench(PrecisionBench):
    """Runs cells on the turned model; autoround: the file that tools/autoround.py writes."""

    formats = (FLOAT, *FILE_TYPES)
    table_formats = ()

    def __init__(self, texts: Texts, autoround: Path | None) -> None:
        demo = load_model("demo")
        self.model = turned(demo)
        self.ids = torch.from_numpy(texts.rows(CALIBRATION, 0))
        check_turned(demo, self.model, self.ids[:1, :128])
        self.texts, self.autoround = TEXTS, autoround
        rows = [row for text in TEXTS for row in texts.evaluation[text][:EXCERPTS]]
        self.excerpts = torch.from_numpy(np.stack(rows))

    def dense(self) -> dict[str, Any]:
        """Returns the dense model's line: its nats by excerpt."""
        return {"nats": self._dense_nats}

    def run(self, cell: BytesCell) -> dict[str, Any]:
        """Returns a cell's line: bits of a weight, rise and divergence by text and excerpt, seconds of processor time.

        The seconds are of all that is done from the samples to the weights; what a search measures before that is left
        out.
        """
        bits, stream = self._rounded(cell)
        start = time.process_time()
        weights = list(stream)
        seconds = time.process_time() - start
        if cell.by == AUTOROUND:
            seconds = float(self._of_autoround.metadata()["seconds"])
        return {"bits": bits, **self.losses(self.model.decoder, weights), "seconds": seconds}

    def _rounded(self, cell: BytesCell) -> tuple[float, WeightStream]:
        """Returns the mean bits of a weight of the layers, and all weights, which are rounded as they are asked for."""
        model, decoder = self.model, self.model.decoder
        if cell.by == LLAMA:
            types = self._types(cell.form)
            return self._mean_bits(types), rounded_one_by_one(model, self.ids, by_ggml(types))
        if cell.form in RECIPES:
            target = self._mixture(cell.form)
            return _bits(target), prune(model, target, self.ids, METHODS[DEFAULT], 0)
        form = WEIGHT_FORMATS[cell.form]
        if cell.by == AUTOROUND:
            return bits_of(form), ((name, self._by_autoround(name)) for name in decoder.shapes())
        if not _divides(form, decoder):
            model = self._filled
        if cell.by == GPTQ:
            stream = rounded_one_by_one(model, self.ids, by_gptq(form))
        else:
            stream = prune(model, model.decoder.with_format(form), self.ids, METHODS[DEFAULT], 0)
        return bits_of(form), narrowed(stream, decoder, self.model.weights)

    @functools.cached_property
    def _filled(self) -> Model:
        return padded(self.model, 256)

    @functools.cached_property
    def _of_autoround(self) -> Any:
        return safe_open(self.autoround, "pt")

    def _by_autoround(self, name: str) -> torch.Tensor:
        is_rounded = name.startswith("layers.") and self.model.weights[name].dim() == 2
        return self._of_autoround.get_tensor(name) if is_rounded else self.model.weights[name]

    def _types(self, form: str) -> list[dict[str, str]]:
        """Returns the types of ggml of every layer's matrices, by a recipe or all of one format."""
        depth, matrices = len(self.model.decoder.layers), matrices_of(self.model.decoder)
        if form in RECIPES:
            return recipe(form, depth, [(name, columns) for name, (_, columns) in matrices.items()])
        return [dict.fromkeys(matrices, form.upper())] * depth

    def _mean_bits(self, types: Sequence[Mapping[str, str]]) -> float:
        sizes = {name: rows * columns for name, (rows, columns) in matrices_of(self.model.decoder).items()}
        bits = sum(sizes[name] * ggml_bits(form) for layer in types for name, form in layer.items())
        return bits / (len(types) * sum(sizes.values()))

    def _mixture(self, name: str) -> Decoder:
        """Returns the decoder of the least predicted loss whose layers take at most the bytes of a recipe's."""
        decoder, problem = self.model.decoder, self.problem
        limit = self._mean_bits(self._types(name)) / 8 * sum(map(prod, matrices_of(decoder).values()))
        # Norms are floats of fp16 in the costs, whoever rounds the matrices.
        norms = layer_bytes(decoder, 2) - 2 * len(decoder.layers) * sum(map(prod, matrices_of(decoder).values()))
        own = replace(
            problem, sensitivities=uncut(problem.sensitivities), layer_formats=tuple(range(1, len(problem.formats)))
        )
        found = uniform(own, {"bytes": limit * len(decoder.layers) + norms})
        if found is None:
            raise InputError(f"no mixture is as small as {name}", "Let it choose among formats of fewer bits.")
        return found.decoder(decoder)


def matrices_of(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the matrices of a layer by their names within it; all layers are alike."""
    shapes = decoder.layer_shapes(0)
    return {name.removeprefix("layers.0."): shape for name, shape in shapes.items() if len(shape) == 2}


def _divides(form: WeightFormat, decoder: Decoder) -> bool:
    """Returns whether the groups of a format divide the inputs of all matrices of a decoder."""
    return all(columns % form.multiple == 0 for _, columns in matrices_of(decoder).values())


def bits_of(form: WeightFormat) -> float:
    """Returns the bits of a weight in a format, scales in fp16 and all else included."""
    inputs = 256 * 64  # a multiple of every group
    return 8 * form.stored_bytes(1, inputs) / inputs


def _bits(decoder: Decoder) -> float:
    """Returns the mean bits of a weight of the layers of a decoder whose modules all have formats."""
    formats, shapes = decoder.weight_formats, decoder.shapes()
    sizes = {name: prod(shapes[name]) for name in formats}
    return sum(sizes[name] * bits_of(form) for name, form in formats.items()) / sum(sizes.values())


Bound = tuple[str, BytesCell, BytesCell, tuple[float, float]]
BOUNDS: tuple[Bound, ...] = (
    # What is divided by what, and the most of it that was asked for on each of BOUND_TEXTS.
    *(
        (form.upper(), BytesCell(OURS, form), BytesCell(LLAMA, form), most)
        for form, most in (
            ("q4_k", (0.65, 0.85)),
            ("q4_0", (0.35, 0.45)),
            ("q3_k", (0.40, 0.50)),
            ("q4_1", (0.70, 0.90)),
            ("q5_0", (0.35, 0.45)),
        )
    ),
    *(
        (f"mixture at the bytes of {name}", BytesCell(OURS, name), BytesCell(LLAMA, name), (0.8, 0.9))
        for name in RECIPES
    ),
    (f"{SYMMETRIC}, of AutoRound", BytesCell(OURS, SYMMETRIC), BytesCell(AUTOROUND, SYMMETRIC), (1.0, 1.0)),
    (f"{OFFSET}, of {SAME_BYTES}", BytesCell(OURS, OFFSET), BytesCell(OURS, SAME_BYTES), (0.85, 0.85)),
)


def _losses_in(row: Mapping[str, Any]) -> list[str]:
    """Returns the divergences of a line, and its rises, each of all texts."""
    return [" / ".join(f"{row[measure][text][0]:.4f}" for text in TEXTS) for measure in ("kl", "rise")]


def bytes_table(rows: Rows) -> str:
    """Returns the table of all grids and recipes, with what each quantiser loses on them."""
    names = [*TYPES, SYMMETRIC, SAME_BYTES, OFFSET, *RECIPES]
    labels = {LLAMA: "llama.cpp, imatrix", GPTQ: "GPTQ", AUTOROUND: "AutoRound", OURS: "edgeprune"}
    lines = []
    for name in names:
        found = {by: row for by in labels if (row := rows.get(BytesCell(by, name).key))}
        for by, row in found.items():
            shown = name if name in WEIGHT_FORMATS and WEIGHT_FORMATS[name].storage != "gguf" else name.upper()
            lines.append([shown, f"{row['bits'] / 16:.3f}", labels[by], *_losses_in(row), f"{row['seconds']:.0f}"])
    lines.sort(key=lambda line: float(line[1]))
    texts = " / ".join(TEXTS)
    columns = ["grid", "bytes of fp16's", "rounded by", f"KL: {texts}", f"rise: {texts}", "seconds of a processor"]
    return table(columns, lines)


def bytes_bounds_table(rows: Rows) -> str:
    """Returns the table of what was asked for and what came of it."""
    lines = []
    for label, cell, other, most in BOUNDS:
        if cell.key in rows and other.key in rows:
            row, base = rows[cell.key], rows[other.key]
            ratios = [row["kl"][text][0] / base["kl"][text][0] for text in TEXTS]
            is_met = all(ratio <= bound for ratio, bound in zip(ratios, most, strict=False))  # the handbook has none
            asked = " / ".join(f"{bound:.2f}" for bound in most)
            lines.append([label, asked, " / ".join(f"{r:.2f}" for r in ratios), "yes" if is_met else "no"])
    texts = " / ".join(TEXTS)
    return table(["edgeprune's KL, of another's", f"at most: {' / '.join(BOUND_TEXTS)}", f"is: {texts}", "met"], lines)


WRITERS = {"bytes": bytes_table, "bytes bounds": bytes_bounds_table}
