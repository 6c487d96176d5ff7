"""Tables of devices, of the doctor's findings and of plans for the terminal. They add no figure to these."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.engine.estimate import low_confidence_notes
from edgeprune.ondevice.budget import format_bytes
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.report.figures import number_text
from edgeprune.report.terminal import STYLES, styled, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.text import Text

    from edgeprune.commands.doctor import Finding
    from edgeprune.commands.families import FamilyRow
    from edgeprune.commands.plan import Plan
    from edgeprune.engine.checkup import Checkup
    from edgeprune.pipeline.outlook import Outlook
    from edgeprune.profiles import DeviceProfile, HardwareFigure


def print_profiles(profiles: Sequence[DeviceProfile], console: Console) -> None:
    """Prints one line or two for each device."""
    columns = ("device", "memory", "bandwidth", "SM", "engine", "description")
    rows = [
        (
            profile.name,
            _value(profile.memory),
            _value(profile.bandwidth),
            str(profile.sm or ""),
            profile.engine,
            profile.description,
        )
        for profile in profiles
    ]
    console.print(table(columns, rows, whole=columns[:-1]))


def _value(figure: HardwareFigure | None) -> str:
    """Returns a figure of a profile in its unit; `probed` where the profile leaves it to the machine."""
    return "probed" if figure is None else f"{figure.value:g}{'' if figure.unit == '1' else f' {figure.unit}'}"


def print_profile(profile: DeviceProfile, console: Console) -> None:
    """Prints one profile, with the source and confidence of each figure."""
    # What the profile sets by default.
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
    # What estimates rest on.
    if not profile.hardware:
        console.print("The profile holds no hardware figures: they are probed on first use and cached.")
        return
    rows = [
        (name.replace("_", " "), _value(figure), figure.confidence, figure.source)
        for name, figure in profile.figures.items()
    ]
    columns = ("figure", "value", "confidence", "source")
    console.print(table(columns, rows, whole=columns[:-1]))


def print_families(families: Sequence[FamilyRow], console: Console) -> None:
    """Prints one line for each family, and what its figures are."""
    rows = [
        (
            row.family,
            *(f"{error:.0e}" for error in (row.dense, row.uniform, row.per_layer)),
            "yes" if row.packed else "floats",
            row.llama_cpp or "–",
            row.by_layer or "–",
        )
        for row in families
    ]
    columns = ("family", "dense", "uniform", "per layer", "few bits", "llama.cpp", "by layer")
    console.print(table(columns, rows, whole=columns))
    for line in (
        "dense, uniform, per layer: max|a - b| / max|b| of logits to transformers', fp32, measured on small models.",
        "few bits: a checkpoint holds weight formats. llama.cpp: its architecture; by layer: that of different widths.",
    ):
        console.print(styled(line))


def print_doctor(findings: Sequence[Finding], console: Console) -> None:
    """Prints what is installed and what is missing, with how to get it."""
    rows = [
        (styled("yes", "green") if f.usable else styled("no", "yellow"), f.name, f.detail, f.remedy) for f in findings
    ]
    console.print(table(("", "what", "detail", "to get it"), rows, whole=("", "what")))


_STATES = {"passed": ("passed", "green"), "failed": ("failed", "red"), "not applicable": ("–", "dim")}


def print_checkup(checkup: Checkup, console: Console) -> None:
    """Prints a line for each check: passed with what was found, failed with what to do, or why it does not apply."""
    rows = [
        (
            styled(*_STATES[check.state]),
            check.name,
            f"{check.detail}\n→ {check.remedy}" if check.remedy else check.detail,
        )
        for check in checkup.checks
    ]
    console.print(table(("", "check", checkup.where), rows, whole=("", "check")))
    console.print()
    counts = [f"{checkup.count(state)} {state}" for state in _STATES if checkup.count(state)]
    style = "red" if checkup.count("failed") else "green"
    console.print(styled(f"{', '.join(counts)}, in {checkup.seconds:.0f} s.", style))
    if checkup.count("failed"):
        console.print("--json gives all of it for a report: no names of users are in it.", markup=False)


def print_methods(console: Console) -> None:
    """Prints a line for each method of compare."""
    from edgeprune.pruning.methods import METHODS
    from edgeprune.pruning.slicegpt import SLICEGPT, WORDS

    rows = [(name, method.words) for name, method in METHODS.items()] + [(SLICEGPT, WORDS)]
    console.print(table(("method", "what it removes first; rest refitted: by least squares"), rows, whole=("method",)))
    console.print()
    formats = ", ".join(WEIGHT_FORMATS)
    console.print(
        styled(
            f"Weight formats are methods too, alone or after a method, as in default+int8: {formats}; int4 is the "
            "first format of 4 bits that divides the model's sizes."
        )
    )


def print_plan(plan: Plan, console: Console) -> None:
    """Prints whether it fits, memory and latencies by part, and what they rest on; every figure is an estimate."""
    # The verdict.
    performance, decode = plan.performance, plan.performance.decode.value
    console.print(styled(f"{plan.model} on {plan.profile.name}: {_shape(plan)}"))
    have, need = format_bytes(plan.profile.available_bytes), format_bytes(performance.memory.total)
    fits = f"It fits: {need} of the {have}" if plan.fits else f"It does not fit: {need}, but {have}"
    console.print(styled(f"{fits} that the system leaves. All figures are estimated.", STYLES[_fit(plan)]))
    console.print()
    # The table of memory, prefill and decode by part.
    rows: list[tuple[str | Text, str, str]] = [("memory", need, "")]
    rows += [(f"  {name}", format_bytes(part.value), part.basis) for name, part in performance.memory.parts.items()]
    if plan.build_bytes is not None:
        place = "where the engine is built" if plan.builds is None else "while the engine is built there"
        rows.append(("build", format_bytes(plan.build_bytes), f"of memory {place}"))
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
    if plan.outlook is not None:
        _print_outlook(plan.outlook, console)
    # What the latencies rest on, and what to mind.
    rests = [("prefill", performance.prefill.basis), ("decode", performance.decode.basis)]
    rests.append(("dialect", f"{plan.profile.dialect} is assumed: {plan.dialect_reason}"))
    in_words = low_confidence_notes(plan.profile)
    rests += [("mind", note) for note in (*plan.notes, *performance.notes) if note not in in_words]
    if weak := [name for name, figure in plan.profile.figures.items() if figure.confidence == "low"]:
        rests.append(("mind", f"of low confidence in the profile, which gives the reasons: {', '.join(weak)}"))
    console.print(table(("", ""), ((styled(name, "dim"), text) for name, text in rests)))


def _print_outlook(outlook: Outlook, console: Console) -> None:
    """Prints what a fit takes of this machine, and whether that is there."""
    from edgeprune.pipeline.duration import in_words

    lacking = " and ".join(outlook.lacking)
    verdict = f"this machine has too little {lacking} for it" if lacking else "this machine can do it"
    console.print(styled(f"A fit for it here: {verdict}, estimated.", STYLES["missed" if lacking else "met"]))
    console.print()
    work, rates = outlook.work, outlook.rates
    speeds = f"{rates.passes / 1e9:.0f} GFLOP/s through a layer, {rates.factors / 1e9:.0f} of factorisations"
    has = "" if outlook.has_memory is None else f"of {format_bytes(outlook.has_memory)}"
    rows = [
        ("time", in_words(outlook.seconds), f"{work.flops / 1e12:.3g} TFLOP, as were just timed: {speeds}"),
        ("memory", format_bytes(max(outlook.memory.values())), has),
        *((f"  {name}", format_bytes(value), "") for name, value in outlook.memory.items()),
        ("disk", format_bytes(outlook.disk), f"at most, of {format_bytes(outlook.has_disk)} free here"),
    ]
    console.print(table(("a fit here", "", ""), rows, whole=("a fit here",)))
    console.print()


def print_plans(plans: Sequence[Plan], console: Console) -> None:
    """Prints a line for each device: what the model needs and whether that is there; latencies where it is."""
    console.print(styled(f"{plans[0].model}: {_shape(plans[0])}. All figures are estimated."))
    console.print()
    # The table; a model that does not fit has no latencies.
    rows = []
    for plan in plans:
        performance = plan.performance
        latencies = (number_text(figure.value, "ms") for figure in (performance.prefill, performance.decode))
        rows.append(
            (
                plan.profile.name,
                format_bytes(performance.memory.total),
                format_bytes(plan.profile.available_bytes),
                styled("yes" if plan.fits else "no", STYLES[_fit(plan)]),
                *(latencies if plan.fits else ("–", "–")),
            )
        )
    columns = ("device", "needs", "has", "fits", "prefill", "decode")
    console.print(table(columns, rows, whole=columns))
    console.print()
    # How many devices hold the model, and how many of these rest on few published measurements.
    held = [plan for plan in plans if plan.fits]
    guessed = sum(plan.profile.decode_efficiency.confidence == "low" for plan in held)
    few = f", {guessed} of them with no or few published points" if guessed else ""
    console.print(styled(f"{len(held)} of {len(plans)} devices hold it{few}."))
    console.print("--device NAME gives all parts, and the points that they rest on.", markup=False)


def _fit(plan: Plan) -> str:
    return "met" if plan.fits else "missed"


def _shape(plan: Plan) -> str:
    """Returns the parameters, the precision and the workload in one line."""
    workload, formats = plan.workload, "" if plan.weights == "float" else f", weights in {plan.weights}"
    formats += "" if plan.cache == "float" else f", KV cache in {plan.cache}"
    return (
        f"{plan.decoder.parameters / 1e9:.3g} B parameters, {plan.precision}{formats}, batch {workload.batch}, "
        f"prompt {workload.prompt}, past {plan.past}"
    )


def _tokens_per_second(plan: Plan, decode_ms: float) -> str:
    return number_text(1e3 * plan.workload.batch / decode_ms, "tokens/s")
