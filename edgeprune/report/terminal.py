"""What the command line shows of a report, of profiles and of comparisons; 80 columns are enough.

Texts of users and models are shown as they are: no markup, no control characters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.ondevice.budget import format_bytes
from edgeprune.report.figures import (
    OUTCOME_LABEL,
    OUTCOME_TEXT,
    deciding_text,
    difference_text,
    few_pictures_text,
    half_identical,
    interval_text,
    number_text,
    perplexity_text,
    picture_room_text,
    pictures_text,
    reading_text,
    rise_interval,
    rise_text,
    room_text,
    share_text,
    shorten,
    worst_agreement,
)
from edgeprune.report.schema import Figure, Quality, Report

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgeprune.commands.compare import Row
    from edgeprune.commands.doctor import Finding
    from edgeprune.commands.plan import Plan
    from edgeprune.profiles import DeviceProfile
    from edgeprune.report.images import Pictures

STYLES = {"met": "green", "missed": "red", "out_of_reach": "red", "noisy": "yellow", "uncertain": "yellow"}
SAMPLE_CHARACTERS = 160
WARNINGS = 3


def styled(value: str, style: str = "") -> Text:
    """Text as it is: nothing in it moves the cursor or recolours the terminal."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in value), style=style)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], whole: Sequence[str] = ()) -> Table:
    """A table without rules; the columns in `whole` are never broken."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="dim", show_header=any(columns))
    for column in columns:
        made.add_column(styled(column), overflow="fold", no_wrap=column in whole)
    for row in rows:
        made.add_row(*(styled(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def print_report(report: Report, console: Console) -> None:
    """The verdict, each constraint with the source of its figure, the quality, both samples, the next step."""
    style = STYLES[report.outcome]
    if report.quality.grade == "broken":
        rise, style = number_text(report.quality.rise_percent, "%"), STYLES["missed"]
        console.print(styled(f"Broken: perplexity {rise}. Do not deploy this model.", f"bold {style}"))
    console.print(styled(report.headline, f"bold {style}"))
    console.print(styled(f"Verdict: {OUTCOME_TEXT[report.outcome]}, from {report.rests_on} figures.", style))
    console.print()
    console.print(_constraints(report))
    console.print()
    console.print(table(("", ""), ((styled(name, "dim"), value) for name, value in _summary(report))))
    for step in report.deploy[:1]:
        console.print()
        console.print(styled(f"{step.title}:"))
        # Not wrapped, so that it can be copied.
        console.print(styled(step.command), soft_wrap=True)


def _constraints(report: Report) -> Table:
    """What was limited with its verdict, then the rest of memory, prefill and decode."""
    rows: list[tuple[str | Text, ...]] = [
        (
            row.name, number_text(row.limit, row.unit), *_figures(row.dense, row.fitted),
            "" if row.headroom_percent is None else number_text(row.headroom_percent, "%"),
            styled(OUTCOME_LABEL[row.status], STYLES[row.status]),
        )
        for row in report.budget
    ]  # fmt: skip
    limited = {row.name for row in report.budget}
    for name, field in (("memory", "memory_total"), ("prefill", "prefill"), ("decode", "decode")):
        if name not in limited:
            dense, fitted = (getattr(side.performance, field) for side in (report.dense, report.fitted))
            rows.append((name, "", *_figures(dense, fitted), "", ""))
    columns = ("constraint", "limit", "dense", "fitted", "source", "headroom", "verdict")
    return table(columns, rows, whole=columns[:-1])


def _figures(dense: Figure | None, fitted: Figure) -> tuple[str, str, str]:
    """Both figures and their source; a dense figure of another source names its own."""
    shown = "" if dense is None else number_text(dense.value, dense.unit)
    if dense is not None and dense.source != fitted.source:
        shown += f" ({dense.source})"
    return shown, number_text(fitted.value, fitted.unit), fitted.source


def _summary(report: Report) -> list[tuple[str, str]]:
    quality = report.quality
    samples = {"prompt": quality.prompt, "dense": quality.dense_sample, "fitted": quality.fitted_sample}
    warnings = [("mind", warning) for warning in report.warnings[:WARNINGS]]
    if (more := len(report.warnings) - WARNINGS) > 0:
        warnings.append(("", f"and {more} more in the report"))
    return [
        *_noticed(report),
        ("quality", _quality(quality)),
        *_same(quality),
        *(_pictures(quality.pictures) if quality.pictures else []),
        (
            "removed",
            f"{100 * report.ratio:.1f} % of attention and MLP parameters, {100 * report.total_ratio:.1f} % of all, "
            f"{100 * report.decode_bytes_ratio:.1f} % of decode bytes",
        ),
        *([("decides", deciding)] if (deciding := deciding_text(report.budget)) else []),
        *_budget_or_quality(report),
        ("fixed", report.unprunable),
        *(
            (name, shorten(" ".join(sample.split()), SAMPLE_CHARACTERS))
            for name, sample in samples.items()
            if sample is not None
        ),
        *warnings,
    ]


def _budget_or_quality(report: Report) -> list[tuple[str, str]]:
    """The nearest points where both cannot be had."""
    if (stop := report.quality_stop) is None:
        return []
    sides = {"within": (report.fitted.performance, report.quality.rise_percent),
             "beyond": (stop.performance, stop.rise_percent)}  # fmt: skip
    words = {"within": "the quality limit, smallest", "beyond": f"it; the budget: {OUTCOME_TEXT[stop.status]}"}
    return [
        (name, f"{words[name]}: perplexity {number_text(rise, '%')}, " + ", ".join(
            f"{what} {number_text(figure.value, figure.unit)} ({figure.source})"
            for what, figure in (("memory", side.memory_total), ("prefill", side.prefill), ("decode", side.decode))
        ))
        for name, (side, rise) in sides.items()
    ]  # fmt: skip


def _noticed(report: Report) -> list[tuple[str, str]]:
    """What a user will notice, with the dense model's in brackets."""
    dense, fitted = (report.experience[name] for name in ("dense", "fitted"))
    if report.quality.pictures:
        return _noticed_of_pictures(report)
    rate = number_text(fitted.tokens_per_second.value, "tokens/s")
    speed = (
        f"first token after {number_text(fitted.first_token.value, 'ms')}, then {rate}: {reading_text(fitted)} "
        f"(dense {reading_text(dense).split()[0]} x), {fitted.tokens_per_second.source}"
    )
    context, sequences = (
        f"{room_text(getattr(fitted, name), fitted)} (dense {room_text(getattr(dense, name), dense)})"
        for name in ("longest_context", "sequences")
    )
    room = f"context up to {context}; at context {report.workload.context} {sequences}; estimated, for memory alone"
    return [("speed", speed), ("room", room)]


def _noticed_of_pictures(report: Report) -> list[tuple[str, str]]:
    dense, fitted = (report.experience[name] for name in ("dense", "fitted"))
    rows = []
    if (each := fitted.seconds_per_image) and (before := dense.seconds_per_image):
        times = f"{number_text(each.value, each.unit)} (dense {number_text(before.value, before.unit)})"
        at_once = pictures_text(report.quality.pictures.at_once)
        rows.append(("speed", f"a picture takes {times}, with {at_once} at once and without the codec, {each.source}"))
    room = f"{picture_room_text(fitted, report)} at once (dense {picture_room_text(dense, report)})"
    return [*rows, ("room", f"{room}; estimated, for memory alone")]


def _pictures(pictures: Pictures) -> list[tuple[str, str]]:
    """How far both models' pictures are from the reference."""
    dense, fitted = pictures.dense, pictures.fitted
    if dense is None or fitted is None:
        return [("pictures", f"no distances: {pictures.missing}")]
    kernel = f"kernel distance to {pictures.reference} {interval_text(fitted.kernel)}"
    rows = [("pictures", f"{kernel}, dense {interval_text(dense.kernel)}, measured")]
    if pictures.difference:
        rows.append(("", f"{interval_text(pictures.difference)} more, paired: {difference_text(pictures.difference)}"))
    return [
        *rows,
        (
            "",
            f"Frechet distance {fitted.frechet.value:.3g} (dense {dense.frechet.value:.3g}), precision "
            f"{fitted.precision.value:.2f} (dense {dense.precision.value:.2f}), recall {fitted.recall.value:.2f} "
            f"(dense {dense.recall.value:.2f})",
        ),
        ("", few_pictures_text(pictures)),
    ]


def _same(quality: Quality) -> list[tuple[str, str]]:
    """How often both models say the same."""
    rows = []
    if agreement := worst_agreement(quality.texts):
        worst = "" if len(quality.texts) == 1 else " on the worst text"
        rows.append(("agrees", f"the likeliest next token is the dense model's at {share_text(agreement)}{worst}"))
    if quality.answers:
        step = half_identical(quality.answers)
        same = f"{step.same} of {step.answers} answers"
        rows.append(("", f"{same} begin with the same {number_text(step.tokens, 'tokens')}, on this machine"))
    return rows


def _quality(quality: Quality) -> str:
    worst = max(quality.texts, key=lambda text: text.rise_percent)
    texts, document, text = ("sets", "picture", "pictures") if quality.pictures else ("texts", "document", "text")
    where = "" if len(quality.texts) == 1 else f" on the worst of {len(quality.texts)} {texts}"
    interval = rise_interval(worst)
    certainty = f"95 % interval {interval}" if interval else f"one {document}, so no interval"
    label = "" if quality.label == "perplexity" else f"; {quality.label}, on {text} of its own"
    return f"{quality.grade}: perplexity {number_text(quality.rise_percent, '%')}{where}, measured ({certainty}){label}"


def print_profiles(profiles: Sequence[DeviceProfile], console: Console) -> None:
    """One line or two for each device."""
    columns = ("device", "memory", "bandwidth", "SM", "engine", "description")
    rows = [
        (
            profile.name, _hardware(profile, "memory"), _hardware(profile, "bandwidth"), str(profile.sm or ""),
            profile.engine, profile.description,
        )
        for profile in profiles
    ]  # fmt: skip
    console.print(table(columns, rows, whole=columns[:-1]))


def _hardware(profile: DeviceProfile, name: str) -> str:
    figure = getattr(profile, name)
    return "probed" if figure is None else f"{figure.value:g}{'' if figure.unit == '1' else f' {figure.unit}'}"


def print_profile(profile: DeviceProfile, console: Console) -> None:
    """One profile, with the source and confidence of each figure."""
    workload, budget = profile.workload, profile.budget
    console.print(styled(f"{profile.name}: {profile.description}", "bold"))
    facts = (
        ("engine", f"{profile.engine}, SM {profile.sm or '–'}, {profile.precision}"),
        ("widths", f"in multiples of {profile.channel_multiple}"),
        ("power modes", ", ".join(profile.power_modes) or "–"),
        ("workload", f"batch {workload.batch}, prompt {workload.prompt}, context {workload.context} by default"),
        ("budget", f"memory {budget.memory}, prefill {budget.prefill}, decode {budget.decode} by default"),
    )
    console.print(table(("", ""), ((styled(name, "dim"), value) for name, value in facts)))
    console.print()
    if not profile.hardware:
        console.print("No hardware figures are shipped: they are probed on first use and cached.")
        return
    rows = [
        (name.replace("_", " "), _hardware(profile, name), figure.confidence, figure.source)
        for name, figure in profile.hardware.items()
    ]
    columns = ("figure", "value", "confidence", "source")
    console.print(table(columns, rows, whole=columns[:-1]))


def print_doctor(findings: Sequence[Finding], console: Console) -> None:
    """What is there and what is missing, with how to get it."""
    rows = [
        (styled("yes", "green") if f.usable else styled("no", "yellow"), f.name, f.detail, f.remedy) for f in findings
    ]
    console.print(table(("", "what", "detail", "to get it"), rows, whole=("", "what")))


def print_plan(plan: Plan, console: Console) -> None:
    """Whether it fits, memory and latencies by part, and what they rest on; every figure is an estimate."""
    performance, decode = plan.performance, plan.performance.decode.value
    console.print(styled(f"{plan.model} on {plan.profile.name}: {_shape(plan)}"))
    have, need = format_bytes(plan.profile.available_bytes), format_bytes(performance.memory.total)
    fits = f"It fits: {need} of the {have}" if plan.fits else f"It does not fit: {need}, but {have}"
    console.print(styled(f"{fits} that the system leaves. All figures are estimated.", STYLES[_fit(plan)]))
    console.print()
    rows: list[tuple[str | Text, str, str]] = [("memory", need, "")]
    rows += [(f"  {name}", format_bytes(part.value), part.basis) for name, part in performance.memory.parts.items()]
    rows += [
        (styled("prefill"), number_text(performance.prefill.value, "ms"), f"of {plan.workload.prompt} tokens"),
        (styled("decode"), number_text(decode, "ms"), f"per step, {_tokens_per_second(plan, decode)}"),
    ]
    rows += [(f"  {name.replace('_', ' ')}", number_text(ms, "ms"), "") for name, ms in plan.decode_parts.items() if ms]
    if plan.decode_parts["cache_copies"]:
        in_place = plan.decode_in_place_ms
        detail = f"without copies of the cache, {_tokens_per_second(plan, in_place)}"
        rows.append(("decode in place", number_text(in_place, "ms"), detail))
    console.print(table(("estimated", "", ""), rows, whole=("estimated",)))
    console.print()
    rests = [("prefill", performance.prefill.basis), ("decode", performance.decode.basis)]
    rests += [("mind", note) for note in plan.notes]
    if weak := [name for name, figure in plan.profile.hardware.items() if figure.confidence == "low"]:
        rests.append(("mind", f"of low confidence in the profile, which says why: {', '.join(weak)}"))
    console.print(table(("", ""), ((styled(name, "dim"), text) for name, text in rests)))


def print_plans(plans: Sequence[Plan], console: Console) -> None:
    """A line for each device: what the model needs and whether that is there; latencies where it is."""
    console.print(styled(f"{plans[0].model}: {_shape(plans[0])}. All figures are estimated."))
    console.print()
    rows = []
    for plan in plans:
        performance = plan.performance
        latencies = (number_text(figure.value, "ms") for figure in (performance.prefill, performance.decode))
        rows.append((
            plan.profile.name, format_bytes(performance.memory.total), format_bytes(plan.profile.available_bytes),
            styled("yes" if plan.fits else "no", STYLES[_fit(plan)]), *(latencies if plan.fits else ("–", "–")),
        ))  # fmt: skip
    columns = ("device", "needs", "has", "fits", "prefill", "decode")
    console.print(table(columns, rows, whole=columns))
    console.print()
    held = [plan for plan in plans if plan.fits]
    guessed = sum(plan.profile.decode_efficiency.confidence == "low" for plan in held)
    few = f", {guessed} of them with no or few published points" if guessed else ""
    console.print(styled(f"{len(held)} of {len(plans)} devices hold it{few}."))
    console.print("--device NAME gives all parts, and the points that they rest on.", markup=False)


def _fit(plan: Plan) -> str:
    return "met" if plan.fits else "missed"


def _shape(plan: Plan) -> str:
    workload = plan.workload
    return (
        f"{plan.decoder.parameters / 1e9:.3g} B parameters, {plan.precision}, batch {workload.batch}, "
        f"prompt {workload.prompt}, past {plan.past}"
    )


def _tokens_per_second(plan: Plan, decode_ms: float) -> str:
    return number_text(1e3 * plan.workload.batch / decode_ms, "tokens/s")


def print_comparison(rows: Sequence[Row], console: Console) -> None:
    """A table for each layout: methods by line, perplexity on each text and its logarithm's rise with the interval."""
    dense = rows[0]
    texts = list(dense.perplexity)
    perplexities = ", ".join(f"{text} {dense.perplexity[text]:.2f}" for text in texts)
    console.print(
        f"dense: perplexity {perplexities}; {dense.parameters / 1e6:.1f} M parameters, "
        f"{format_bytes(dense.decode_bytes)} per token in fp16",
        markup=False,
    )
    console.print(
        "rise: log perplexity over the dense model in nats per token, measured here [95 % interval]", markup=False
    )
    columns = (
        "method", "ratio", "of total", *(f"{text}: perplexity, rise" for text in texts), "per token", "seconds",
        "peak memory",
    )  # fmt: skip
    for layout in dict.fromkeys(row.layout for row in rows[1:]):
        cells = [
            (
                row.method, f"{100 * row.ratio:.1f} %", f"{100 * row.total_ratio:.1f} %",
                *(f"{perplexity_text(row.perplexity[text])}  {rise_text(row.rise[text])}" for text in texts),
                format_bytes(row.decode_bytes), f"{row.seconds:.1f}", format_bytes(row.peak_bytes),
            )
            for row in rows
            if row.layout == layout
        ]  # fmt: skip
        console.print(f"\nlayout {layout}")
        console.print(table(columns, cells, whole=[column for column in columns if not column.endswith("rise")]))
    for row in rows:
        if row.fell_back:
            console.print(f"{row.method} at {100 * row.ratio:.1f} %: no update helped in {row.fell_back} modules")
