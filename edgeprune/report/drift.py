"""The document of `edgeprune drift` and how the terminal shows it: how far new texts are, what they cost, what to do.

It measures nothing itself.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from edgeprune.ondevice.budget import format_percent
from edgeprune.report.base import Strict
from edgeprune.report.quality import Text, grade_of
from edgeprune.report.schema import Step

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

SHOWN_MODULES, SHOWN_DOCUMENTS = 5, 8


class Module(Strict):
    """The distance in what one module reads."""

    layer: int
    kind: Literal["attention", "mlp"]
    distance_percent: float
    limit_percent: float
    drifted: bool


class Sample(Strict):
    """A sample of the new texts; `documents` begins those that it holds parts of."""

    distance_percent: float = Field(description="of this sample alone, whose own noise is in it")
    documents: list[str] = Field(description="their first words")


class DriftReport(Strict):
    """The distance of new texts from the calibration data of a bundle, in the second moments of what modules read."""

    bundle: str
    model: str
    texts: str
    since: str = Field(description="the calibration data: the bundle's sketch of it, or a file that was read again")
    reader: Literal["fitted", "dense"] = Field(description="the model that read both")
    samples: int = Field(description="of the new texts")
    calibration_samples: int
    length: int = Field(description="tokens of a sample")
    distance_percent: float = Field(description="over all modules, relative to the length of the calibration moments")
    limit_percent: float = Field(description="what 95 % of the splits of the calibration samples stay below")
    p: float = Field(description="share of these splits that lie as far apart")
    drifted: bool
    modules: list[Module]
    cost: Text | None = Field(description="of the new texts, both models; each sample is a document")
    no_cost: str = Field(description="why there is no cost; else empty")
    reference: Text = Field(description="the held-out text of the fit on which perplexity rose most")
    covering: list[Sample] = Field(description="samples in the order in which they stand for the new texts best")
    verdict: str
    steps: list[Step]

    @property
    def is_costlier(self) -> bool:
        """Returns whether the new texts cost more than the held-out text, beyond both intervals."""
        return self.cost is not None and self.cost.low_percent > self.reference.high_percent


def concluded(report: DriftReport, bundle: Path, larger: str) -> DriftReport:
    """Returns the report with its verdict and what to do.

    larger: the command that gives a larger rung, or shows the sizes that there are.
    """
    drifted, costlier = report.drifted, report.is_costlier
    where = f"{report.distance_percent:.0f} % from the calibration data, limit {report.limit_percent:.0f} %"
    if report.cost is None:
        cost = f"what that costs is not known: {report.no_cost}"
    else:
        rises = [format_percent(of.rise_percent) for of in (report.cost, report.reference)]
        more = "more than" if costlier else "no more, beyond the intervals, than"
        cost = f"perplexity {rises[0]} over the dense model, {more} on the held-out text of the fit ({rises[1]})"
    words = "Drift" if drifted else "No drift"
    again = Step(
        title="Recalibrate: put the documents listed here, or all new ones, beside the old ones into a folder",
        command=shlex.join(
            ["edgeprune", "fit", "--config", str(bundle / "run.toml")]
            + ["--calibration", "FOLDER", "--output", f"{bundle.resolve().name}-recalibrated"]
        ),
    )
    size = Step(title="Or take a larger model" if drifted else "Take a larger model", command=larger)
    steps = []
    if drifted and (costlier or report.cost is None):
        steps = [again, size]
    elif costlier or (report.cost is not None and grade_of(report.cost.rise_percent) == "broken"):
        steps = [size]
    return report.model_copy(update={"verdict": f"{words}: {where}; {cost}.", "steps": steps})


def print_drift(report: DriftReport, console: Console) -> None:
    """Prints the verdict, the modules that are farthest, the cost with its intervals, and what to do."""
    from edgeprune.report.figures import no_interval_text, rise_interval, share_text, shorten
    from edgeprune.report.terminal import styled, table

    # The verdict, and what it rests on.
    style = "red" if report.steps else "yellow" if report.drifted else "green"
    console.print(styled(report.verdict, f"bold {style}"))
    console.print(
        styled(
            f"Measured on {report.samples} samples of {report.length} tokens of {report.texts} against "
            f"{report.calibration_samples} of {report.since}, as the {report.reader} model reads them; p = "
            f"{report.p:.2g}."
        )
    )
    console.print()
    # Modules, the farthest first.
    farthest = sorted(report.modules, key=lambda module: -module.distance_percent)[:SHOWN_MODULES]
    out = sum(module.drifted for module in report.modules)
    rows = [
        (f"layer {of.layer} {of.kind}", f"{of.distance_percent:.0f} %", f"{of.limit_percent:.0f} %") for of in farthest
    ]
    console.print(table(("farthest of what modules read", "distance", "limit"), rows))
    console.print(styled(f"{out} of {len(report.modules)} modules are beyond their limit (1 in 20 is without drift)."))
    console.print()
    # The cost, beside that of the fit.
    pairs = [("new texts", report.cost), ("of the fit", report.reference)]
    costs = [
        (
            name,
            format_percent(of.rise_percent),
            rise_interval(of) or no_interval_text(of, "sample"),
            f"{of.dense:.2f}",
            f"{of.fitted:.2f}",
            f"{of.tokens:,}",
            share_text(of.agreement),
        )
        for name, of in pairs
        if of is not None
    ]
    columns = ("text", "rise", "95 % interval", "dense", "fitted", "tokens", "same next token")
    console.print(table(columns, costs))
    # What to do; commands are not wrapped, so that they can be copied.
    for step in report.steps:
        console.print()
        console.print(styled(f"{step.title}:"))
        console.print(styled(step.command), soft_wrap=True)
    if report.drifted:
        console.print()
        console.print(styled("Documents that stand for the new texts best, by their first words:"))
        names = dict.fromkeys(name for sample in report.covering for name in sample.documents)
        for name in list(names)[:SHOWN_DOCUMENTS]:
            console.print(styled(f"  {shorten(name, 72)}"))
    elif not report.steps:
        console.print()
        console.print(styled("Nothing is to be done."))
