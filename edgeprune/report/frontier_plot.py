"""The ladder's plots: the rise of perplexity over what a rung needs or reaches, one for each quantity across.

They add no figure to the document. A filled mark's quantity was measured, a hollow one's built or estimated; the rise
is measured everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from edgeprune.report.figures import figure_text, percent_text, percent_tick, rise_of, share_text, worst_agreement
from edgeprune.report.frontier import Dense, Frontier, Rung
from edgeprune.report.schema import BROKEN_PERCENT, DEGRADED_PERCENT, Figure
from edgeprune.report.svg import DENSE, FITTED, LIMIT, SOFT, Plot, drawing, new_plot, reaches

# Colour and shape both stand for the grade.
MARKERS = {"dense": (DENSE, "s"), "intact": (FITTED, "o"), "degraded": ("#e5a000", "D"), "broken": (LIMIT, "X")}
MIB = 2**20
AXES = {  # field: text of the button, title of the axis, the figure's value at 1 on the axis
    "decode": ("per token", "ms per token", 1),
    "tokens_per_second": ("tokens/s", "tokens/s", 1),
    "memory": ("memory", "peak memory, MiB", MIB),
    "prefill": ("first token", "ms to the first token", 1),
}
TICKS = (2, 5, 10, 20, 50, 100, 400, 900, 1900, 4900)  # percent, below and above 0: 100 is a doubling
COARSE_TICKS = tuple(10**power for power in range(1, 300, 2))  # where a rise is beyond those
HEIGHT = 380


def frontier_plots(frontier: Frontier) -> dict[str, str]:
    """Returns a plot as SVG for each quantity that may stand across, by its field.

    The element of a rung has the attribute `data-rung`, by which the page's script picks it.
    """
    with drawing():
        return {
            field: frontier_plot(frontier, field).svg(f"frontier-{field}", f"rise of perplexity over {title}")
            for field, (_, title, _) in AXES.items()
        }


def frontier_plot(frontier: Frontier, field: str) -> Plot:
    """Returns the plot of the rise of perplexity over a quantity; within `drawing`.

    The vertical axis is asinh(rise / 5 %): linear where quality is intact, logarithmic beyond, so that a destroyed
    model does not flatten the ones to pick from. Rungs of a rise beyond floating point are left out.
    """
    plot = new_plot(HEIGHT)
    plot.axes.set_yscale("asinh", linear_width=DEGRADED_PERCENT)
    rungs = drawn_rungs(frontier)
    points: list[Dense | Rung] = [point for point in (frontier.dense, *rungs) if getattr(point, field) is not None]
    # The way down from the dense model as a line, then each point.
    scale = AXES[field][2]
    across = [getattr(point, field).value / scale for point in points]
    plot.axes.plot(across, [_rise(point)[1] for point in points], color=DENSE, linewidth=1, linestyle=":", zorder=1)
    for point, x in zip(points, across, strict=True):
        _draw_point(plot, point, getattr(point, field), x, scale)
    _grade_lines(plot, rungs)
    plot.axes.set(xlabel=_title(frontier, field), ylabel="rise of perplexity, measured")
    _legend(plot)
    return plot


def drawn_rungs(frontier: Frontier) -> list[Rung]:
    """Returns the rungs whose rise a plot can hold."""
    return [rung for rung in frontier.rungs if isfinite(rung.rise_percent + rung.low_percent + rung.high_percent)]


def agreement_of(rung: Rung) -> tuple[str, str] | None:
    """Returns how often the likeliest next token is the dense model's, on the worst text, and the interval."""
    if (agreement := worst_agreement(rung.texts)) is None:
        return None
    share, _, interval = share_text(agreement).partition(" (")
    return share, interval.removesuffix(")")


def _draw_point(plot: Plot, point: Dense | Rung, figure: Figure, x: float, scale: float) -> None:
    """Draws the dense model or a rung: its intervals, its mark, and its name beside both."""
    low, rise, high = _rise(point)
    across = reaches([tuple(bound and bound / scale for bound in (figure.low, figure.value, figure.high))])
    grade = point.grade if isinstance(point, Rung) else "dense"
    color, marker = MARKERS[grade]
    bars = {"color": SOFT, "linewidth": 1, "capsize": 3, "zorder": 2, "fmt": "none"}
    plot.axes.errorbar([x], [rise], yerr=reaches([(low, rise, high)]), xerr=across, **bars)
    (mark,) = plot.axes.plot([x], [rise], marker, color=color, markersize=9, markeredgewidth=1.8, zorder=3, label=grade)
    if figure.source != "measured":
        mark.set_markerfacecolor("none")
    name = str(point.index) if isinstance(point, Rung) else "dense"
    plot.axes.annotate(name, (x, rise), xytext=(7, 5), textcoords="offset points")
    plot.tip(mark, _tip(point), **({"data-rung": name, "class": "rung"} if isinstance(point, Rung) else {}))


def _rise(point: Dense | Rung) -> tuple[float, float, float]:
    """Returns low, value and high of the rise in percent; the dense model's rise is 0 by definition."""
    return (point.low_percent, point.rise_percent, point.high_percent) if isinstance(point, Rung) else (0.0, 0.0, 0.0)


def _tip(point: Dense | Rung) -> str:
    """Returns the text that appears over a point: its figures, each with its source."""
    named = {label: getattr(point, field) for field, (label, *_) in AXES.items()}
    lines = [f"{label} {figure_text(figure)}, {figure.source}" for label, figure in named.items() if figure is not None]
    if isinstance(point, Rung):
        lines += [
            f"{percent_text(point.ratio)} of attention and MLP pruned",
            f"perplexity {rise_of(point)}, measured: {point.grade}",
        ]
        if agreement := agreement_of(point):
            lines.append(f"the dense model's next token at {agreement[0]}, measured")
    return "\n".join([f"rung {point.index}" if isinstance(point, Rung) else "dense", *lines])


def _title(frontier: Frontier, field: str) -> str:
    """Returns the title of the axis with the sources of the figures drawn: no figure stands without one."""
    sources = frontier.sources(field)
    mixed = "; point at one to see its own" if len(sources) > 1 else ""
    return f"{AXES[field][1]}, {' and '.join(sources)}{mixed}"


def _grade_lines(plot: Plot, rungs: Sequence[Rung]) -> None:
    """Draws the thresholds where a model stops being intact and where it is broken; both are always in sight."""
    # Choose the range of the axis so that it holds all rungs and both thresholds.
    lowest = min((rung.low_percent for rung in rungs), default=0.0)
    highest = max((rung.high_percent for rung in rungs), default=0.0)
    bottom, top = 1.5 * min(lowest, -1.5), 1.6 * max(highest, BROKEN_PERCENT)
    for grade, start, dash in (("degraded", DEGRADED_PERCENT, ":"), ("broken", BROKEN_PERCENT, "--")):
        label = f"{grade} from {start:g} %"
        plot.axes.axhline(start, color=MARKERS[grade][0], linestyle=dash, zorder=0.5, label=label)
    plot.axes.axhspan(BROKEN_PERCENT, top, color=LIMIT, alpha=0.08, zorder=0)
    # Mark round percentages at their places.
    steps = TICKS if highest < 2 * TICKS[-1] else COARSE_TICKS
    ticks = [value for step in (0, *steps) for value in {-step, step} if bottom <= value <= top]
    plot.axes.set_yticks(ticks, [percent_tick(value) for value in ticks])
    plot.axes.minorticks_off()
    plot.axes.set_ylim(bottom, top)


def _legend(plot: Plot) -> None:
    """Adds a legend with each grade and threshold once."""
    handles, labels = plot.axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    plot.figure.legend(once.values(), once.keys(), loc="outside upper left", ncols=3, columnspacing=1.2)
