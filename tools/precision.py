"""The cells and tables of docs/precision.md: what weight formats lose, with pruning and without.

They are run by tools/quality.py (`precision`) on its texts and samples. The model is the demo's, turned
(tools/turned.py): as it comes its layers lie on a grid of 4 bits already.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.engine.work import layer_bytes
from edgeprune.errors import InputError
from edgeprune.evaluate.perplexity import Losses, log_rise
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import CHUNK_TOKENS, WeightStream, final_states, head_logits, weight_stream
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.quantised import as_float
from edgeprune.ondevice.machine import peak_bytes
from edgeprune.precision import PRECISIONS, WEIGHT_FORMATS
from edgeprune.progress import Silent
from edgeprune.pruning.grids import choose_grid
from edgeprune.pruning.methods import DEFAULT, METHODS
from edgeprune.pruning.prune import prune, result_of
from edgeprune.search.module_costs import ModuleCosts, additive, channel_options
from edgeprune.search.planner import uncut
from edgeprune.search.sensitivity import sensitivities_of
from edgeprune.search.solve import Allocation, Problem, uniform
from edgeprune.search.widths import Format, dense_widths
from tools.pages import table
from tools.turned import check_turned, turned

if TYPE_CHECKING:
    from tools.quality import Texts

ByText = dict[str, list[float]]
Rows = Mapping[str, Mapping[str, Any]]  # the finished cells' lines by their keys

FLOAT = "float"
TABLES_IN = "int8"  # the format of embedding and head, wherever the layers have any
MIXED = (FLOAT, "int8", "int4-64")
MULTIPLE = 64  # of the channels: of the groups
SHARES = (0.28, 0.33, 0.42, 0.60, 0.75, 0.90)  # of the predictions, beside the two that are compared with others
TEXTS = ("speeches", "handbook")
OWN = "earlier speeches"  # other places of the texts that the samples are from: what a prediction speaks of
CALIBRATION = 16


@dataclass(frozen=True)
class PrecisionCell:
    """One model. way: of `all`, every module has the one format; `nearest`: the same without the walk, rounded to
    nearest on unweighted grids; `search`: what the search chooses among the formats; `opposite`: int8 and int4-64
    the other way round than the search chose.

    share: most of the layers' bytes, of those in fp16; None: the mean of both formats'; cuts: the search may cut
    widths; channels: of every MLP, None for all.
    """

    way: str
    formats: tuple[str, ...]
    share: float | None = None
    cuts: bool = False
    channels: int | None = None

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


JOINED, NEAREST = (PrecisionCell(way, ("int4-64",)) for way in ("all", "nearest"))
ASYMMETRIC, ASYMMETRIC_NEAREST = (PrecisionCell(way, ("int4-32-asymmetric",)) for way in ("all", "nearest"))
INT8 = PrecisionCell("all", ("int8",))
MIXED_38, PRUNED_INT8 = (PrecisionCell("search", formats, 0.38, cuts=True) for formats in (MIXED, ("int8",)))
MIXED_50, PRUNED_50 = (PrecisionCell("search", formats, 0.5, cuts=True) for formats in (MIXED, (FLOAT,)))
HALF, OPPOSITE = (PrecisionCell(way, ("int8", "int4-64")) for way in ("search", "opposite"))
PRUNED, PRUNED_JOINED = (PrecisionCell("all", (form,), channels=1216) for form in (FLOAT, "int4-64"))
PREDICTED = tuple(PrecisionCell("search", MIXED, share, cuts=True) for share in SHARES)


def precision_cells() -> Iterator[PrecisionCell]:
    """Returns all cells, those that decide most first."""
    yield from (JOINED, NEAREST, INT8, HALF, OPPOSITE, MIXED_38, PRUNED_INT8, MIXED_50, PRUNED_50)
    yield from (PRUNED, PRUNED_JOINED, ASYMMETRIC, ASYMMETRIC_NEAREST, *PREDICTED)


def layer_costs(dense: Decoder, formats: Sequence[Format], multiple: int) -> ModuleCosts:
    """Returns the bytes of attentions and MLPs in fp16 and these formats, by their widths; inf where none fits."""
    groups, heads, channels = dense_widths(dense)
    one = replace(dense, layers=dense.layers[:1])

    def held(widths: tuple[int, int, int], form: Format) -> float:
        try:
            return float(_bytes(one.with_layer_widths([widths]).with_formats([(form, form)], None, None)))
        except InputError:
            return np.inf

    attention, mlp = np.zeros((len(formats), groups + 1, heads)), np.full((len(formats), channels + 1), np.inf)
    for place, form in enumerate(formats):
        for g, r in np.ndindex(groups, heads):
            attention[place, g + 1, r] = held((g + 1, r + 1, 0), form)
        mlp[place, 0] = 0.0
        for size in channel_options(channels, multiple):
            mlp[place, size] = held((0, 1, size), form)
    return additive(attention, mlp)


def _bytes(decoder: Decoder) -> int:
    return layer_bytes(decoder, PRECISIONS["fp16"].element_bytes)


def _formats(names: Sequence[str]) -> tuple[Format, ...]:
    return tuple(WEIGHT_FORMATS.get(name) for name in names)


class PrecisionBench:
    """Runs cells on the turned model, which it compares with on the texts."""

    formats: tuple[str, ...] = (*MIXED, *ASYMMETRIC.formats)  # that modules may have
    table_formats: tuple[str, ...] = (TABLES_IN,)  # that are measured of embedding and head

    def __init__(self, texts: Texts) -> None:
        demo = load_model("demo")
        self.model = turned(demo)
        self.ids = torch.from_numpy(texts.rows(CALIBRATION, 0))
        check_turned(demo, self.model, self.ids[:1, :128])
        excerpts = {text: texts.evaluation[text] for text in TEXTS}
        excerpts[OWN] = list(texts.rows(len(excerpts[TEXTS[0]]), 1))
        self.texts = tuple(excerpts)
        self.excerpts = torch.from_numpy(np.stack([row for rows in excerpts.values() for row in rows]))

    @functools.cached_property
    def problem(self) -> Problem:
        """Returns the problem whose one cost is the layers' bytes."""
        decoder, forms, table_forms = self.model.decoder, _formats(self.formats), _formats(self.table_formats)
        sensitivities = sensitivities_of(self.model, self.ids.numpy(), DEFAULT, 0, Silent(), forms[1:], table_forms)
        return Problem(
            dense_widths(decoder),
            sensitivities,
            {"bytes": layer_costs(decoder, forms, MULTIPLE)},
            MULTIPLE,
            formats=forms,
            tied=decoder.tie_word_embeddings,
        )

    def dense(self) -> dict[str, Any]:
        """Returns the dense model's line: its nats by excerpt, and the measured factors of all predictions."""
        sensitivities = self.problem.sensitivities
        responses = {name: losses.response for name, losses in sensitivities.roundings.items()}
        return {"nats": self._dense_nats, "responses": {"widths": sensitivities.response.tolist()} | responses}

    def allocation(self, cell: PrecisionCell) -> Allocation:
        """Returns the widths and formats of a cell, with the predicted loss."""
        problem, forms = self.problem, _formats(cell.formats)
        tables = _formats([TABLES_IN if cell.formats != (FLOAT,) else FLOAT]) * 2
        if cell.channels is not None or cell.way in ("all", "nearest"):
            widths = problem.dense._replace(intermediate_size=cell.channels or problem.dense.intermediate_size)
            pairs = ((forms[0], forms[0]),) * problem.depth
            found = Allocation((widths,) * problem.depth, 0, 0.0, pairs, tables)
        else:
            found = self._chosen(cell, tables)
        return replace(found, loss=problem.loss(found))

    def _chosen(self, cell: PrecisionCell, tables: tuple[Format, Format]) -> Allocation:
        problem, forms = self.problem, _formats(cell.formats)
        limit = (cell.share or 0.0) * _bytes(self.model.decoder)
        if cell.share is None:
            limit = float(np.mean([_bytes(self.model.decoder.with_format(form)) for form in forms]))
        places = tuple(problem.formats.index(form) for form in forms)
        sensitivities = problem.sensitivities if cell.cuts else uncut(problem.sensitivities)
        own = replace(
            problem,
            sensitivities=sensitivities,
            layer_formats=places,
            table_formats=(problem.formats.index(tables[1]),),
        )
        found = uniform(own, {"bytes": limit})
        if found is None:
            raise InputError(f"nothing of {cell.formats} fits {cell.share}", "Take another share.")
        if cell.way == "opposite":
            other = dict(zip(forms, reversed(forms), strict=True))
            found = replace(found, formats=tuple((other[one], other[mlp]) for one, mlp in found.formats))
        return found

    def run(self, cell: PrecisionCell) -> dict[str, Any]:
        """Returns a cell's line: rise and divergence by text and excerpt, bytes, prediction and what it is."""
        allocation = self.allocation(cell)
        decoder = self.model.decoder
        target = allocation.decoder(decoder)
        start = time.monotonic()
        if cell.way == "nearest":
            result, stream = target, rounded_stream(self.model, target)
        else:
            method = METHODS[DEFAULT]
            result, stream = result_of(target, method), prune(self.model, target, self.ids, method, 0)
        return {
            "bytes": _bytes(target) / _bytes(decoder),
            "predicted": None if cell.way == "nearest" else allocation.loss,
            **self.losses(result, stream),
            "choice": allocation.summary | allocation.format_counts,
            "formats": [[form.name if form else FLOAT for form in pair] for pair in allocation.formats or ()],
            "seconds": time.monotonic() - start,
            "peak_bytes": peak_bytes(),
        }

    def losses(self, decoder: Decoder, stream: WeightStream) -> dict[str, Any]:
        """Returns rise and divergence of a model from the dense one, by text and by excerpt."""
        tokens = self.excerpts.shape[1] - 1  # that are predicted of each excerpt
        nats, divergences = self._compared(decoder, *self._states(decoder, stream))
        return {
            "rise": {
                text: log_rise(_losses(self._dense_nats[text], tokens), _losses(nats[text], tokens), 0) for text in nats
            },
            "kl": {text: [np.mean(row), np.std(row, ddof=1) / len(row) ** 0.5] for text, row in divergences.items()},
            "nats": nats,
            "kl_of": divergences,
        }

    @functools.cached_property
    def _dense_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._states(self.model.decoder, weight_stream(self.model))

    @functools.cached_property
    def _dense_nats(self) -> dict[str, list[float]]:
        return self._compared(self.model.decoder, *self._dense_states)[0]

    @torch.inference_mode()
    def _states(self, decoder: Decoder, stream: WeightStream) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the head reads at all positions of the excerpts, (excerpts * (length - 1), c), and the head."""
        return final_states(decoder, stream, self.excerpts, CHUNK_TOKENS, lambda: None)

    @torch.inference_mode()
    def _compared(self, decoder: Decoder, states: torch.Tensor, head: torch.Tensor) -> tuple[ByText, ByText]:
        """Returns the nats of each excerpt, summed, and its divergence from the dense model per token, by text."""
        dense_states, dense_head = self._dense_states
        results = []
        for place, labels in enumerate(self.excerpts[:, 1:]):
            rows = slice(place * len(labels), (place + 1) * len(labels))
            logits = head_logits(decoder, states[rows], head).log_softmax(dim=-1)  # (length - 1, vocab_size)
            expected = head_logits(self.model.decoder, dense_states[rows], dense_head).log_softmax(dim=-1)
            nats = F.nll_loss(logits, labels, reduction="sum")
            divergence = F.kl_div(logits, expected, reduction="batchmean", log_target=True)
            results.append((float(nats), float(divergence)))
        nats, divergences = np.array(results).T.round(6).reshape(2, len(self.texts), -1).tolist()
        return dict(zip(self.texts, nats, strict=True)), dict(zip(self.texts, divergences, strict=True))


def _losses(nats: Sequence[float], tokens: int) -> Losses:
    """Returns the losses of excerpts of so many predicted tokens each."""
    return Losses(np.array(nats), np.full(len(nats), tokens), [])


def rounded_stream(model: Model, target: Decoder) -> WeightStream:
    """Yields the weights of a target, rounded to nearest on grids for which all inputs count alike."""
    formats = target.weight_formats
    for name, weight in weight_stream(model):
        if (form := formats.get(name)) is not None:
            weight = as_float(weight)
            weight = choose_grid(weight, torch.ones(weight.shape[1]), form, "starts").nearest(weight)
        yield name, weight


LABELS = {
    INT8: "int8",
    JOINED: "int4-64",
    NEAREST: "int4-64, rounded to nearest",
    ASYMMETRIC: "int4-32-asymmetric",
    ASYMMETRIC_NEAREST: "int4-32-asymmetric, rounded to nearest",
    MIXED_50: "50 %: float, int8, int4-64 and widths",
    PRUNED_50: "50 %: pruning alone",
    MIXED_38: "38 %: float, int8, int4-64 and widths",
    PRUNED_INT8: "38 %: int8 and widths",
    HALF: "int8 and int4-64, half of the bytes each saves",
    OPPOSITE: "the opposite choice",
    PRUNED: "a fifth of the channels pruned",
    PRUNED_JOINED: "a fifth of the channels pruned, and int4-64",
}


def precision_table(rows: Rows) -> str:
    """Returns the table of all models that are compared."""
    lines = []
    for cell, label in LABELS.items():
        if row := rows.get(cell.key):
            rises = [f"{value:.4f} [{low:.4f}, {high:.4f}]" for value, low, high in (row["rise"][t] for t in TEXTS)]
            divergences = [f"{value:.4f} ({error:.4f})" for value, error in (row["kl"][t] for t in TEXTS)]
            predicted = "" if row["predicted"] is None else f"{row['predicted']:.4f}"
            lines.append([label, f"{row['bytes']:.3f}", *rises, *divergences, predicted])
    columns = [f"{what}, {text}" for what in ("rise", "KL") for text in TEXTS]
    return table(["layers' weights", "bytes of fp16's", *columns, "predicted"], lines)


def _values(row: Mapping[str, Any], measure: str) -> list[float]:
    """Returns a line's rises or divergences, one for each text."""
    return [row[measure][text][0] for text in TEXTS]


BOUNDS = (
    # What is divided by what, by which measure, and the least or most of it that was asked for.
    ("int4-64, rounded on the walk, of rounded to nearest", "kl", JOINED, (NEAREST,), "at most", 0.6),
    ("int4-32-asymmetric, the same", "kl", ASYMMETRIC, (ASYMMETRIC_NEAREST,), "at most", 0.6),
    ("at 50 %, pruning alone, of the mixed choice", "rise", PRUNED_50, (MIXED_50,), "at least", 50.0),
    ("at 38 %, int8 and pruning, of the mixed choice", "rise", PRUNED_INT8, (MIXED_38,), "at least", 5.0),
    ("the opposite half in int4, of the chosen half", "rise", OPPOSITE, (HALF,), "at least", 1.5),
    ("pruned and int4-64, of the sum of both alone", "rise", PRUNED_JOINED, (PRUNED, JOINED), "at most", 1.0),
)


def bounds_table(rows: Rows) -> str:
    """Returns the table of what was asked for and what came of it: a loss as a share of others."""
    lines = []
    for label, measure, cell, others, direction, bound in BOUNDS:
        if any(one.key not in rows for one in (cell, *others)):
            continue
        below = np.sum([_values(rows[other.key], measure) for other in others], axis=0)
        ratios = _values(rows[cell.key], measure) / below
        is_met = (ratios <= bound if direction == "at most" else ratios >= bound).all()
        figures = [f"{ratio:.2f}" for ratio in ratios]
        lines.append([label, measure.upper() if measure == "kl" else measure, f"{direction} {bound:g}", *figures])
        lines[-1].append("yes" if is_met else "no")
    return table(["a loss of another", "by", "asked", *TEXTS, "met"], lines)


def predictions_table(rows: Rows) -> str:
    """Returns the table of the mixed choices at all limits: predicted and measured loss, with how far the
    prediction is off."""
    lines = []
    for cell in sorted((*PREDICTED, MIXED_38, MIXED_50), key=lambda cell: -cell.share):
        if row := rows.get(cell.key):
            choice = {name: row["choice"].get(name, 0) for name in MIXED}
            measured = [row["kl"][text][0] for text in (OWN, *TEXTS)]
            figures = [f"{value:.4f} ({100 * (row['predicted'] / value - 1):+.0f} %)" for value in measured]
            channels = str(row["choice"]["most channels"])
            counts = [str(count) for count in choice.values()]
            lines.append([f"{100 * cell.share:.0f} %", *counts, channels, f"{row['predicted']:.4f}", *figures])
    return table(["limit", *MIXED, "channels", "predicted", *(f"KL, {text}" for text in (OWN, *TEXTS))], lines)


WRITERS = {"precision": precision_table, "bounds": bounds_table, "predictions": predictions_table}
