"""frontier.html: the ladder as plots and a table to pick from; one self-contained file that opens offline.

It adds no figure to the document of the frontier.
"""

from __future__ import annotations

from edgeprune.report.figures import figure_text, interval_of, no_interval_text, number_text, percent_text, rise_of
from edgeprune.report.frontier import Dense, Frontier, Rung, pick_command
from edgeprune.report.frontier_plot import AXES, agreement_of, drawn_rungs, frontier_plots
from edgeprune.report.schema import BROKEN_PERCENT, DEGRADED_PERCENT, Figure
from edgeprune.report.tables import Cell, Table, table
from edgeprune.report.tasks import points_text
from edgeprune.report.templates import render

COLUMNS = {  # field: head of its column in the table
    "decode": "per token",
    "decode_ratio": "of dense",
    "tokens_per_second": "tokens/s",
    "prefill": "first token",
    "memory": "memory",
}


def render_frontier(frontier: Frontier, bundle: str) -> str:
    """Returns the whole page. bundle: the folder's name, for the commands. User text is escaped."""
    # Rungs whose rise is beyond floating point are named instead of drawn.
    drawn = drawn_rungs(frontier)
    return render(
        "frontier.html.jinja",
        f=frontier,
        bundle=bundle,
        plots=frontier_plots(frontier),
        buttons={field: label for field, (label, *_) in AXES.items()},
        undrawn=[rung.index for rung in frontier.rungs if rung not in drawn],
        pick_command=pick_command,
        number_text=number_text,
        rise_of=rise_of,
        rungs=rung_table(frontier),
        basis=basis_table(frontier),
        agreements=any(agreement_of(rung) for rung in frontier.rungs),
        degraded_percent=DEGRADED_PERCENT,
        broken_percent=BROKEN_PERCENT,
        intact=frontier.fastest(("intact",)),
        usable=frontier.fastest(("intact", "degraded")),
    )


def rung_table(frontier: Frontier) -> Table:
    """Returns the table to pick from: the dense model first, then each rung.

    A column of one source names it in its head, in one of several each figure names its own.
    """
    texts = [text.name for text in frontier.rungs[0].texts] if frontier.rungs else []
    agreements = any(agreement_of(rung) for rung in frontier.rungs)
    perplexities = [f"perplexity, {name}" if len(texts) > 1 else "perplexity" for name in texts]
    heads = ["rung", "quality", *(f"{head}, measured" for head in perplexities)]
    heads += ["same next token, measured"] if agreements else []
    tasks = frontier.rungs[0].tasks if frontier.rungs else []
    heads += [f"{task.name}, measured" for task in tasks]
    for field, name in COLUMNS.items():
        sources = frontier.sources(field)
        heads.append(f"{name}, {sources[0]}" if len(sources) == 1 else name)
    dense = frontier.rungs[0].texts if frontier.rungs else []
    rows: list[list[Cell | str]] = [
        ["dense", "", *(f"{text.dense:.2f}" for text in dense), *([""] if agreements else [])]
        + [f"{task.dense.percent:.1f} %" if task.dense else "" for task in tasks]
        + _figure_cells(frontier, frontier.dense)
        + ["", ""]
    ]
    for rung in frontier.rungs:
        document = "picture" if rung.grid else "document"
        doubt = f"interval: {' to '.join(rung.grades)}" if len(rung.grades) > 1 else ""
        cells: list[Cell | str] = [
            Cell(str(rung.index), strong=True),
            Cell(rung.grade, note=doubt, style=rung.grade, strong=True),
        ]
        for text in rung.texts:
            interval = interval_of(text) or no_interval_text(text, document)
            cells.append(Cell(number_text(text.rise_percent, "%"), note=interval, strong=True))
        if agreements:
            agreed, interval = agreement_of(rung) or ("", "")
            cells.append(Cell(agreed, note=interval))
        for task in rung.tasks:
            cells.append(Cell(f"{task.fitted.percent:.1f} %", note=points_text(task.difference)))
        rows.append([*cells, *_figure_cells(frontier, rung), percent_text(rung.ratio), percent_text(rung.total_ratio)])
    return table([*heads, "pruned", "of all"], rows)


def _figure_cells(frontier: Frontier, point: Dense | Rung) -> list[Cell | str]:
    """Returns the cells of the columns of the table that hold figures."""
    cells: list[Cell | str] = []
    for field in COLUMNS:
        figure: Figure | None = getattr(point, field, None)
        if figure is None:
            cells.append("")
            continue
        value, _, interval = figure_text(figure).partition(" (")
        note = "" if field == "tokens_per_second" else interval.removesuffix(")")
        source = figure.source if len(frontier.sources(field)) > 1 else None
        cells.append(Cell(value.removesuffix(" tokens/s"), source, note))
    return cells


def basis_table(frontier: Frontier) -> Table:
    """Returns what each rung was fitted to, what it reached, and what its figures rest on."""

    def basis(figure: Figure) -> Cell:
        return Cell(figure.basis or figure.device, figure.source)

    return table(
        ("rung", "fitted to", "reached", "per token rests on", "memory rests on", "odd input"),
        (
            (
                str(rung.index),
                rung.asked,
                Cell(rung.status.replace("_", " "), rung.rests_on),
                basis(rung.decode),
                basis(rung.memory),
                rung.finding or "none is far worse",
            )
            for rung in frontier.rungs
        ),
    )
