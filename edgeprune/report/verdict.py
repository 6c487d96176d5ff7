"""The report in plain words: does it fit and how is that known, what it costs in answers, what to do next.

Page, terminal and README begin with these. They add no figure to the report.
"""

from __future__ import annotations

import shlex

from edgeprune.evaluate.grades import AGREEMENT, PERPLEXITY, TASK
from edgeprune.ondevice.budget import OF_QUALITY
from edgeprune.ondevice.runtimes import LLAMA_CPP
from edgeprune.report.deploy import FINISH
from edgeprune.report.figures import (
    no_interval_text,
    number_text,
    percent_text,
    rise_interval,
    share_text,
    worst_agreement,
)
from edgeprune.report.quality import worst_text
from edgeprune.report.schema import Grade, Quality, Report, Source, Step
from edgeprune.report.tasks import task_text

HOW: dict[Source, str] = {"measured": "measured", "built": "by the built engine's figures", "estimated": "by estimate"}
OF = {"memory": "of memory", "prefill": "to the first token", "decode": "per token"}
LOSS: dict[Grade, str] = {"intact": "hardly worse", "degraded": "noticeably worse", "broken": "of no use"}


def is_broken(report: Report) -> bool:
    """Returns whether the fitted model is of no use, whatever the budget says."""
    return report.quality.grade == "broken"


def broken_text(report: Report) -> str:
    """Returns the line that stands before all else where the model is broken."""
    return f"Broken: {lost_text(report.quality)}. Do not deploy this model."


def lost_text(quality: Quality) -> str:
    """Returns what was lost by the metric that decides the grade."""
    if quality.metric == AGREEMENT:
        agreed = worst_agreement(quality.texts)
        return f"the likeliest next token is the dense model's at {share_text(agreed)} of places"
    task = next((task for task in quality.tasks if f"{TASK}{task.name}" == quality.metric), None)
    return task_text(task) if task else f"perplexity {rise_text(quality.rise_percent)}"


def verdict(report: Report) -> str:
    """Returns whether the model fits what was asked, and how that is known; then the odd input that it fails on."""
    finding = report.robustness.finding if report.robustness and not is_broken(report) else ""
    return f"{_fits(report)} {finding}".rstrip()


def _fits(report: Report) -> str:
    """Returns whether the model fits what was asked, and how that is known, in one sentence."""
    name, how = report.model.name, HOW[report.rests_on]
    asked = [f"{number_text(row.limit, row.unit)} {OF[row.name]}" for row in report.budget if row.name in OF]
    device = report.measurement.machine if report.measurement else report.device.name
    into = f"into {' and '.join(asked) or 'what was asked'} on {device}"
    untried = "" if report.fitted.performance.decode.source == "measured" else "; it was not yet tried on the device"
    order = ("missed", "noisy", "met")  # of the limits on quality, the one that fails most is named
    limits = sorted((row for row in report.budget if row.name in OF_QUALITY), key=lambda row: order.index(row.status))
    loss = next((f" of {row.asked}" for row in limits), "")
    if is_broken(report):
        subject = "pictures" if report.quality.pictures else "answers"
        fits = "though it fits" if report.status == "met" else "and it does not fit"
        return f"No: {name} is broken: its {subject} are of no use, {fits} {into}, {how}{untried}."
    # The budget is missed, or lies beyond the quality limit, or in the noise of the measurement.
    if report.quality_stop is not None:
        return f"No, {how}: {name} does not fit {into} within the quality limit{loss}; the smallest within it is kept."
    if report.outcome == "out_of_reach":
        return f"No, {how}: {name} does not fit {into}, not even at its smallest size{untried}."
    if report.status == "missed":
        return f"No, {how}: {name} does not fit {into}; the best that was found is kept{untried}."
    if report.status == "noisy":
        return f"Not clear: whether {name} fits {into} lies within the noise of the measurement."
    # It is met; the quality may be in doubt or beyond its limit.
    if report.quality_status == "noisy":
        return f"Not clear: {name} fits {into}, {how}, but the text is too short to judge the quality limit{loss}."
    if report.quality_status == "missed":
        return f"No: {name} fits {into}, {how}, but loses more quality than the limit{loss}."
    as_it_is = " as it is" if report.search.ending == "dense" else ""
    return f"Yes, {how}: {name} fits {into}{as_it_is}{untried}."


def made_text(report: Report) -> str:
    """Returns how the model was made smaller."""
    formats = [name for name in report.fitted.formats if name != "float"]
    pruned = "nothing removed"
    if report.fitted.parameters != report.dense.parameters:
        pruned = f"{percent_text(report.total_ratio)} of all weights removed"
    weights = f", weights in {' and '.join(formats)}" if formats else ""
    cache = f", KV cache in {report.fitted.cache}" if report.fitted.cache != "float" else ""
    return f"{pruned}{weights}{cache}"


def rise_text(percent: float) -> str:
    """Returns `rises by 24.6 %`, `falls by 1.2 %` or `is 42 times the dense model's`."""
    text = number_text(percent, "%")
    if text[0] not in "+-":
        return f"is {text.removesuffix('-fold')} times the dense model's" if text.endswith("-fold") else f"is {text}"
    return f"{'rises' if percent >= 0 else 'falls'} by {text[1:]}"


def cost_text(report: Report) -> str:
    """Returns what the fitted model costs in answers, or in pictures, as measured."""
    quality, worst, agreement = report.quality, worst_text(report.quality.texts), worst_agreement(report.quality.texts)
    subject, noun = ("pictures", "pictures") if quality.pictures else ("answers", "text")
    if worst.low_percent == worst.rise_percent == worst.high_percent == 0:
        return f"Nothing: it is the same model, so its {subject} are the dense model's by definition."
    # How much worse, on what.
    interval = rise_interval(worst) or no_interval_text(worst, "picture" if quality.pictures else "document")
    where = f"on the worst of {len(quality.texts)} held-out {'sets of pictures' if quality.pictures else 'texts'}"
    if len(quality.texts) == 1:
        where = f"on {noun} that the dense model {'drew' if quality.pictures else 'wrote'} itself"
        if quality.label == "perplexity":
            where = f"on held-out {noun}"
    by = "" if quality.metric == PERPLEXITY else f" by {quality.metric}"
    text = (
        f"Its {subject} are {LOSS[quality.grade]}{by}: perplexity, which says how badly a model predicts {noun}, "
        f"{rise_text(quality.rise_percent)}, measured {where} ({interval})"
    )
    if agreement:
        unit = "code" if quality.pictures else "token"
        text += f"; the likeliest next {unit} is the dense model's at {share_text(agreement)} of places"
    return f"{text}."


def next_step(report: Report) -> Step:
    """Returns the one thing to do next."""
    again = f"{report.command} --force"
    if is_broken(report) or report.outcome in ("missed", "out_of_reach"):
        return Step(
            title=f"Do not deploy it. {_smallest(report)}See what each size costs, then give it more room or take "
            "another model",
            command=frontier_command(report) or again,
        )
    if report.outcome == "noisy":
        return Step(title="Measure again while nothing else runs on the machine", command=again)
    if report.outcome == "uncertain":
        more = "FOLDER" if report.quality.pictures else "FILE"
        return Step(title="Judge it on more of your own data", command=f"{again} --evaluate {more}")
    steps = [step for step in report.deploy if report.measurement is None or FINISH not in step.command]
    return steps[0] if steps else Step(title="Nothing is left to do", command="")


def _smallest(report: Report) -> str:
    """Returns what the smallest size needs, where that is more than was asked."""
    if report.outcome != "out_of_reach":
        return ""
    needs = [
        f"{number_text(report.floor[row.name], row.unit)} {OF[row.name]}"
        for row in report.budget
        if row.name in OF and report.floor.get(row.name, 0.0) > row.limit
    ]
    return f"The smallest size needs {' and '.join(needs)}, estimated. " if needs else ""


def frontier_command(report: Report) -> str:
    """Returns the command that shows what each size costs; empty where the report's own names no model."""
    try:
        words = shlex.split(report.command)
    except ValueError:
        return ""
    if len(words) < 3 or words[0] != "edgeprune" or words[2].startswith("-"):
        return ""
    engine = ["--engine", LLAMA_CPP] if report.engine.name == LLAMA_CPP else []
    return shlex.join(["edgeprune", "frontier", words[2], "--device", report.device.name, *engine])
