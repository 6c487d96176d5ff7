"""The report of `samples` for the terminal: masked, removed, the balance, the choice, and how many are enough.

It adds no figure to the report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.pipeline.documents import plural
from edgeprune.report.terminal import styled, table

if TYPE_CHECKING:
    from rich.console import Console

    from edgeprune.commands.samples import SamplesReport


def print_samples(report: SamplesReport, console: Console) -> None:
    """Prints the report of the command, and the one that comes next."""
    collection, selection = report.collection, report.selection
    about = "" if report.model else "about "
    console.print(
        styled(
            f"{report.output}: {plural(len(selection.chosen), 'document')}, {about}{selection.tokens:,} tokens", "bold"
        )
    )
    if report.held_out is not None:
        console.print(styled(f"{report.held_out}: {plural(len(selection.held_out), 'document')} held out at random"))
    if selection.tokens < report.count * report.length:
        console.print(styled(f"fewer than {report.count} samples of {report.length} tokens: all there is", "yellow"))
    console.print()
    facts = [
        ("masked", _masked(report)),
        ("removed", f"{plural(collection.exact, 'equal document')}, {collection.near:,} nearly equal"),
    ]
    if (coverage := selection.coverage) is not None:
        spread = f"{coverage.least_random:.2f} to {coverage.most_random:.2f}"
        random = f"random subsets {coverage.random:.2f} ({spread})"
        facts.append(("distance", f"{coverage.chosen:.2f} from the moments of the whole; {random}"))
    console.print(table(("", ""), ((styled(name, "dim"), value) for name, value in facts)))
    console.print()
    columns = ("source", "language", "documents", "about tokens", "share", "chosen")
    rows = [
        (
            group.source,
            group.language,
            f"{group.documents:,}",
            f"{group.tokens:,}",
            f"{100 * group.share:.0f} %",
            f"{group.chosen_tokens:,}",
        )
        for group in selection.groups
    ]
    console.print(table(columns, rows, whole=columns[1:]))
    if selection.curve:
        console.print()
        columns = ("samples", "error on held-out text")
        console.print(table(columns, ((str(point.samples), f"{point.error:.3f}") for point in selection.curve)))
        console.print(styled(enough_text(report)))
    if report.next_command is not None:
        console.print()
        console.print(styled(report.next_command), soft_wrap=True)  # to be copied


def _masked(report: SamplesReport) -> str:
    """Returns what was masked in words, by kind."""
    collection = report.collection
    if not collection.masked:
        return "nothing"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in collection.masked.most_common())
    return f"{kinds}, in {plural(collection.masked_documents, 'document')}"


def enough_text(report: SamplesReport) -> str:
    """Returns how many samples are enough, in words."""
    from edgeprune.pruning.learning_curve import ENOUGH

    curve, enough = report.selection.curve, report.selection.enough
    if enough is None:
        if len(curve) < 2:
            return "There is too little text to tell how many samples are enough."
        before, last = curve[-2:]
        fall = 100 * (1 - last.error / before.error)
        return f"More would help: {last.samples} samples have an error {fall:.0f} % below that of {before.samples}."
    return f"{enough} samples are enough: twice as many lower the error by less than {100 * ENOUGH:.0f} %."
