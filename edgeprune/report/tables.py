"""The tables of the report's page, as words: the template draws them and adds nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeprune.ondevice.budget import OF_QUALITY, format_bytes
from edgeprune.report.experience import Experience
from edgeprune.report.figures import (
    NAMES,
    OUTCOME_LABEL,
    figure_text,
    headroom_text,
    interval_text,
    no_interval_text,
    number_text,
    percent_text,
    picture_room_text,
    reading_text,
    rise_interval,
    room_text,
    search_source,
    share_text,
    worst_agreement,
)
from edgeprune.report.images import Distances
from edgeprune.report.plots import is_uniform
from edgeprune.report.robustness import Robustness
from edgeprune.report.schema import Figure, Report, Source
from edgeprune.report.tasks import TASK_COLUMNS, task_row


@dataclass(frozen=True)
class Cell:
    """A cell: a text, the source of the figure in it, and what else stands there in small."""

    text: str
    source: Source | None = None
    note: str = ""
    style: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """heads: of the columns; rows: of cells, the first of which names the row; a plain text is a cell too."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell | str]]) -> Table:
    return Table(heads, [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows])


def figure_cell(figure: Figure | None, strong: bool = False) -> Cell:
    return Cell(figure_text(figure), figure and figure.source, strong=strong)


def all_tables(report: Report) -> dict[str, Table]:
    """Returns the tables by name; one without rows is left out."""
    pictures = report.quality.pictures
    tables = {
        "fit": _fit(report),
        "noticed": _noticed_of_pictures(report) if pictures else _noticed(report),
        "stop": _stop(report),
        "texts": _texts(report),
        "tasks": table(TASK_COLUMNS, map(task_row, report.quality.tasks)),
        "odd": _odd(report.robustness) if report.robustness else None,
        "distances": _distances(pictures.dense, pictures.fitted, pictures.reference, pictures.difference)
        if pictures and pictures.fitted
        else None,
        "conditions": _conditions(report),
        "removed": _removed(report),
        "modules": _modules(report),
        "candidates": _candidates(report),
        "choices": table(("choice", "value", "reason"), ((c.name, c.value, c.reason) for c in report.choices)),
        "figures": _figures(report),
        "device": _device(report),
        "files": table(("file", "size"), ((name, format_bytes(size)) for name, size in report.files.items())),
        "stages": _stages(report.stages),
        "versions": _versions(report),
    }
    return {name: one for name, one in tables.items() if one is not None and one.rows}


def _fit(report: Report) -> Table:
    """Returns the limits with their verdicts; the memory stands there too where it has none."""
    rows: list[Sequence[Cell | str]] = [
        (
            NAMES[row.name],
            Cell(OUTCOME_LABEL[row.status], style=row.status, strong=True),
            figure_cell(row.fitted),
            number_text(row.limit, row.unit),
            headroom_text(row),
            figure_cell(row.dense),
            row.asked,
        )
        for row in report.budget
    ]
    if "memory" not in {row.name for row in report.budget}:
        fitted, dense = (figure_cell(side.performance.memory_total) for side in (report.fitted, report.dense))
        rows.append((NAMES["memory"], "no limit", fitted, "", "", dense, ""))
    return table(("limit on", "verdict", "fitted", "limit", "headroom", "dense", "asked"), rows)


def _noticed(report: Report) -> Table:
    """Returns what a reader of the model's answers notices."""

    def speed(side: Experience) -> Cell:
        rate = side.tokens_per_second
        return Cell(reading_text(side), rate.source, figure_text(rate))

    def room(name: str, side: Experience) -> Cell:
        figure = getattr(side, name)
        return Cell(room_text(figure, side), figure.source)

    sides = [report.experience[name] for name in ("fitted", "dense")]
    rows: list[Sequence[Cell | str]] = [
        ("an answer begins after", *(figure_cell(side.first_token) for side in sides)),
        ("and comes at", *map(speed, sides)),
        ("longest context", *(room("longest_context", side) for side in sides)),
        ("answers at once", *(room("sequences", side) for side in sides)),
    ]
    return table(("", "fitted", "dense"), [*rows, *_same(report, "token")])


def _noticed_of_pictures(report: Report) -> Table:
    sides = [report.experience[name] for name in ("fitted", "dense")]
    rows: list[Sequence[Cell | str]] = []
    if sides[0].seconds_per_image:
        rows.append(("a picture takes", *(figure_cell(side.seconds_per_image) for side in sides)))
    at_once = [Cell(picture_room_text(side, report), side.sequences.source) for side in sides]
    return table(("", "fitted", "dense"), [*rows, ("pictures at once", *at_once), *_same(report, "code")])


def _same(report: Report, unit: str) -> list[Sequence[Cell | str]]:
    agreement = worst_agreement(report.quality.texts)
    return [(f"likeliest next {unit} the same", Cell(share_text(agreement), "measured"), "")] if agreement else []


def _stop(report: Report) -> Table | None:
    """Returns the nearest points where the budget lies beyond the quality limit."""
    if (stop := report.quality_stop) is None:
        return None
    beyond = f"model nearest to the budget{', which meets it' if stop.status == 'met' else ''}"
    points = (
        ("smallest model within the quality limit", report.quality.rise_percent, report.fitted.performance),
        (beyond, stop.rise_percent, stop.performance),
    )
    return table(
        ("", "perplexity", "memory", "first token", "per token"),
        (
            (
                name,
                Cell(number_text(rise, "%"), "measured", strong=True),
                *map(figure_cell, (of.memory_total, of.prefill, of.decode)),
            )
            for name, rise, of in points
        ),
    )


def _texts(report: Report) -> Table:
    """Returns the perplexity of each held-out text, with the agreement."""
    noun, document = ("pictures", "picture") if report.quality.pictures else ("text", "document")
    rows = []
    for text in report.quality.texts:
        agreement, places = text.agreement, ""
        if agreement:
            places = f"{agreement.places:,}"
            if agreement.documents < agreement.of:
                places += f" in {agreement.documents} of {agreement.of} {document}s"
        rows.append(
            (
                text.name,
                Cell(number_text(text.rise_percent, "%"), strong=True),
                rise_interval(text) or no_interval_text(text, document),
                f"{text.documents:,}",
                f"{text.dense:.2f}",
                f"{text.fitted:.2f}",
                f"{text.tokens:,}",
                share_text(agreement),
                places,
            )
        )
    unit = "code" if report.quality.pictures else "token"
    heads = (f"held-out {noun}", "rise", "95 % interval", f"{document}s", "dense", "fitted", f"{unit}s")
    return table((*heads, f"same next {unit}", "of places"), rows)


def _odd(robustness: Robustness) -> Table:
    """Returns the rise of perplexity on each variant of the held-out text."""
    rows = [
        (
            Cell(variant.name, note=variant.words),
            Cell(number_text(variant.rise_percent, "%"), strong=True),
            rise_interval(variant) or no_interval_text(variant, "window"),
            f"{variant.dense:.2f}",
            f"{variant.fitted:.2f}",
            f"{variant.tokens:,}",
            share_text(variant.agreement),
        )
        for variant in robustness.variants
    ]
    return table(("held-out text", "rise", "95 % interval", "dense", "fitted", "tokens", "same next token"), rows)


def _distances(dense: Distances, fitted: Distances, reference: str, difference: object) -> Table:
    def of(name: str) -> list[Cell]:
        return [Cell(interval_text(getattr(side, name)), "measured") for side in (fitted, dense)]

    rows: list[Sequence[Cell | str]] = [
        ("kernel distance", *of("kernel")),
        ("Frechet distance", *(Cell(f"{side.frechet.value:.3g}", "measured") for side in (fitted, dense))),
        ("precision: like the reference", *of("precision")),
        ("recall: as diverse as it", *of("recall")),
    ]
    if difference:
        rows.append(("kernel distance, fitted less dense, paired", Cell(interval_text(difference), "measured"), ""))
    return table((f"to {reference}", "fitted", "dense"), rows)


def _conditions(report: Report) -> Table:
    """Returns how the model was built and measured, with the rungs that were tried on the device."""
    rows: list[Sequence[Cell | str]] = list(report.fitted.performance.conditions.items())
    if measurement := report.measurement:
        machine = f"{measurement.created}, {measurement.machine}, {measurement.engine} {measurement.version}"
        rows.append(("on the device", machine))
        for rung in measurement.rungs:
            figures = [
                f"{NAMES.get(name, name)} {number_text(value, 'bytes' if name == 'memory' else 'ms')} "
                f"({rung.sources[name]})"
                for name, value in rung.figures.items()
            ]
            taken = " (taken)" if rung.index == measurement.rung else ""
            rows.append((f"rung {rung.index}{taken}", " ".join([", ".join([rung.status, *figures]), rung.error])))
    return table(("condition", "value"), rows)


def _removed(report: Report) -> Table:
    dense, fitted = report.dense, report.fitted
    rows: list[Sequence[Cell | str]] = [
        (name, percent_text(removed), *(f"{getattr(side, field):,}" for side in (dense, fitted)))
        for name, removed, field in (
            ("attention and MLP weights", report.ratio, "layer_parameters"),
            ("all weights", report.total_ratio, "parameters"),
        )
    ]
    moved = [format_bytes(side.decode_bytes) for side in (dense, fitted)]
    rows.append(("bytes moved per token, by arithmetic", percent_text(report.decode_bytes_ratio), *moved))
    if is_uniform(fitted.widths) and is_uniform(dense.widths):
        for key, old in dense.widths[0].items():
            new = fitted.widths[0][key]
            share = percent_text(1 - new / old) if old else ""
            rows.append((f"{key}, in each of {len(fitted.widths)} layers", share, f"{old:,}", f"{new:,}"))
    return table(("", "removed", "dense", "fitted"), rows)


def _modules(report: Report) -> Table:
    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return table(
        ("layer", "module", "kept", "damping", "blend", "error without compensation", "with"),
        (
            (
                str(m.layer),
                m.kind,
                f"{m.kept} of {m.of}",
                "no update" if m.fell_back else text(m.damping, ".3g"),
                "–" if m.damping is None else text(m.blend, ".2f"),
                text(m.error_before, ".4f"),
                text(m.error_after, ".4f"),
            )
            for m in report.modules
        ),
    )


def _candidates(report: Report) -> Table | None:
    """Returns the candidates of the search: predicted and obtained, and what was kept of them."""
    limits = [row for row in report.budget if row.name not in OF_QUALITY]
    if not report.search.candidates:
        return None
    heads = [head for row in limits for head in (f"{NAMES[row.name]}, predicted", f"{NAMES[row.name]}, obtained")]
    widths = report.search.candidates[0].widths
    rows = []
    for number, one in enumerate(report.search.candidates, 1):
        status = OUTCOME_LABEL[one.status] + (f", {one.seconds:.0f} s" if one.seconds is not None else "")
        cells: list[Cell | str] = []
        for row in limits:
            cells.append(number_text(one.predicted[row.name], row.unit))
            cells.append(Cell(number_text(one.obtained[row.name], row.unit), search_source(report, row)))
        kept = [f"{one.widths[key]:,}" if key in one.widths else "–" for key in widths]
        chosen = Cell(f"{number} chosen" if one.chosen else str(number), strong=one.chosen)
        rows.append((chosen, Cell(status, style=one.status), *cells, *kept))
    return table(("candidate", "verdict", *heads, *(NAMES.get(key, key.replace("_", " ")) for key in widths)), rows)


def _figures(report: Report) -> Table:
    """Returns every figure of the performance with what it rests on."""
    dense, fitted = report.dense.performance, report.fitted.performance
    pairs = [(name, dense.memory[name], figure) for name, figure in fitted.memory.items()]
    pairs += [
        ("first token (prefill)", dense.prefill, fitted.prefill),
        ("per token (decode)", dense.decode, fitted.decode),
        ("throughput", report.tokens_per_second.get("dense"), report.tokens_per_second.get("fitted")),
        ("first token to the dense model's, in turns", dense.prefill_ratio, fitted.prefill_ratio),
        ("per token to the dense model's, in turns", dense.decode_ratio, fitted.decode_ratio),
    ]
    rows: list[Sequence[Cell | str]] = [
        (name, figure_cell(d), figure_cell(f), f.basis or f.device) for name, d, f in pairs if f is not None
    ]
    for name, percentiles in fitted.percentiles.items():
        for key, value in percentiles.items():
            other = dense.percentiles.get(name, {}).get(key)
            sources = [getattr(side, name).source for side in (dense, fitted)]
            first = "–" if other is None else Cell(number_text(other, "ms"), sources[0])
            second = Cell(number_text(value, "ms"), sources[1])
            rows.append((f"{NAMES.get(name, name)}, {key} of its own run", first, second, ""))
    return table(("figure", "dense", "fitted", "rests on"), rows)


def _device(report: Report) -> Table:
    return table(
        ("figure", "value", "confidence", "source"),
        (
            (
                name.replace("_", " "),
                f"{figure.value:g}{'' if figure.unit == '1' else f' {figure.unit}'}",
                figure.confidence,
                figure.source,
            )
            for name, figure in report.device.figures.items()
        ),
    )


def _stages(stages: Mapping[str, float]) -> Table:
    rows = [(name, f"{seconds:.1f}") for name, seconds in stages.items()]
    return table(("stage", "seconds"), [*rows, ("all of it", f"{sum(stages.values()):.1f}")] if rows else [])


def _versions(report: Report) -> Table:
    model = report.model
    described = (
        f"{model.name}: {model.family}, {model.layers} layers, hidden size {model.hidden_size}, vocabulary "
        f"{model.vocab_size:,}, sha256 {model.fingerprint}"
    )
    engine = [(report.engine.name, report.engine.version)] if report.engine.version else []
    return table(("what", "version"), [*report.versions.items(), *engine, ("model", described)])
