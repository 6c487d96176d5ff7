"""Tables for the terminal; 80 columns are enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprune.budget import STATUS_TEXT, format_bytes, format_ms
from edgeprune.report.html import limit_text
from edgeprune.report.schema import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from edgeprune.compare import Row
    from edgeprune.doctor import Finding
    from edgeprune.profiles import DeviceProfile

STYLES = {"met": "green", "missed": "red", "noisy": "yellow"}


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(value: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(value, style=style)


def print_report(report: Report, console: Console) -> None:
    """The verdict, the constraints with the source of each figure, the quality, both samples."""
    if report.quality.grade == "broken":
        console.print(_text("Broken: do not deploy this model.", "bold red"))
    style = STYLES[report.status if report.quality_met else "missed"]
    console.print(_text(report.headline, f"bold {style}"))
    console.print()
    table = _table("constraint", "limit", "dense", "fitted", "source", "verdict")
    for row in report.budget:
        table.add_row(
            row.name, limit_text(row.limit, row.unit),
            "" if row.dense is None else limit_text(row.dense.value, row.unit), limit_text(row.fitted.value, row.unit),
            row.fitted.source, _text(STATUS_TEXT[row.status], STYLES[row.status]),
        )  # fmt: skip
    performance = report.fitted.performance
    limited = {row.name for row in report.budget}
    for name, figure, dense in (
        ("memory", performance.memory_total, report.dense.performance.memory_total),
        ("prefill", performance.prefill, report.dense.performance.prefill),
        ("decode", performance.decode, report.dense.performance.decode),
    ):
        if name not in limited:
            show = format_bytes if name == "memory" else format_ms
            table.add_row(name, "", show(dense.value), show(figure.value), figure.source, "")
    console.print(table)
    console.print()
    console.print(
        f"quality    {report.quality.grade} ({report.quality.label}: "
        f"perplexity {report.quality.rise_percent:+.1f} %)", markup=False, highlight=False,
    )  # fmt: skip
    console.print(
        f"removed    {100 * report.ratio:.1f} % of attention and MLP parameters, {100 * report.total_ratio:.1f} % of all, "
        f"{100 * report.decode_bytes_ratio:.1f} % of decode bytes", markup=False, highlight=False,
    )  # fmt: skip
    console.print(f"floor      {report.unprunable}", markup=False, highlight=False)
    console.print(_text(f"sample     {report.quality.fitted_sample}"))


def print_profiles(profiles: Sequence[DeviceProfile], console: Console) -> None:
    table = _table("device", "memory", "bandwidth", "SM", "engine", "description")
    for profile in profiles:
        figures = ("memory", "bandwidth")
        shown = [f"{f.value:g} {f.unit}" if (f := getattr(profile, name)) else "probed" for name in figures]
        table.add_row(profile.name, *shown, str(profile.sm or ""), profile.engine, profile.description)
    console.print(table)


def print_profile(profile: DeviceProfile, console: Console) -> None:
    """One profile, with the source and confidence of each figure."""
    console.print(_text(f"{profile.name}: {profile.description}", "bold"))
    console.print(
        f"engine {profile.engine}, SM {profile.sm or '-'}, {profile.precision}, widths in multiples of "
        f"{profile.channel_multiple}; power modes: {', '.join(profile.power_modes) or '-'}", highlight=False,
    )  # fmt: skip
    console.print(
        f"default workload: batch {profile.workload.batch}, prompt {profile.workload.prompt}, context "
        f"{profile.workload.context}; default budget: memory {profile.budget.memory}, prefill {profile.budget.prefill}, "
        f"decode {profile.budget.decode}", highlight=False,
    )  # fmt: skip
    table = _table("figure", "value", "confidence", "source")
    for name, figure in profile.hardware.items():
        unit = "" if figure.unit == "1" else f" {figure.unit}"
        table.add_row(name.replace("_", " "), f"{figure.value:g}{unit}", figure.confidence, figure.source)
    if profile.hardware:
        console.print(table)
    else:
        console.print("No hardware figures are shipped: they are probed on first use and cached.")


def print_doctor(findings: Sequence[Finding], console: Console) -> None:
    table = _table("", "what", "detail", "to get it")
    for finding in findings:
        mark = _text("yes", "green") if finding.usable else _text("no", "yellow")
        table.add_row(mark, finding.name, _text(finding.detail), _text(finding.remedy))
    console.print(table)


def print_comparison(rows: Sequence[Row], console: Console) -> None:
    texts = list(rows[0].perplexity)
    table = _table("method", "ratio", *texts, "parameters", "seconds", "peak memory")
    for row in rows:
        table.add_row(
            row.method, f"{100 * row.ratio:.1f} %", *(f"{row.perplexity[text]:.2f}" for text in texts),
            f"{row.parameters / 1e6:.1f} M", f"{row.seconds:.1f}", format_bytes(row.peak_bytes),
        )  # fmt: skip
    console.print(table)
