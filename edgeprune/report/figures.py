"""Numbers and statuses of a report as a person reads them; page and terminal share these words.

It knows neither HTML nor the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, expm1, floor, inf, log, log10
from typing import TYPE_CHECKING

from edgeprune.ondevice.budget import STATUS_TEXT, format_bytes, format_ms, format_percent
from edgeprune.report.experience import Experience
from edgeprune.report.images import Interval, Pictures
from edgeprune.report.quality import Agreement, Answers, Identical
from edgeprune.report.schema import Constraint, Figure, Levers, Outcome, Recovery, Report, Search, Side, Source, Text

if TYPE_CHECKING:
    from edgeprune.report.frontier import Rung

OUTCOME_TEXT: dict[Outcome, str] = {
    **STATUS_TEXT,
    "uncertain": "quality too uncertain to tell: evaluate on more text",
    "out_of_reach": "out of reach",
}
OUTCOME_LABEL = {outcome: text.split(":")[0] for outcome, text in OUTCOME_TEXT.items()}
"""The statuses without the advice."""


NAMES = {  # of widths and limits, in plain words
    "memory": "memory",
    "prefill": "first token",
    "decode": "per token",
    "quality": "perplexity",
    "agreement": "other tokens",
    "tasks": "task scores",
    "attentions": "attention layers",
    "key/value heads": "key/value heads in each",
    "query heads per group": "query heads for each of these",
    "MLPs": "MLP layers",
    "fewest channels": "fewest channels",
    "most channels": "most channels",
    "tokens": "tokens in the vocabulary",
    "decode_ratio": "time per token",
    "prefill_ratio": "time to the first token",
}
MOST_TIMES = 1000  # times a limit from which a number says nothing any more


def number_text(value: float, unit: str) -> str:
    """Returns `1.50 GiB`, `6.15 ms`, `+3.2 %`, `212 tokens/s`, `8,192 tokens`, or a plain ratio as `0.713`.

    A change of 100 % and more is a factor, such as `42-fold`.
    """
    match unit:
        case "bytes":
            return format_bytes(value)
        case "ms":
            return format_ms(value)
        case "%":
            return format_percent(value)
        case "s":
            return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
        case "points":
            return f"{value:.1f} points"
        case "tokens/s":
            return f"{value:.3g} tokens/s" if value < 100 else f"{value:.0f} tokens/s"
        case "tokens" | "sequences":
            return f"{value:,.0f} {unit if value != 1 else unit.removesuffix('s')}"
    return f"{value:.3f}"


def widths_text(side: Side) -> str:
    """Returns the widths of the layers, each kind of layer once: query heads, key/value heads, MLP channels."""
    counts: dict[tuple[int, ...], int] = {}
    for layer in side.widths:
        counts[widths] = counts.get(widths := tuple(layer.values()), 0) + 1
    return "; ".join(f"{count} of {', '.join(map(str, widths))}" for widths, count in counts.items())


def formats_text(side: Side) -> str:
    """Returns the weight formats with the number of modules in each."""
    return ", ".join(f"{count} {name}" for name, count in side.formats.items()) or "all floats"


def levers_text(levers: Levers) -> str:
    """Returns what each lever saves and is predicted to cost."""
    parts = [
        f"{part.name} {format_bytes(part.saved_bytes)} (+{100 * expm1(max(0.0, part.nats)):.2g} % perplexity)"
        for part in levers.parts
    ]
    return f"{', '.join(parts)}; memory saved as estimated, perplexity as predicted" if parts else "none"


def alone_text(levers: Levers) -> str:
    """Returns what one kind of lever alone is predicted to cost."""

    def cost(nats: float | None) -> str:
        if nats is None:
            return "does not reach it"
        rise = format_percent(100 * expm1(min(nats, 50.0))).removeprefix("+")
        return f"would raise perplexity {rise if rise.endswith('fold') else f'by {rise}'}"

    formats = "weight formats"
    if any(part.name.startswith("KV cache") for part in levers.parts):
        formats += " and the KV cache's"
    text = f"Pruning alone {cost(levers.pruning_alone)}"
    return f"{text}, {formats} alone {cost(levers.precision_alone)}, as predicted"


def recovery_text(recovery: Recovery) -> str:
    """Returns what a training toward the dense model did, how long it took, and on what it was judged."""
    before, after = recovery.before.value, recovery.after.value
    changed = f"divergence from the dense model {before:.3f} to {after:.3f} nats a token"
    if not recovery.taken:
        changed = f"no step bettered the divergence of {before:.3f} nats a token: the weights stayed as they were"
    minutes = recovery.minutes
    took = f"{minutes:.0f} minutes" if minutes >= 1.5 else number_text(60 * minutes, "s")
    how = "" if recovery.rank is None else f" of products of rank {recovery.rank}, for want of memory,"
    return f"{changed}, measured on {recovery.held_out} unseen rows of its text; {recovery.steps} steps{how} in {took}"


def rivals_text(report: Report) -> str:
    """Returns whether a training changed the ranking of the candidates within the budget, with each one's losses;
    nothing where it trained one."""
    rivals = report.recovery.rivals if report.recovery else []
    if not rivals:
        return ""
    order = sorted(rivals, key=lambda rival: rival.before)
    unit = "points" if report.quality.metric.startswith("task:") else "%"
    losses = "; ".join(f"{rival.name}: {rival.before:+.1f} to {rival.after:+.1f} {unit}" for rival in rivals)
    if order == rivals:
        changed = f"the ranking of {len(order)} candidates within the budget stayed as it was"
    elif order[0] is rivals[0]:
        changed = f"the best of {len(order)} candidates within the budget stayed the best, others changed places"
    else:
        changed = f"another of {len(order)} candidates within the budget became the best"
    return f"{changed} (worst loss without and with the training: {losses})"


def figure_text(figure: Figure | None) -> str:
    """Returns a figure in its unit, with its interval where it was measured; a dash where there is none."""
    if figure is None:
        return "–"
    text = number_text(figure.value, figure.unit)
    if figure.low is not None and figure.high is not None and figure.high > figure.low:
        low, high = number_text(figure.low, figure.unit), number_text(figure.high, figure.unit)
        number, _, unit = low.partition(" ")
        text += f" ({number if unit and high.endswith(f' {unit}') else low} to {high})"
    return text


def reading_text(noticed: Experience) -> str:
    """Returns `53 x reading speed`."""
    factor = noticed.reading_speed.value
    return f"{factor:.0f} x reading speed" if round(factor, 1) >= 10 else f"{factor:.1f} x reading speed"


def workload_text(report: Report) -> str:
    """Returns `batch 1, prompt 512, context 2048`; the same in pictures and codes for an image generator."""
    workload, pictures = report.workload, report.quality.pictures
    if pictures is None:
        return f"batch {workload.batch}, prompt {workload.prompt}, context {workload.context}"
    guided = f", guided by {pictures.cfg:g}" if workload.batch > pictures.at_once else ""
    return f"{pictures_text(pictures.at_once)} at once{guided}, each of {workload.context} codes"


def pictures_text(count: int) -> str:
    """Returns `1 picture` or `1,024 pictures`."""
    return f"{count:,} picture{'s' if count != 1 else ''}"


def picture_room_text(noticed: Experience, report: Report) -> str:
    """Returns how many pictures at once memory has room for; a guided one takes two sequences."""
    count = int(noticed.sequences.value * report.quality.pictures.at_once / report.workload.batch)
    return pictures_text(count) if count else no_room_text(noticed)


def no_room_text(noticed: Experience) -> str:
    """Returns that there is no room, and within what: a budget may be far below what the device has."""
    return f"no room within {noticed.room.reason}"


def interval_text(interval: Interval) -> str:
    """Returns `0.0123 (0.0101 to 0.0150)`: to two digits of the interval's width."""
    width = interval.high - interval.low
    digits = min(8, max(0, 1 - floor(log10(width)))) if 0 < width < inf else 3
    value, low, high = (f"{bound:.{digits}f}" for bound in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def difference_text(interval: Interval) -> str:
    """Returns the meaning of the paired difference of both kernel distances, in words."""
    if interval.low > 0:
        return "the fitted model's pictures are farther off than the dense model's"
    if interval.high < 0:
        return "the fitted model's pictures are nearer than the dense model's"
    return "so many pictures show no difference between the models"


def few_pictures_text(pictures: Pictures) -> str:
    """Returns how the number of pictures affects the distances; it stands wherever they do."""
    fitted = pictures.fitted
    part = min(fitted.images, fitted.reference_images // 2)
    return (
        f"{fitted.images:,} pictures of each model against {fitted.reference_images:,} of {pictures.reference}, seen "
        f"by {fitted.network}: figures of other networks or other counts do not compare. The Frechet distance has a "
        f"bias that grows as pictures get fewer: {part:,} of the reference and {part:,} others of it are "
        f"{fitted.frechet.floor:.3g} apart. The kernel distance has none."
    )


def room_text(figure: Figure, noticed: Experience) -> str:
    """Returns how many tokens or sequences memory has room for, within what was asked or the device has."""
    if not figure.value:
        return no_room_text(noticed)
    text = number_text(figure.value, figure.unit)
    return f"{text}, all it has" if (figure.unit, figure.value) == ("tokens", noticed.room.most_context) else text


def share_text(share: Agreement | Identical | None) -> str:
    """Returns `81.2 % (78.8 to 82.8 %)`; one document gives no interval."""
    if share is None:
        return "–"
    interval = f" ({share.low_percent:.1f} to {share.high_percent:.1f} %)"
    return f"{share.percent:.1f} %{interval if share.low_percent < share.high_percent else ''}"


def worst_agreement(texts: Sequence[Text]) -> Agreement | None:
    """Returns the agreement on the text where the models agree least; None where no text could be compared."""
    agreements = (text.agreement for text in texts if text.agreement)
    return min(agreements, key=lambda agreement: agreement.percent, default=None)


def half_identical(answers: Answers) -> Identical:
    """Returns the longest beginning that at least half of the answers share, else the shortest that was compared."""
    return next((step for step in reversed(answers.identical) if step.percent >= 50), answers.identical[0])


def deciding_text(budget: Sequence[Constraint]) -> str | None:
    """Returns which limits decide on the model, and what a little more of each would buy.

    None where nothing was searched. A gain in nats per token is shown as a fall of perplexity in percent,
    100 * (1 - exp(-gain)), or as what it would be divided by where that is 2 and more.
    """
    gains = {NAMES.get(f"{row.name}_ratio", row.name): row.gain for row in budget if row.gain is not None}
    if not gains:
        return None
    active = {name: _fall(gain) for name, gain in gains.items() if gain > 0}
    if not active:
        return "No limit decides alone: 5 % more of any one of them buys nothing on the width grid."
    bought = "; ".join(f"5 % more of {name} would {fall}" for name, fall in active.items())
    idle = [name for name in gains if name not in active]
    return f"What decides is {' and '.join(active)}: {bought}, as predicted." + (
        f" More of {' or '.join(idle)} alone would buy nothing." if idle else ""
    )


def _fall(gain: float) -> str:
    """Returns what a gain in nats per token makes of perplexity."""
    if gain < log(2):
        return f"lower perplexity by {100 * -expm1(-gain):.1f} %"
    return f"divide perplexity by {exp(gain):.0f}" if gain < log(100) else "divide perplexity by more than 100"


def times_text(report: Report) -> str:
    """Returns what the times of the fitted model are, wherever they stand."""
    performance = report.fitted.performance
    if performance.decode_ratio is not None:
        return (
            "Times of the fitted model are the dense model's p50 times the ratio of both, timed in turns "
            f"({figure_text(performance.decode_ratio)} per token), so that a busy machine slows both alike; the p50 of "
            "its own run alone is another figure."
        )
    if performance.decode.source == "measured":
        return "Times are p50: half of the runs were faster."
    return "Times are estimated of the device's figures; nothing was timed on it."


def estimated_sum_text(report: Report) -> str:
    """Returns how the sum of the estimated parts compares with the fitted model's time, where that was measured."""
    decode, parts = report.fitted.performance.decode, sum(report.fitted.latency_shares.values())
    if decode.source != "measured":
        return ""
    measured, estimated = number_text(decode.value, "ms"), number_text(parts, "ms")
    return f" and add up to {estimated} a token, where {measured} was measured"


def costs_text(search: Search) -> str:
    """Returns where the costs of widths came from, and how far they were off."""
    errors = ", ".join(f"{kind} {100 * worst:.1f} %" for kind, worst in search.cost_error.items())
    return f"Costs of widths come from {search.costs}" + (f"; at most off by {errors}, as tested." if errors else ".")


def rise_interval(text: Rung | Text) -> str | None:
    """Returns the interval of a rise of perplexity; None where there is none: see `no_interval_text`."""
    if text.low_percent == text.high_percent:
        return None
    low, high = number_text(text.low_percent, "%"), number_text(text.high_percent, "%")
    return f"{low.removesuffix('-fold') if high.endswith('-fold') else low} to {high}"


def interval_of(rise: Rung | Text) -> str:
    """Returns the interval of a rise of perplexity in few words; empty where there is none."""
    return (rise_interval(rise) or "").replace(" % to", " to")


def rise_of(rise: Rung | Text) -> str:
    """Returns a rise of perplexity with its interval, where there is one."""
    interval = interval_of(rise)
    return number_text(rise.rise_percent, "%") + (f" ({interval})" if interval else "")


def no_interval_text(text: Text, document: str = "document") -> str:
    """Returns why a rise of perplexity has no interval; without one it must not pass for certain."""
    if text.documents == 1:
        return f"no interval: one {document}"
    if text.rise_percent == 0:
        return "no rise: the same model"
    return f"no interval: all {text.documents} {document}s rise alike"


def headroom_text(row: Constraint) -> str:
    """Returns how much of a limit is left, or how far it is exceeded: `2.8 % left`, `41.9 % over`, `42 x the limit`."""
    if (left := row.headroom_percent) is None:
        return "–"
    if left < -100 or left != left:
        return (
            f"{row.fitted.value / row.limit:.3g} x the limit"
            if row.fitted.value < MOST_TIMES * row.limit
            else "far over"
        )
    return f"{left:.1f} % left" if left >= 0 else f"{-left:.1f} % over"


def search_source(report: Report, row: Constraint) -> Source:
    """Returns the source of what the candidates of the search obtained: that of the dense model beside them.

    The fitted model's own figure may have been measured on the device since.
    """
    return row.dense.source if report.measurement is not None and row.dense is not None else row.fitted.source


def rise_text(rise: tuple[float, float, float]) -> str:
    """Returns a rise of log perplexity in nats with its interval: `0.553 [0.541, 0.566]`."""
    value, low, high = rise
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def perplexity_text(value: float | None) -> str:
    """Returns a perplexity; a dash where it is beyond floating point."""
    return "–" if value is None else f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def percent_text(share: float) -> str:
    """Returns a share of 1 as `11.5 %`."""
    return f"{100 * share:.1f} %"


def percent_tick(value: float) -> str:
    """Returns a change in percent as an axis shows it: `+5 %`, `10-fold`."""
    return number_text(value, "%").replace(".0", "") if value else "0"


def by_source(figures: Mapping[str, Figure]) -> dict[Source, str]:
    """Returns the figures' names, joined, by their source: each label once."""
    names: dict[Source, list[str]] = {}
    for name, figure in figures.items():
        names.setdefault(figure.source, []).append(name)
    return {source: ", ".join(own) for source, own in names.items()}


def shorten(text: str, length: int) -> str:
    """Returns the text, cut to a length in characters with an ellipsis at its end."""
    return text if len(text) <= length else text[: length - 1] + "…"
