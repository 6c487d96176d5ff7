"""The documents that a measurement rests on, deployment.json and the rungs' reports, checked before any work.

This file also runs on the device: Python 3.10, standard library only. It measures nothing.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import checked, read_json, read_text
from edgeprune.ondevice.budget import CONSTRAINTS
from edgeprune.ondevice.bundle import OTHER_VERSION, REPORT, rung_folder, rungs_of
from edgeprune.ondevice.experience import Room
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.measure import Counted
from edgeprune.ondevice.runtimes import LLAMA_CPP, RUNTIMES
from edgeprune.precision import PRECISIONS

DEPLOYMENT = "deployment.json"
PAGE = "report.html"
_FIGURE = {
    "source": str,
    "value": float,
    "unit": str,
    "device": str,
    "basis": str | None,
    "low": float | None,
    "high": float | None,
}
_SIZES = {field.name: int for field in fields(Workload)}
_DEPLOYMENT = {
    "device": str,
    "engine": str,
    "sm": int | None,
    "precision": str,
    "older_graph": str,  # for a TensorRT before those that update the KV cache in place
    "workload": _SIZES,
    "limits": dict,
    "runtime": _FIGURE,
    "build_memory": int | None,
    "rungs": [
        {
            "graph": str,
            "counted": {field.name: int for field in fields(Counted)},
            "cache": str,
            "workspace_bytes": int | None,
            "build_bytes": int | None,
        }
    ],
}
_ROOM = {field.name: {"float": float, "int": int, "str": str}[field.type] for field in fields(Room)}
_REPORT = {
    ...: Any,
    "workload": _SIZES,
    "budget": [{"name": str, ...: Any}],
    "experience": {"fitted": {"room": _ROOM, ...: Any}, ...: Any},
    "fitted": dict,
    "tokens_per_second": dict,
    "quality": {"rise_percent": float | str, "label": str, "pictures": dict | None, ...: Any},
    "quality_status": str,
    "model": {"name": str, ...: Any},
    "warnings": [str],
    "files": dict,
}
_TEXTS = ("Infinity", "-Infinity", "NaN")  # that stand for numbers beyond floating point


def read_deployment(path: Path) -> dict[str, Any]:
    """Returns the content of a deployment.json. Raises InputError where it is not one of this version."""
    plan = checked(read_json(path, remedy=OTHER_VERSION), _DEPLOYMENT, str(path), OTHER_VERSION)
    for name, limit in plan["limits"].items():
        checked(limit, {"value": float, "asked": str}, f"{path}: limits.{name}", OTHER_VERSION)
    size = plan["workload"]
    wrong = {
        "engine": plan["engine"] not in RUNTIMES,
        "sm": plan["sm"] is None and plan["engine"] not in ("onnxruntime", LLAMA_CPP),
        "precision": plan["precision"] not in PRECISIONS,
        "graph": any(
            Path(name).name != name for name in (plan["older_graph"], *(rung["graph"] for rung in plan["rungs"]))
        ),
        "workload": min(size.values()) < 1 or size["prompt"] > size["context"],
        "limits": any(name not in CONSTRAINTS or limit["value"] <= 0 for name, limit in plan["limits"].items()),
        "runtime": plan["runtime"]["source"] not in ("measured", "built", "estimated"),
        "rungs": not plan["rungs"],
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise InputError(f"{path}: {name} is not one of this version", OTHER_VERSION)
    return plan


def check_documents(bundle: Path, plan: dict[str, Any]) -> None:
    """Raises InputError where a report of the bundle, or its page, cannot take a measurement of the plan's rungs."""
    rungs = rungs_of(bundle)
    if len(plan["rungs"]) > len(rungs):
        raise InputError(
            f"{bundle / DEPLOYMENT} knows {len(plan['rungs'])} rungs, the bundle holds {len(rungs)}", OTHER_VERSION
        )
    for folder in (bundle, *(rung_folder(bundle, index) for index in range(len(plan["rungs"])))):
        path = folder / REPORT
        report = checked(read_json(path, remedy=OTHER_VERSION), _REPORT, str(path), OTHER_VERSION)
        rise, room = report["quality"]["rise_percent"], report["experience"]["fitted"]["room"]
        if isinstance(rise, str) and rise not in _TEXTS:
            raise InputError(f"{path}: quality.rise_percent is not a number", OTHER_VERSION)
        if min(room["context_bytes"], room["sequence_bytes"]) < 0:
            raise InputError(f"{path}: experience.fitted.room has bytes below 0", OTHER_VERSION)
    read_text(bundle / PAGE, OTHER_VERSION)
