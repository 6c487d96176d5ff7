"""Numbers and statuses of a report as a person reads them; page and terminal share these words."""

from __future__ import annotations

from collections.abc import Mapping

from edgeprune.budget import STATUS_TEXT, format_bytes, format_ms
from edgeprune.report.schema import Figure, Outcome, Source, Text

OUTCOME_TEXT: dict[Outcome, str] = {
    **STATUS_TEXT,
    "uncertain": "quality too uncertain to tell: evaluate on more text",
    "out_of_reach": "out of reach",
}
OUTCOME_LABEL = {outcome: text.split(":")[0] for outcome, text in OUTCOME_TEXT.items()}
"""The same without the advice."""


def number_text(value: float, unit: str) -> str:
    """`1.50 GiB`, `6.15 ms`, `+3.2 %`, `212 tokens/s`, or a plain ratio as `0.713`."""
    match unit:
        case "bytes":
            return format_bytes(value)
        case "ms":
            return format_ms(value)
        case "%":
            return f"{value:+.1f} %" if abs(value) < 100 else f"{value:+.0f} %"
        case "tokens/s":
            return f"{value:.3g} tokens/s" if value < 100 else f"{value:.0f} tokens/s"
    return f"{value:.3f}"


def figure_text(figure: Figure | None) -> str:
    """A figure in its unit, with its interval where it was measured."""
    if figure is None:
        return "–"
    text = number_text(figure.value, figure.unit)
    if figure.low is not None and figure.high is not None and figure.high > figure.low:
        low, high = number_text(figure.low, figure.unit), number_text(figure.high, figure.unit)
        number, _, unit = low.partition(" ")
        text += f" ({number if unit and high.endswith(f' {unit}') else low} to {high})"
    return text


def rise_interval(text: Text) -> str | None:
    """The interval of a rise; one document gives a bootstrap no spread, which must not pass for certainty."""
    if text.low_percent == text.high_percent:
        return None
    return f"{number_text(text.low_percent, '%')} to {number_text(text.high_percent, '%')}"


def rise_text(rise: tuple[float, float, float]) -> str:
    """A rise of log perplexity in nats with its interval: `0.553 [0.541, 0.566]`."""
    value, low, high = rise
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def perplexity_text(value: float | None) -> str:
    """A perplexity; a dash where it is beyond floating point."""
    return "–" if value is None else f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def by_source(figures: Mapping[str, Figure]) -> dict[Source, str]:
    """The figures' names, joined, by their source: each label once."""
    names: dict[Source, list[str]] = {}
    for name, figure in figures.items():
        names.setdefault(figure.source, []).append(name)
    return {source: ", ".join(of) for source, of in names.items()}


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
