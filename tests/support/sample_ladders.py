"""Ladders made up for tests: reports of one model at several sizes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from edgeprune.report.frontier import Frontier, frontier_of
from edgeprune.report.frontier_terminal import print_frontier
from edgeprune.report.schema import Report
from edgeprune.report.tasks import Points, Share, TaskScore
from tests.support.sample_reports import (
    estimated,
    estimated_content,
    measured,
    measured_content,
    quality,
    report_of,
    text,
)

RISES = (1.4, 4.6, 9.8, 19.7, 48.0, 4127.0)


def ladder(
    content: Callable[[], dict[str, Any]], rises: Sequence[float] = RISES, texts: Sequence[str] = ("manual.txt",)
) -> list[Report]:
    """One report for each rise in percent of the first text's perplexity, at 90 %, 80 %, ... of the dense time; the
    other texts rise by half of it. Intervals reach a tenth of the rise to both sides, half a point at least."""
    return [report_of(_rung(content(), index, rise, texts)) for index, rise in enumerate(rises)]


def _rung(content: dict[str, Any], index: int, rise: float, texts: Sequence[str]) -> dict[str, Any]:
    share = 0.9 - 0.1 * index
    dense = content["dense"]["performance"]
    interleaved = content["fitted"]["performance"]["decode_ratio"] is not None
    figure = measured if interleaved else estimated
    performance = content["fitted"]["performance"] | {
        "decode": figure(share * dense["decode"].value),
        "prefill": figure(share * dense["prefill"].value),
        "memory_total": dense["memory_total"].model_copy(update={"value": share * dense["memory_total"].value}),
        "prefill_ratio": None,
        "decode_ratio": measured(share, "1", 0.01) if interleaved else None,
    }
    rises = [rise, *(rise / 2 for _ in texts[1:])]
    limit = {
        "name": "decode",
        "asked": f"{100 * share:.0f}%",
        "limit": share * dense["decode"].value,
        "unit": "ms",
        "status": "met",
        "dense": dense["decode"],
        "fitted": performance["decode"],
    }
    return content | {
        "fitted": content["fitted"] | {"performance": performance},
        "budget": [limit],
        "search": content["search"] | {"candidates": [_of_decode(c, limit) for c in content["search"]["candidates"]]},
        "ratio": 0.1 * (index + 1),
        "total_ratio": 0.08 * (index + 1),
        "warnings": ["the same for all", f"of rung {index}"],
        "quality": quality(
            [text(name, 10.0, r, max(0.5, abs(r) / 10)) for name, r in zip(texts, rises, strict=True)],
            f"answer {index}",
            content["quality"]["label"],
        ),
    }


def _of_decode(candidate: dict[str, Any], limit: dict[str, Any]) -> dict[str, Any]:
    """A candidate of a search within this limit: predicted to meet it and exactly there."""
    return candidate | {name: {"decode": limit["limit"]} for name in ("predicted", "obtained")}


BUNDLE = "smol ladder"


def estimated_ladder(**changes) -> Frontier:
    return frontier_of(ladder(estimated_content, **changes))


def measured_ladder(**changes) -> Frontier:
    return frontier_of(ladder(measured_content, **changes))


def with_tasks(frontier: Frontier, *names: str) -> Frontier:
    """Scores on tasks of these names, which fall by two points a rung, and odd input that the last one fails on."""
    tasks = [[_task(name, -2.0 * index) for name in names] for index, _ in enumerate(frontier.rungs, 1)]
    rungs = [rung.model_copy(update={"tasks": of}) for rung, of in zip(frontier.rungs, tasks, strict=True)]
    rungs[-1] = rungs[-1].model_copy(update={"finding": "On odd input it is far worse."})
    return frontier.model_copy(update={"rungs": rungs})


def _task(name: str, points: float) -> TaskScore:
    dense, fitted = (Share(percent=of, low_percent=of - 6, high_percent=of + 6) for of in (42.5, 42.5 + points))
    lost = Points(points=points, low_points=points - 2.5, high_points=points + 2.5)
    return TaskScore(name=name, metric="acc", questions=282, dense=dense, fitted=fitted, difference=lost)


def hostile(frontier: Frontier, text: str) -> Frontier:
    """The text wherever a user, a file or a model has a say."""
    rungs = [
        rung.model_copy(
            update={
                "asked": text,
                "sample": text,
                "texts": [one.model_copy(update={"name": text}) for one in rung.texts],
                "decode": rung.decode.model_copy(update={"device": text, "basis": text}),
                "tasks": [task.model_copy(update={"name": text}) for task in rung.tasks],
                "finding": text,
            }
        )
        for rung in frontier.rungs
    ]
    return frontier.model_copy(
        update={
            "rungs": rungs,
            "command": text,
            "prompt": text,
            "warnings": [text] * 7,
            "model": frontier.model.model_copy(update={"name": text, "family": text, "fingerprint": text}),
            "device": frontier.device.model_copy(update={"name": text, "description": text}),
            "dense": frontier.dense.model_copy(update={"sample": text}),
        }
    )


def printed(frontier: Frontier, bundle: str = BUNDLE) -> list[str]:
    file = io.StringIO()
    print_frontier(frontier, bundle, Console(file=file, width=80, color_system=None))
    return [line.rstrip() for line in file.getvalue().splitlines()]
