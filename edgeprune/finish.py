"""Finishes a bundle where it runs: build, check, measure, judge; the largest rung that meets the budget is taken.

`python3 finish.pyz` in the bundle's folder does it on the device with nothing installed but what the engine
needs; `edgeprune measure` does the same from the workstation. This file runs on both: Python 3.10, standard
library only.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.budget import STATUS_TEXT, Budget, Limit, Verdict, format_bytes, format_ms, judge, memory_total
from edgeprune.bundle import REPORT, open_bundle, point_to_rung, write_again
from edgeprune.engine import perform
from edgeprune.engine.base import Figure, Measured, Performance, Workload
from edgeprune.engine.child import Tell
from edgeprune.engine.perform import Counted, Here, Session
from edgeprune.engine.wire import figure_from_json, performance_to_json
from edgeprune.errors import BudgetError, EdgepruneError, EngineError, InputError, WrongEngine

DEPLOYMENT = "deployment.json"
MEASUREMENT = "measurement.json"
NOT_MEASURED = "Latency was not measured on the device: build and measure there before you decide."
BANNER = ("<!-- measured -->", "<!-- /measured -->")
FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # engine: the module that it needs


@dataclass(frozen=True)
class Rung:
    """A rung as it was found on the device. error: why it could not be built, empty where it could."""

    index: int
    status: str
    performance: Performance | None
    verdict: Verdict | None
    error: str = ""


def finish(bundle: Path, session: Session, where: str, tell: Tell) -> dict[str, Any]:
    """Build and measure the bundle's rungs, the largest first, until one meets the budget; write what was found.

    where: the device in words. Returns the measurement as it stands in measurement.json. Raises InputError
    where the folder is no bundle, EngineError where nothing could be built or an engine computes wrongly.
    """
    open_bundle(bundle)
    plan = _read(bundle / DEPLOYMENT)
    engine, facts = _engine(plan, session, where, tell)
    workload = Workload(**plan["workload"])
    limits = {name: Limit(limit["value"], False, limit["asked"]) for name, limit in plan["limits"].items()}
    budget = Budget(**limits)
    tried: list[Rung] = []
    for index, rung in enumerate(plan["rungs"]):
        try:
            performance = _perform(bundle, index, rung, plan, engine, workload, session, tell)
        except EngineError as error:
            if isinstance(error, WrongEngine) or index == len(plan["rungs"]) - 1:
                raise
            tried.append(Rung(index, "failed", None, None, error.message))  # a smaller one may fit
            continue
        verdict = judge(budget, performance, performance)
        tried.append(Rung(index, verdict.status, performance, verdict))
        if verdict.met:
            break
    measurement = _measurement(plan, tried, engine, facts, where)
    _write(bundle, measurement, tried[-1], plan)
    return measurement


def _engine(plan: dict[str, Any], session: Session, where: str, tell: Tell) -> tuple[str, dict[str, Any]]:
    """The engine that the device has for this bundle, and what the device is. Raises EngineError."""
    facts = perform.describe(session, tell)
    modules = facts["modules"]
    if plan["engine"] == "onnxruntime":
        names = ("numpy", "onnxruntime")
        if missing := [name for name in names if modules[name] is None]:
            raise EngineError(
                f"{where} has no Python module {' and '.join(missing)}", f"pip install {' '.join(missing)}"
            )
        return "onnxruntime", facts
    order = sorted(FLAVOURS, key=lambda name: name != plan["engine"])
    engine = next((name for name in order if modules[FLAVOURS[name]]), None)
    if engine is None or modules["numpy"] is None:
        missing = "numpy" if modules["numpy"] is None else FLAVOURS[order[0]]
        raise EngineError(
            f"{where} has no Python module {missing}",
            "JetPack brings tensorrt and numpy (sudo apt install python3-libnvinfer python3-numpy); elsewhere: "
            f"pip install {missing.replace('_', '-')}",
        )
    if facts["gpu"] is None:
        raise EngineError(f"{where}: {facts['no_gpu']}", "Run it on the device, with cuda-python or pycuda installed.")
    if facts["gpu"]["sm"] != plan["sm"]:
        raise EngineError(
            f"{where} has a {facts['gpu']['name']} of SM {facts['gpu']['sm']}, the bundle is for SM {plan['sm']}",
            "Fit for this device: `edgeprune fit --device NAME` with its profile.",
        )
    return engine, facts


def _perform(
    bundle: Path, index: int, rung: dict[str, Any], plan: dict[str, Any], engine: str, workload: Workload,
    session: Session, tell: Tell,
) -> Performance:  # fmt: skip
    folder = bundle / "rungs" / str(index)
    graph, reference = folder / "onnx" / plan["graph"], folder / "reference.npz"

    def told(stage: str, done: int, total: int) -> None:
        tell(f"rung {index}: {stage}" if len(plan["rungs"]) > 1 else stage, done, total)

    if engine == "onnxruntime":
        counted = Counted(**rung["counted"])
        return perform.on_onnxruntime(session, None, graph, workload, counted, told, reference, plan["precision"])
    target = folder / "engine"
    target.mkdir(exist_ok=True)
    path = target / f"model.sm{plan['sm']}.engine"
    built = perform.build(session, engine, graph, path, workload, told, workspace_bytes=rung["workspace_bytes"])
    runtime = figure_from_json(plan["runtime"])
    return perform.on_tensorrt(session, engine, path, built, workload, runtime, reference, plan["precision"], told)


def _measurement(
    plan: dict[str, Any], tried: list[Rung], engine: str, facts: dict[str, Any], where: str
) -> dict[str, Any]:
    last = tried[-1]
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "where": where,
        "machine": facts["machine"], "gpu": (facts["gpu"] or {}).get("name"), "engine": engine,
        "version": facts["modules"]["onnxruntime" if engine == "onnxruntime" else FLAVOURS[engine]],
        "rung": last.index, "status": last.status, "rests_on": last.verdict.source,
        "rungs": [
            {
                "index": rung.index, "status": rung.status, "error": rung.error,
                "figures": {} if rung.performance is None else rung.performance.values,
            }
            for rung in tried
        ],
        "performance": performance_to_json(last.performance),
    }  # fmt: skip


def _write(bundle: Path, measurement: dict[str, Any], chosen: Rung, plan: dict[str, Any]) -> None:
    """measurement.json, the report with it, a banner in the page, the links to the rung that was taken."""
    report = merged(_read(bundle / "rungs" / str(chosen.index) / REPORT), measurement, chosen)
    report["files"] = _read(bundle / REPORT)["files"]
    page = (bundle / "report.html").read_text(encoding="utf-8")
    begin, end = (page.find(mark) for mark in BANNER)
    if 0 <= begin < end:
        page = page[: begin + len(BANNER[0])] + _banner(report, measurement) + page[end:]
    point_to_rung(bundle, chosen.index)
    folder = bundle / "rungs" / str(chosen.index) / "engine"
    engines = [str(path.relative_to(bundle)) for path in folder.glob("*.engine")] if folder.is_dir() else []
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in
             ((MEASUREMENT, measurement), (REPORT, report))}  # fmt: skip
    write_again(bundle, {**texts, "report.html": page}, engines)


def merged(report: dict[str, Any], measurement: dict[str, Any], chosen: Rung) -> dict[str, Any]:
    """A rung's report with what was measured in the place of what was estimated."""
    performance = chosen.performance
    shown = {
        "memory": {name: _figure(part) for name, part in performance.memory.parts.items()},
        "memory_total": _figure(memory_total(performance)), "prefill": _figure(performance.prefill),
        "decode": _figure(performance.decode), "prefill_ratio": None, "decode_ratio": None,
        "percentiles": performance.percentiles, "conditions": performance.conditions,
    }  # fmt: skip
    checks = {check.name: check for check in chosen.verdict.checks}
    budget = []
    for row in report["budget"]:
        if check := checks.get(row["name"]):
            row = {**row, "limit": check.limit, "status": check.status, "fitted": _figure(check.figure),
                   "headroom_percent": 100 * (1 - check.figure.value / check.limit)}  # fmt: skip
        budget.append(row)
    batch, decode = report["workload"]["batch"], shown["decode"]
    rate = {**decode, "value": 1e3 * batch / decode["value"], "unit": "tokens/s", "basis": f"{batch} / decode",
            "low": 1e3 * batch / decode["high"], "high": 1e3 * batch / decode["low"]}  # fmt: skip
    verb = "meets" if chosen.status == "met" else "does not meet"
    headline = (
        f"{report['model']['name']} {verb} {', '.join(c.name + ' ' + c.asked for c in chosen.verdict.checks)} on "
        f"{measurement['machine']} (measured there), at {report['quality']['rise_percent']:+.1f} % perplexity"
        f"{'' if report['quality']['label'] == 'perplexity' else ' on its own text'}."
    )
    return {
        **report, "headline": headline, "status": chosen.status, "rests_on": measurement["rests_on"],
        "budget": budget, "measurement": measurement,
        "fitted": {**report["fitted"], "performance": shown},
        "tokens_per_second": {**report["tokens_per_second"], "fitted": rate},
        "warnings": [text for text in report["warnings"] if text != NOT_MEASURED] + list(performance.notes),
    }  # fmt: skip


def _figure(figure: Figure) -> dict[str, Any]:
    """A figure as the report holds it."""
    measured = isinstance(figure, Measured)
    return {
        "value": figure.value, "unit": figure.unit, "source": figure.source, "device": figure.device,
        "low": figure.low if measured else None, "high": figure.high if measured else None,
        "basis": None if measured else figure.basis,
    }  # fmt: skip


def _banner(report: dict[str, Any], measurement: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(row['name'])}</td><td class='{row['status']} n'><b>{html.escape(row['status'])}</b></td>"
        f"<td class='n'>{_text(row['name'], row['fitted']['value'])}</td>"
        f"<td class='n'>{_text(row['name'], row['limit'])}</td></tr>"
        for row in report["budget"]
        if row["name"] != "quality"
    )
    version = f"{measurement['engine']} {measurement['version']}"
    return (
        f"<section class='card'><h2>{html.escape(report['headline'])}</h2><p class='soft'>Measured "
        f"{html.escape(measurement['created'])} with {html.escape(version)}, rung {measurement['rung']}. The page "
        "below is from before; <code>edgeprune report BUNDLE</code> on the workstation draws it anew.</p>"
        f"<table><tr><th>constraint</th><th>verdict</th><th>measured</th><th>limit</th></tr>{rows}</table></section>"
    )


def _text(name: str, value: float) -> str:
    return format_bytes(value) if name == "memory" else format_ms(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{path} cannot be read", "Copy the whole bundle again, or fit it again with this version."
        ) from None


def summary(measurement: dict[str, Any]) -> list[str]:
    """The measurement in a few lines for a terminal."""
    lines = [f"{measurement['machine']}, {measurement['engine']} {measurement['version']}"]
    for rung in measurement["rungs"]:
        figures = "  ".join(f"{name} {_text(name, value)}" for name, value in rung["figures"].items())
        verdict = STATUS_TEXT.get(rung["status"], rung["status"])
        lines.append(f"rung {rung['index']}: {verdict}  {figures or rung['error']}")
    return lines


def _shown(stream: Any) -> Callable[[str, int, int], None]:
    """One line that is drawn over on a terminal, else one line for each stage."""
    last = ""

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal last
        share = f" {100 * done // total} %" if total else ""
        if stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            stream.write(f"\r{f'{stage}{share}'[:width]:{width}}")
        elif stage != last:
            stream.write(f"{stage}\n")
        last = stage
        stream.flush()

    return tell


def main() -> int:
    """finish.pyz: exit code 0 budget met, 2 bad input, 3 out of reach, 4 engine or device failed."""
    parser = argparse.ArgumentParser(prog="finish.pyz", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="default: the folder that finish.pyz is in")
    parser.add_argument("--json", action="store_true", help="print the measurement as one JSON document")
    given = parser.parse_args()
    program = Path(sys.argv[0]).resolve()
    sys.path[0] = str(program)  # the tasks' processes import from it too
    os.environ.setdefault("EDGEPRUNE_CACHE", str(Path.home() / ".cache" / "edgeprune-device"))
    try:
        bundle = given.bundle or program.parent
        measurement = finish(bundle, Here(), "this machine", _shown(sys.stderr))
    except EdgepruneError as error:
        sys.stderr.write(f"\nerror: {error.message}\n{error.remedy}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    sys.stderr.write("\n")
    sys.stdout.write((json.dumps(measurement, indent=2) if given.json else "\n".join(summary(measurement))) + "\n")
    return 0 if measurement["status"] == "met" else BudgetError.exit_code


if __name__ == "__main__":
    sys.exit(main())
