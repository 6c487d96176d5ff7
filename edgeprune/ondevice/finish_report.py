"""The report of a rung with the device's figures in place of the estimates, and the banner of its page.

This file also runs on the device: Python 3.10, standard library only. It knows no model and measures nothing.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from edgeprune.ondevice.budget import (
    OF_QUALITY,
    STATUS_TEXT,
    Verdict,
    format_bytes,
    format_ms,
    format_percent,
    reported,
)
from edgeprune.ondevice.experience import Room, experience_again
from edgeprune.ondevice.figures import Performance, Workload, figure_to_json

NOT_MEASURED = "Latency was not measured on the device: build and measure there before you decide."
BANNER = ("<!-- measured -->", "<!-- /measured -->")


@dataclass(frozen=True)
class MeasuredRung:
    """A rung and its measurement on the device. error: why it could not be built; empty where it was built."""

    index: int
    status: str
    performance: Performance | None
    verdict: Verdict | None
    error: str = ""


def merged(report: dict[str, Any], measurement: dict[str, Any], chosen: MeasuredRung) -> dict[str, Any]:
    """Returns a rung's report with the figures of the device in place of the estimates."""
    performance = chosen.performance
    # Ratios to the dense model are the workstation's: the dense model was not measured on the device.
    shown = {**reported(performance), "prefill_ratio": None, "decode_ratio": None}
    # The rows of the budget, with the verdict on the device. The row of the quality stays.
    checks = {check.name: check for check in chosen.verdict.checks}
    budget = []
    for row in report["budget"]:
        if check := checks.get(row["name"]):
            row = {
                **row,
                "limit": check.limit,
                "status": check.status,
                "fitted": figure_to_json(check.figure),
                "headroom_percent": 100 * (1 - check.figure.value / check.limit),
            }
        budget.append(row)
    # Tokens per second: the bounds of the interval change places.
    batch, decode = report["workload"]["batch"], shown["decode"]
    rate = {
        **decode,
        "value": 1e3 * batch / decode["value"],
        "unit": "tokens/s",
        "basis": f"{batch} / decode",
        "low": 1e3 * batch / decode["high"],
        "high": 1e3 * batch / decode["low"],
    }
    # First token, longest context and so on, from the device's figures and the room that was computed before.
    room = report["experience"]["fitted"]["room"]
    images = (report["quality"]["pictures"] or {}).get("at_once")
    experience = experience_again(performance, Workload(**report["workload"]), Room(**room), images)
    experience_json = {name: figure and figure_to_json(figure) for name, figure in experience.figures.items()}
    return {
        **report,
        "headline": _headline(report, measurement, chosen),
        "status": chosen.status,
        "rests_on": measurement["rests_on"],
        "budget": budget,
        "measurement": measurement,
        "fitted": {**report["fitted"], "performance": shown},
        "tokens_per_second": {**report["tokens_per_second"], "fitted": rate},
        "experience": {**report["experience"], "fitted": {**experience_json, "room": room}},
        "warnings": [text for text in report["warnings"] if text != NOT_MEASURED] + list(performance.notes),
    }


def _headline(report: dict[str, Any], measurement: dict[str, Any], chosen: MeasuredRung) -> str:
    """Returns one sentence: whether the model meets the budget on the device, and at which loss of quality."""
    name, place, how = report["model"]["name"], measurement["machine"], measurement["rests_on"]
    asked = ", ".join(f"{check.name} {check.asked}" for check in chosen.verdict.checks)
    rise = float(report["quality"]["rise_percent"])  # of a broken model it is the text `Infinity`
    own = "pictures" if report["quality"]["pictures"] else "text"
    where = "" if report["quality"]["label"] == "perplexity" else f" on its own {own}"
    cost = f"at {format_percent(rise)} perplexity{where}"
    if report["quality"]["grade"] == "broken":
        return f"No: {name} is broken, whatever it needs on {place}: {cost}."
    if chosen.status == "noisy":
        return f"Not clear: {name}, {asked} on {place}: {STATUS_TEXT['noisy']} ({cost})."
    if chosen.status == "missed":
        return f"No, {how} there: {name} does not meet {asked} on {place}, {cost}."
    if report["quality_status"] == "missed":
        return f"No: {name} meets {asked} on {place}, {how} there, but only beyond the quality limit: {cost}."
    if report["quality_status"] == "noisy":
        return f"Not clear: {name} meets {asked} on {place}, its quality is too uncertain to tell ({cost})."
    odd = (report.get("robustness") or {}).get("finding", "")  # the odd input that it fails on, in words
    return f"Yes, {how} there: {name} meets {asked} on {place}, {cost}. {odd}".rstrip()


def banner(report: dict[str, Any], measurement: dict[str, Any]) -> str:
    """Returns the HTML of the banner: the headline and the verdict of each constraint on the device."""
    rows = "".join(
        f"<tr><td>{html.escape(row['name'])}</td><td class='{row['status']} n'><b>{html.escape(row['status'])}</b></td>"
        f"<td class='n'>{limit_text(row['name'], row['fitted']['value'])} "
        f"<span class='badge {row['fitted']['source']}'>{row['fitted']['source']}</span></td>"
        f"<td class='n'>{limit_text(row['name'], row['limit'])}</td></tr>"
        for row in report["budget"]
        if row["name"] not in OF_QUALITY
    )
    version = f"{measurement['engine']} {measurement['version']}"
    return (
        f"<section class='card'><h2>{html.escape(report['headline'])}</h2><p class='soft'>Measured "
        f"{html.escape(measurement['created'])} with {html.escape(version)}, rung {measurement['rung']}. The page "
        "below is older; <code>edgeprune report BUNDLE</code> on the workstation draws it anew.</p>"
        f"<table><tr><th>constraint</th><th>verdict</th><th>there</th><th>limit</th></tr>{rows}</table></section>"
    )


def limit_text(name: str, value: float) -> str:
    return format_bytes(value) if name == "memory" else format_ms(value)
