"""Measurement of a bundle on its device: build, check, measure and judge; the largest rung within the budget is kept.

`python3 finish.pyz` in the bundle's folder does it on the device, where only what the engine needs is installed;
`edgeprune measure` does the same from the workstation. This file runs on both: Python 3.10, standard library only.
It knows deployment.json and the files of the rungs, no model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.dialects import is_in_place, reason_of
from edgeprune.errors import BadAnswer, BudgetError, EdgepruneError, EngineError, InputError, Unreachable, WrongEngine
from edgeprune.files import read_json
from edgeprune.ondevice import llama_tools, measure
from edgeprune.ondevice.budget import STATUS_TEXT, Budget, Limit, judge, memory_total
from edgeprune.ondevice.build_room import build_room, check_build, workspace_within
from edgeprune.ondevice.bundle import (
    MEASUREMENT,
    OTHER_VERSION,
    REPORT,
    check_files,
    linked_folders,
    open_bundle,
    open_chosen,
    rung_folder,
)
from edgeprune.ondevice.documents import DEPLOYMENT, PAGE, check_documents, read_deployment
from edgeprune.ondevice.figures import Performance, Workload, figure_from_json, performance_to_json
from edgeprune.ondevice.finish_report import BANNER, MeasuredRung, banner, limit_text, merged
from edgeprune.ondevice.lines import one_line
from edgeprune.ondevice.llamacpp import MODEL_FILE
from edgeprune.ondevice.measure import Counted, LocalSession, Session
from edgeprune.ondevice.renewal import STAGED, put_into_place, renewing
from edgeprune.ondevice.runtimes import IN_PROCESS, LLAMA_BENCH, LLAMA_CPP, RUNTIMES, preferred
from edgeprune.ondevice.worker import OnProgress


def finish(
    bundle: Path, session: Session, where: str, on_progress: OnProgress, check: Callable[[str], object] = json.loads
) -> dict[str, Any]:
    """Builds and measures the bundle's rungs, the largest first, until one meets the budget; writes the measurement.

    where: the device in words; check: raises ValueError where the text of the new report.json is not a report. Returns
    the measurement as it stands in measurement.json. Raises InputError where the folder is not a bundle, EngineError
    where nothing could be built, an engine computes wrongly or a figure cannot be; the bundle is then as it was.
    """
    open_chosen(bundle)
    with renewing(bundle) as staged:
        # Measure rungs until one meets the budget; otherwise the smallest that could be measured is chosen.
        plan = read_deployment(bundle / DEPLOYMENT)
        check_documents(bundle, plan)
        engine, facts = _engine(plan, session, where, on_progress)
        plan |= {"where": where, "room": build_room(facts["memory"], plan["build_memory"])}
        plan |= _graphs(plan, engine, facts)
        tried = _try_rungs(bundle, plan, engine, session, on_progress)
        chosen = [rung for rung in tried if rung.performance is not None][-1]
        # Write all new files aside, then move them into place.
        measurement = _measurement(tried, chosen, engine, facts, where)
        try:
            _write(staged, bundle, measurement, chosen, check)
            put_into_place(bundle)
        except OSError as error:
            raise EngineError(
                f"the bundle {bundle} cannot be written: {error.strerror}", "Free some space there and run it again."
            ) from None
    return measurement


def _try_rungs(
    bundle: Path, plan: dict[str, Any], engine: str, session: Session, on_progress: OnProgress
) -> list[MeasuredRung]:
    """Returns the rungs that were tried, largest first, up to the first that meets the budget.

    plan: also the device in words, and the bytes that a build may take there (`room`; None: unknown).
    At least one of them was measured. Raises EngineError otherwise, and at once where an engine computes wrongly, or
    the device cannot be reached or believed.
    """
    budget = Budget(**{name: Limit(limit["value"], False, limit["asked"]) for name, limit in plan["limits"].items()})
    tried: list[MeasuredRung] = []
    # A rung that cannot be built, perhaps for lack of memory, is followed by a smaller one.
    for index in range(len(plan["rungs"])):
        try:
            performance = _perform(bundle, index, plan, engine, session, on_progress)
        except (WrongEngine, Unreachable, BadAnswer):
            raise
        except EngineError as error:
            tried.append(MeasuredRung(index, "failed", None, None, error.message))
            if index == len(plan["rungs"]) - 1 and not any(rung.performance for rung in tried):
                raise
            continue
        # The limits are absolute: the rung stands for the dense model, which is not measured.
        verdict = judge(budget, performance, performance)
        tried.append(MeasuredRung(index, verdict.status, performance, verdict))
        if verdict.met:
            break
    return tried


def _engine(plan: dict[str, Any], session: Session, where: str, on_progress: OnProgress) -> tuple[str, dict[str, Any]]:
    """Returns the engine that the device has for this bundle, and the facts about the device.

    Raises EngineError with the command that installs a missing module, or where the GPU is not the bundle's.
    """
    facts = measure.describe(session, on_progress)
    modules = facts["modules"]
    # ONNX Runtime needs no GPU.
    if plan["engine"] == "onnxruntime":
        if missing := [name for name in ("numpy", "onnxruntime") if modules[name] is None]:
            raise EngineError(_lacks(where, missing, facts), f"pip install {' '.join(missing)}")
        return "onnxruntime", facts
    if plan["engine"] == LLAMA_CPP:
        if (refusal := llama_tools.refusal_of(facts, plan["sm"])) is not None:
            raise InputError(f"{where} cannot measure with llama.cpp: {refusal}", llama_tools.REMEDY)
        return llama_tools.tool_of(facts, plan["sm"])[0], facts
    # A GPU's bundle takes the bundle's engine, or another one for GPUs.
    order = preferred(plan["engine"])
    engine = next((name for name in order if modules[RUNTIMES[name].module]), None)
    if engine is None or modules["numpy"] is None:
        missing = "numpy" if modules["numpy"] is None else RUNTIMES[order[0]].module
        raise EngineError(
            _lacks(where, [missing], facts),
            "JetPack brings tensorrt and numpy (sudo apt install python3-libnvinfer python3-numpy); elsewhere: "
            f"pip install {missing.replace('_', '-')}",
        )
    # The GPU must be there, and of the compute capability that the bundle is for.
    if facts["gpu"] is None:
        raise EngineError(f"{where}: {facts['no_gpu']}", "Run it on the device, with cuda-python or pycuda installed.")
    if facts["gpu"]["sm"] != plan["sm"]:
        raise EngineError(
            f"{where} has a {facts['gpu']['name']} of SM {facts['gpu']['sm']}, but the bundle is for SM {plan['sm']}",
            "Fit for this device: `edgeprune fit --device NAME` with its profile.",
        )
    return engine, facts


def _graphs(plan: dict[str, Any], engine: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the `rungs` with the graphs that the device's release takes, and a `note` where the fit had others."""
    older = plan["older_graph"]
    others = dict.fromkeys(rung["graph"] for rung in plan["rungs"] if rung["graph"] != older)
    if engine != "tensorrt" or is_in_place(version := _version(engine, facts)) or not others:
        return {"note": ""}
    reason = reason_of("primitive", engine, version, plan["precision"])
    note = f"{reason}; built from {older}, not from {' and '.join(others)}"
    if any(rung["cache"] != "float" for rung in plan["rungs"]):
        note += ", so its KV cache is of floats"
    return {"rungs": [rung | {"graph": older} for rung in plan["rungs"]], "note": note}


def _lacks(where: str, modules: list[str], facts: dict[str, Any]) -> str:
    """Returns which modules are missing, in words; of modules that are there and do not load, the reason."""
    broken = [reason for name in modules if not (reason := facts["missing"][name]).startswith("ModuleNotFoundError")]
    names = " and ".join(modules)
    return f"{where} cannot load {names}: {'; '.join(broken)}" if broken else f"{where} has no Python module {names}"


def _perform(
    bundle: Path, index: int, plan: dict[str, Any], engine: str, session: Session, on_progress: OnProgress
) -> Performance:
    """Builds, checks and measures one rung; its engine is written into the staged folder. Raises EngineError."""
    rung, workload = plan["rungs"][index], Workload(**plan["workload"])
    staged, folder = rung_folder(bundle / STAGED, index), rung_folder(bundle, index)
    graph, reference = folder / "onnx" / rung["graph"], folder / "reference.npz"
    if plan["engine"] == LLAMA_CPP:
        graph = folder / "engine" / MODEL_FILE
    check_files(bundle, open_bundle(bundle), (graph.parent, reference))

    def on_rung_progress(stage: str, done: int, total: int) -> None:
        on_progress(f"rung {index}: {stage}" if len(plan["rungs"]) > 1 else stage, done, total)

    # ONNX Runtime runs the graph itself, llama.cpp its file, a GPU an engine that is built first.
    if engine in (*IN_PROCESS, LLAMA_BENCH):
        has_logits = engine != LLAMA_BENCH
        performance = measure.in_process(
            session,
            engine,
            None,
            graph,
            workload,
            Counted(**rung["counted"]),
            on_rung_progress,
            reference if has_logits else None,
            plan["precision"],
        )
        notes = () if has_logits else ("llama-bench gives no logits: they were checked where the bundle was made",)
        return replace(performance, notes=(*performance.notes, *notes))
    needed, workspace = rung["build_bytes"], rung["workspace_bytes"]
    if needed is not None:
        check_build(needed, plan["room"], plan["where"], f"the engine of rung {index}")
    if None not in (needed, workspace, plan["build_memory"]):
        workspace = workspace_within(workspace, needed, plan["room"])
    path = staged / "engine" / f"model.sm{plan['sm']}.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    built = measure.build(session, engine, graph, path, workload, on_rung_progress, workspace_bytes=workspace)
    runtime = figure_from_json(plan["runtime"])
    performance = measure.on_tensorrt(
        session, engine, path, built, workload, runtime, reference, plan["precision"], on_rung_progress
    )
    return replace(performance, notes=(*performance.notes, *filter(None, [plan["note"]])))


def _measurement(
    tried: list[MeasuredRung], chosen: MeasuredRung, engine: str, facts: dict[str, Any], where: str
) -> dict[str, Any]:
    """Returns the document of measurement.json."""
    # The chosen rung and the device come first, then every rung that was tried.
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "where": where,
        "machine": facts["machine"],
        "gpu": (facts["gpu"] or {}).get("name"),
        "engine": engine,
        "version": _version(engine, facts),
        "rung": chosen.index,
        "status": chosen.status,
        "rests_on": chosen.verdict.source,
        "rungs": [
            {
                "index": rung.index,
                "status": rung.status,
                "error": rung.error,
                "figures": {} if rung.performance is None else rung.performance.values,
                "sources": {} if rung.performance is None else _sources(rung.performance),
            }
            for rung in tried
        ],
        "performance": performance_to_json(chosen.performance),
    }


def _version(engine: str, facts: dict[str, Any]) -> str:
    return facts["llama_bench"]["release"] if engine == LLAMA_BENCH else facts["modules"][RUNTIMES[engine].module]


def _sources(performance: Performance) -> dict[str, str]:
    return {
        "memory": memory_total(performance).source,
        "prefill": performance.prefill.source,
        "decode": performance.decode.source,
    }


def _write(
    staged: Path, bundle: Path, measurement: dict[str, Any], chosen: MeasuredRung, check: Callable[[str], object]
) -> None:
    """Writes the new documents aside: measurement.json, the report with it, the page with a banner.

    Raises BadAnswer where the report with the measurement is not one.
    """
    # The report of the chosen rung, with a warning where links of the bundle's top became folders.
    report = merged(_read(bundle / "rungs" / str(chosen.index) / REPORT), measurement, chosen)
    if copies := _other_copies(bundle, chosen.index):
        report["warnings"].append(
            f"{', '.join(copies)} at the bundle's top became folders when it was copied and hold another rung: "
            f"use those in rungs/{chosen.index}."
        )
    # The page, with a banner above what it holds.
    page = (bundle / PAGE).read_text(encoding="utf-8")
    begin, end = (page.find(mark) for mark in BANNER)
    if 0 <= begin < end:
        page = page[: begin + len(BANNER[0])] + banner(report, measurement) + page[end:]
    # Write measurement, report and page beside the engines that were built.
    (staged / MEASUREMENT).write_text(_json_text(measurement), encoding="utf-8")
    written = (path for path in sorted(staged.rglob("*")) if path.is_file())
    sizes = {str(path.relative_to(staged)): path.stat().st_size for path in written}
    report["files"] = {**_read(bundle / REPORT)["files"], **sizes}
    report_text = _json_text(report)
    try:
        check(report_text)
    except ValueError as error:
        raise _no_report(one_line(error)) from None
    (staged / REPORT).write_text(report_text, encoding="utf-8")
    (staged / PAGE).write_text(page, encoding="utf-8")


def _json_text(document: dict[str, Any]) -> str:
    """Returns a document as strict JSON. Raises BadAnswer where a number in it is not finite."""
    try:
        return json.dumps(document, indent=2, allow_nan=False) + "\n"
    except ValueError:
        raise _no_report("a figure is not finite") from None


def _no_report(reason: str) -> BadAnswer:
    return BadAnswer(
        f"the report with what was measured would not be valid: {reason}",
        "The bundle is as it was. Measure again; if it persists, fit the bundle again with this version.",
    )


def _other_copies(bundle: Path, index: int) -> list[str]:
    """Returns the links at the bundle's top that became folders in a copy and hold another rung's files."""

    def file_sizes(folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.is_dir() else {}

    return [
        name
        for name in linked_folders(bundle, index)
        if file_sizes(bundle / name)
        and not (bundle / name).is_symlink()
        and file_sizes(bundle / name) != file_sizes(bundle / "rungs" / str(index) / name)
    ]


def _read(path: Path) -> dict[str, Any]:
    """Returns a JSON document of the bundle. Raises InputError where it cannot be read."""
    return read_json(path, remedy=OTHER_VERSION)


def summary(measurement: dict[str, Any]) -> list[str]:
    """Returns the measurement in a few lines for a terminal."""
    lines = [f"{measurement['machine']}, {measurement['engine']} {measurement['version']}"]
    for rung in measurement["rungs"]:
        figures = "  ".join(
            f"{name} {limit_text(name, value)} {rung['sources'][name]}" for name, value in rung["figures"].items()
        )
        verdict = STATUS_TEXT.get(rung["status"], rung["status"])
        lines.append(f"rung {rung['index']}: {verdict}  {figures or rung['error']}")
    return lines


def _shown(stream: Any) -> Callable[[str, int, int], None]:
    """Returns a progress callback that rewrites one line on a terminal, and else writes one line for each stage."""
    last = ""

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        share = f" {100 * done // total} %" if total else ""
        if stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            stream.write(f"\r{f'{stage}{share}'[:width]:{width}}")
        elif stage != last:
            stream.write(f"{stage}\n")
        last = stage
        stream.flush()

    return on_progress


def main() -> int:
    """Runs finish.pyz. Returns 0 for a budget met, 2 for bad input, 3 for out of reach, 4 for a failure of the engine.

    130: the user interrupted it.
    """
    # Read the command line; tasks find the modules in the archive, and the cache is the device's.
    parser = argparse.ArgumentParser(prog="finish.pyz", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="default: the folder that finish.pyz is in")
    parser.add_argument("--json", action="store_true", help="print the measurement as one JSON document")
    options = parser.parse_args()
    program = Path(sys.argv[0]).resolve()
    sys.path[0] = str(program)  # from which the processes of the tasks import as well
    cache = os.path.expanduser("~/.cache/edgeprune-device")  # noqa: PTH111 (Path's own raises for a user without a home)
    if os.path.isabs(cache):  # noqa: PTH117 (a text)
        os.environ.setdefault("EDGEPRUNE_CACHE", cache)
    # Measure the bundle on this machine.
    try:
        bundle = options.bundle or program.parent
        measurement = finish(bundle, LocalSession(), "this machine", _shown(sys.stderr))
    except EdgepruneError as error:
        sys.stderr.write(f"\nerror: {error.message}\n{error.remedy}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    # Print the measurement; the quality limit counts as well.
    sys.stderr.write("\n")
    text = json.dumps(measurement, indent=2) if options.json else "\n".join(summary(measurement))
    try:
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except (AttributeError, OSError) as error:  # closed, full, or nobody reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr.write(f"cannot write standard output: {error}; the measurement is in {bundle / MEASUREMENT}\n")
    met = measurement["status"] == _read(bundle / REPORT)["quality_status"] == "met"
    return 0 if met else BudgetError.exit_code


if __name__ == "__main__":
    sys.exit(main())
