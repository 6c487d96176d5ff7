"""The report's plots: each answers what a table answers less well. They add no figure to the report.

A measured figure is drawn solid, one that was built or estimated pale with a dashed edge, wherever both may stand in
one plot. Texts stand above what they name, so that none is cut and none lies on an interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from edgeprune.ondevice.budget import OF_QUALITY
from edgeprune.report.figures import NAMES, figure_text, number_text, percent_tick, search_source
from edgeprune.report.quality import Answers
from edgeprune.report.schema import BROKEN_PERCENT, DEGRADED_PERCENT, Constraint, Module, Report
from edgeprune.report.svg import (
    DENSE,
    FITTED,
    INK,
    LIMIT,
    LINE,
    PALETTE,
    SOFT,
    Plot,
    drawing,
    is_drawable,
    lines_of,
    new_plot,
    reaches,
    whole_ticks,
)

MIB = 2**20
MOST_SHARE = 250.0  # % of a limit up to which bars are drawn: a longer one ends there with an arrow
BAR, GAP, AXIS, LEGEND = 9, 12, 46, 20  # px: a bar, what is free below it, the axis with its title, a legend's line

_LABELS = {
    "budget": "memory, latency and quality of both models against their limits",
    "quality": "rise of perplexity on each text with its interval",
    "answers": "share of answers that begin like the dense model's",
    "memory": "parts of the memory of both models",
    "latency": "parts of the estimated time per token of both models",
    "path": "predicted and obtained figures of each candidate",
    "widths": "share of heads and channels kept in each layer",
    "errors": "distance from the dense model behind each module",
}


def all_plots(report: Report) -> dict[str, str]:
    """Returns the plots as SVG by name, without those that have nothing to show: a limit, a candidate, a pruned
    module."""
    with drawing():
        return {name: plot.svg(name, _LABELS[name]) for name, plot in drawn_plots(report).items()}


def drawn_plots(report: Report) -> dict[str, Plot]:
    """Returns the plots that have something to show, by name; within `drawing`."""
    plots = {
        "budget": _budget(report.budget),
        "quality": _quality(report),
        "answers": _answers(report.quality.answers),
        "memory": _memory(report),
        "latency": _latency(report),
        "path": _path(report),
        "widths": None if is_uniform(report.fitted.widths) else _widths(report.dense.widths, report.fitted.widths),
        "errors": _errors(report.modules),
    }
    return {name: plot for name, plot in plots.items() if plot is not None}


def is_uniform(widths: Sequence[Mapping[str, int]]) -> bool:
    """Returns whether all layers have the same widths."""
    return all(layer == widths[0] for layer in widths)


def _face(color: str, is_measured: bool) -> dict[str, Any]:
    """Returns the look of a bar: solid where its figure was measured, else pale with a dashed edge."""
    if is_measured:
        return {"color": color}
    return {"facecolor": (color, 0.3), "edgecolor": color, "linestyle": (0, (3, 2)), "linewidth": 1.1}


def _rows(height: float, legend_lines: int = 0) -> Plot:
    """Returns a plot whose vertical axis counts px from the top, without marks of its own.

    legend_lines: of the legend above it.
    """
    plot = new_plot(height + AXIS + LEGEND * legend_lines)
    plot.axes.set_ylim(height, 0)
    plot.axes.grid(axis="y", visible=False)
    plot.axes.tick_params(axis="y", left=False, labelleft=False)
    return plot


def _lines(plot: Plot, y: float, lines: Sequence[str], **style: Any) -> float:
    """Writes lines from the left edge of the axes downwards from y in px; returns where the next one begins."""
    across = plot.axes.get_yaxis_transform()
    for line in lines:
        plot.axes.text(0.006, y, line, transform=across, va="top", in_layout=False, **style)
        y += LINE
    return y


def _budget(constraints: Sequence[Constraint]) -> Plot | None:
    """Returns the bars of both models in % of each limit; None where there is no limit above 0."""
    rows = [row for row in constraints if row.limit]
    if not rows:
        return None
    heads = [
        lines_of(f"{NAMES[row.name]}: {number_text(row.limit, row.unit)} at most, asked {row.asked}") for row in rows
    ]
    bars = [[(s, f) for s, f in (("fitted", row.fitted), ("dense", row.dense)) if f is not None] for row in rows]
    height = sum(
        len(head) * LINE + len(own) * (LINE + BAR + GAP / 2) + GAP for head, own in zip(heads, bars, strict=True)
    )
    plot = _rows(height)
    # Above each bar its figure with its source, across it the limit.
    y, farthest = 0.0, 100.0
    for row, head, own in zip(rows, heads, bars, strict=True):
        y = _lines(plot, y, head, color=INK, weight="bold")
        for side, figure in own:
            share = _share(figure.value, row)
            text = f"{side}: {number_text(figure.value, figure.unit)}, {figure.source}"
            y = _lines(plot, y, [text + (" →" if share > MOST_SHARE else "")])
            if isfinite(share):
                length = min(share, MOST_SHARE)
                look = _face(FITTED if side == "fitted" else DENSE, figure.source == "measured")
                bar = plot.axes.barh(y + BAR / 2, length, BAR, **look)[0]
                plot.tip(bar, f"{side}: {figure_text(figure)}, {figure.source}")
                below, above = reaches([(_share(figure.low, row), share, _share(figure.high, row))])
                if (*below, *above) != (0, 0) and length + above[0] < MOST_SHARE:
                    plot.axes.errorbar([share], [y + BAR / 2], xerr=[below, above], color=SOFT, capsize=3)
                farthest = max(farthest, length + (above[0] if length < MOST_SHARE else 0))
            plot.axes.vlines(100, y - 2, y + BAR + 2, color=LIMIT, linestyle="--", linewidth=1.8)
            y += BAR + GAP / 2
        y += GAP
    plot.axes.set_xlim(0, 1.04 * min(farthest, MOST_SHARE))
    plot.axes.set_xlabel("% of the limit, which is the dashed line")
    return plot


def _share(value: float | None, row: Constraint) -> float | None:
    """Returns a value in % of the limit; None where there is none."""
    return None if value is None else 100 * value / row.limit


def _stacked(parts: Mapping[str, Mapping[str, tuple[float, str]]], heads: Mapping[str, str], unit: str) -> Plot:
    """Returns a stacked bar of each model.

    parts: value in the unit and source, by model and part; heads: the text above each model's bar.
    """
    plot = _rows(2 * (LINE + 2 * BAR + GAP), legend_lines=2)
    y = 0.0
    for number, (side, values) in enumerate(parts.items()):
        y = _lines(plot, y, [heads[side]], color=INK) + 2
        left = 0.0
        for (part, (value, source)), color in zip(values.items(), PALETTE, strict=False):
            look = _face(color, source == "measured")
            name = part.replace("_", " ")
            label = "_" if number else name  # each part once in the legend
            bars = plot.axes.barh(y + BAR, value, 2 * BAR, left=left, label=label, **look)
            plot.tip(bars[0], f"{side}, {name}: {value:.4g} {unit}, {source}")
            left += value
        y += 2 * BAR + GAP
    plot.legend(3)
    plot.axes.set_xlabel(unit)
    return plot


def _memory(report: Report) -> Plot:
    sides = {"fitted": report.fitted.performance, "dense": report.dense.performance}
    parts = {
        side: {part: (figure.value / MIB, figure.source) for part, figure in of.memory.items()}
        for side, of in sides.items()
    }
    heads = {
        side: f"{side}: {number_text(of.memory_total.value, 'bytes')}, {of.memory_total.source}"
        for side, of in sides.items()
    }
    return _stacked(parts, heads, "MiB")


def _latency(report: Report) -> Plot:
    sides = {"fitted": report.fitted.latency_shares, "dense": report.dense.latency_shares}
    parts = {side: {part: (value, "estimated") for part, value in of.items()} for side, of in sides.items()}
    heads = {side: f"{side}: {number_text(sum(of.values()), 'ms')} per token, estimated" for side, of in sides.items()}
    return _stacked(parts, heads, "ms")


def _quality(report: Report) -> Plot | None:
    """Returns the rise of perplexity on each text with its interval, against the grades' thresholds.

    None where every rise is beyond floating point.
    """
    texts = [text for text in report.quality.texts if is_drawable((text.rise_percent, text.high_percent))]
    if not texts:
        return None
    heads = [lines_of(f"{text.name}: {number_text(text.rise_percent, '%')}") for text in texts]
    height = sum(len(head) * LINE + 2 * GAP for head in heads) + GAP / 2
    # The thresholds that lie within the range of the axis.
    right = 1.12 * max(DEGRADED_PERCENT, *(text.high_percent for text in texts))
    left = min(-0.02 * right, *(1.12 * text.low_percent for text in texts if is_drawable([text.low_percent])))
    grades = (("degraded", DEGRADED_PERCENT, ":"), ("broken", BROKEN_PERCENT, "--"))
    thresholds = [(f"{grade} from {start:g} %", start, dash) for grade, start, dash in grades if start < right]
    plot = _rows(height, legend_lines=1)
    # Below each name a point with its interval, across it the thresholds.
    y = 0.0
    for text, head in zip(texts, heads, strict=True):
        y = _lines(plot, y, head) + GAP / 2
        reach = reaches([(text.low_percent, text.rise_percent, text.high_percent)])
        bars = plot.axes.errorbar([text.rise_percent], [y], xerr=reach, fmt="o", color=FITTED, capsize=4)
        plot.tip(bars.lines[0], f"{text.name}: {number_text(text.rise_percent, '%')}, measured")
        for label, start, dash in thresholds:
            named = label if text is texts[0] else "_"
            plot.axes.vlines(start, y - 7, y + 7, color=LIMIT, linestyle=dash, linewidth=1.8, label=named)
        y += 1.5 * GAP
    plot.axes.set_xlim(left, right)
    plot.axes.xaxis.set_major_formatter(lambda value, _: percent_tick(value))
    plot.axes.locator_params(axis="x", nbins=5)
    plot.axes.set_xlabel("rise of perplexity, measured")
    plot.legend()
    return plot


def _answers(answers: Answers | None) -> Plot | None:
    """Returns how many answers are still the dense model's, by the number of tokens from the first."""
    if answers is None:
        return None
    plot = new_plot(210)
    steps = answers.identical
    reach = reaches([(step.low_percent, step.percent, step.high_percent) for step in steps])
    plot.axes.errorbar(
        range(len(steps)), [step.percent for step in steps], yerr=reach, color=FITTED, capsize=4, linewidth=1
    )
    for place, step in enumerate(steps):
        (point,) = plot.axes.plot([place], [step.percent], "o", color=FITTED)
        plot.tip(point, f"{step.same} of {step.answers} identical for {number_text(step.tokens, 'tokens')}")
    plot.axes.set_xticks(range(len(steps)), [str(step.tokens) for step in steps])
    plot.axes.set(xlabel="first tokens of the answer", ylabel="identical, %", ylim=(-5, 105))
    plot.axes.grid(axis="x", visible=False)
    return plot


def _widths(dense: Sequence[Mapping[str, int]], fitted: Sequence[Mapping[str, int]]) -> Plot:
    """Returns the share of heads and channels kept in each layer. dense, fitted: widths by layer and name."""
    plot = new_plot(260)
    for key, color, dash in zip(dense[0], PALETTE, ("-", "--", "-"), strict=False):  # heads go together
        kept_percent = [100 * new[key] / old[key] if old[key] else 0.0 for old, new in zip(dense, fitted, strict=True)]
        look = {"color": color, "linestyle": dash, "drawstyle": "steps-mid", "marker": "o", "markersize": 3.5}
        plot.axes.plot(range(len(kept_percent)), kept_percent, label=key, **look)
    plot.axes.set(xlabel="layer", ylabel="% kept", ylim=(-3, 106))
    whole_ticks(plot.axes)
    plot.legend(3)
    return plot


def _errors(modules: Sequence[Module]) -> Plot | None:
    """Returns the distance from the dense stream behind every pruned module, by layer; None where none was pruned."""
    if not any(_is_pruned(module) for module in modules):
        return None
    # Two curves for each kind of module: the error without the update and with it.
    plot = new_plot(280)
    for kind, color in zip(("attention", "mlp"), PALETTE, strict=False):
        pruned = [module for module in modules if module.kind == kind and _is_pruned(module)]
        for name, label, dash in (("error_before", "without update", ":"), ("error_after", "with", "-")):
            drawn = [(m.layer, error) for m in pruned if (error := getattr(m, name)) is not None]
            if drawn:
                plot.axes.plot(*zip(*drawn, strict=True), dash, color=color, marker="o", markersize=3.5)
                plot.axes.lines[-1].set_label(f"{kind}, {label}")
    plot.axes.set(xlabel="layer", ylabel="distance from the dense model")
    plot.axes.set_ylim(bottom=0)
    whole_ticks(plot.axes)
    plot.legend()
    return plot


def _is_pruned(module: Module) -> bool:
    return module.kept < module.of and module.error_before is not None


def _path(report: Report) -> Plot | None:
    """Returns the way from the dense model over the candidates, in the order in which they were tried.

    None where nothing was searched.
    """
    candidates = report.search.candidates
    limits = [row for row in report.budget if row.name not in OF_QUALITY]
    if not limits or not candidates:
        return None
    # Two curves for each limit: what was predicted of the candidates (hollow) and what was obtained (filled).
    plot = new_plot(290)
    for row, color in zip(limits, PALETTE, strict=False):
        for kind, dash in (("predicted", ":"), ("obtained", "-")):
            values = [getattr(candidate, kind)[row.name] for candidate in candidates]
            first = 1
            if kind == "obtained" and row.dense is not None:
                values, first = [row.dense.value, *values], 0
            label = f"{NAMES[row.name]}, {'predicted' if kind == 'predicted' else search_source(report, row)}"
            shares = [100 * value / row.limit if is_drawable([value]) else float("nan") for value in values]
            look = {"color": color, "markerfacecolor": "none" if kind == "predicted" else color}
            plot.axes.plot(range(first, first + len(values)), shares, dash, marker="o", label=label, **look)
    plot.axes.axhline(100, color=LIMIT, linestyle="--", label="limit", zorder=0.5)
    # The chosen candidate is named below the axis, where no curve is.
    names = [f"{number}\nchosen" if one.chosen else str(number) for number, one in enumerate(candidates, 1)]
    plot.axes.set_xticks(range(len(names) + 1), ["dense", *names])
    plot.axes.grid(axis="x", visible=False)
    plot.axes.set(xlabel="candidate", ylabel="% of the limit")
    plot.legend()
    return plot
