"""The document of `edgeprune draft` and how the terminal shows it. It measures nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edgeprune.report.base import Figure, Strict

if TYPE_CHECKING:
    from rich.console import Console


class Candidate(Strict):
    """One rung of the ladder as a draft; every figure is measured on `DraftReport.device`."""

    rung: int
    ratio: float = Field(description="share of attention and MLP parameters removed")
    step: float = Field(description="its step's time over the target's, timed in turns")
    accepted_greedy: float = Field(description="share of the tokens of greedy answers that it guesses right")
    accepted_drawn: float = Field(description="the same of answers that are drawn as a chat is")
    guesses: int = Field(description="tokens that it should guess at a time")
    tokens_per_round: float = Field(description="of the answer, with so many guesses")
    speed: float = Field(description="of the answer over the target alone, by these figures")


class DraftReport(Strict):
    """The search for a model that makes speculative decoding of a bundle fastest, and what came of it."""

    bundle: str = Field(description="the target")
    device: str
    prompts: int
    tokens: int = Field(description="of each answer")
    target_steps: dict[str, float] = Field(
        description="time of the target's step by the tokens that it reads, over that of one token; timed in turns"
    )
    candidates: list[Candidate]
    guesses: int = Field(description="of the chosen one; 0: none pays")
    rung: int | None = Field(description="that was chosen; none: none pays")
    greedy: Figure | None = Field(description="speed over the target alone, measured on the same prompts")
    drawn: Figure | None = Field(description="the same of drawn answers")
    same: float | None = Field(
        description="share of the tokens up to the first that differs from the target's alone, whose step on several "
        "tokens rounds in another way"
    )


def print_draft(report: DraftReport, console: Console) -> None:
    """Prints the candidates, what was chosen, and its measured speed."""
    from edgeprune.report.terminal import styled, table

    rows = [
        (
            str(one.rung),
            f"{100 * one.ratio:.1f} %",
            f"{one.step:.3f}",
            f"{100 * one.accepted_greedy:.1f} %",
            f"{100 * one.accepted_drawn:.1f} %",
            str(one.guesses),
            f"{one.tokens_per_round:.2f}",
            f"{one.speed:.2f} x",
        )
        for one in report.candidates
    ]
    columns = ("rung", "pruned", "its step", "greedy", "drawn", "guesses", "a round", "speed")
    console.print(styled(f"Drafts for {report.bundle}, measured on {report.device}"))
    console.print(table(columns, rows))
    steps = ", ".join(f"{read}: {step:.2f}" for read, step in report.target_steps.items())
    console.print(styled(f"The target's step by the tokens that it reads, one token being 1: {steps}."))
    if report.greedy is None or report.drawn is None:
        console.print(styled("No draft pays: the target alone is as fast. Nothing was written.", "bold yellow"))
        return
    figures = " and ".join(
        f"{of.value:.2f} x ({of.low:.2f} to {of.high:.2f}) {words}"
        for of, words in ((report.greedy, "greedy"), (report.drawn, "drawn"))
    )
    console.print(styled(f"Rung {report.rung}, {report.guesses} guesses at a time: {figures}, measured.", "bold green"))
