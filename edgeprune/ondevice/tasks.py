"""The tasks of a process on the device, one for each request: describe, build, check, measure, serve.

This file also runs on the device: Python 3.10, numpy and the engine's own modules. It does not know who asks. A
request names its work in `do`, its engine, and its files by their role: {"do": "build", "engine": "tensorrt",
"files": {"graph": PATH}, "outputs": {"plan": PATH}, ...}. `python -m edgeprune.ondevice.tasks` answers one.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeprune.ondevice import machine
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.runtimes import LLAMA_BENCH, LLAMA_CPP
from edgeprune.ondevice.worker import OnProgress, serve

SETTLED = 0.03  # relative half width of an interval beyond which a figure is measured again
MIN_RUNS = 100
_IN_PROCESS = {
    "onnxruntime": "edgeprune.ondevice.onnxruntime",
    LLAMA_CPP: "edgeprune.ondevice.llamacpp",
    LLAMA_BENCH: "edgeprune.ondevice.llama_bench",
}  # the engines that read a model's file, and the modules that measure it


def answer(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Answers one request. Raises EngineError, and KeyError for an unknown task, which is a bug of edgeprune."""
    return _WORK[request["do"]](request, on_progress)


def _describe(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    return machine.describe()


def _build(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    from edgeprune.cache import cache_folder
    from edgeprune.ondevice.tensorrt import Limits, compile_plan

    name = f"{request['engine']}-sm{request['sm'] or '-here'}.timings"
    limits = Limits(request["workspace_bytes"], cache_folder() / name)
    plan = Path(request["outputs"]["plan"])
    return asdict(
        compile_plan(
            Path(request["files"]["graph"]),
            plan,
            Workload(**request["workload"]),
            request["sm"],
            request["engine"],
            limits,
            on_progress,
        )
    )


def _check(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Compares the engine's logits with a reference, as `compare_logits` describes."""
    from edgeprune.ondevice.reference import compare_logits, read_reference

    ids, logits = read_reference(Path(request["files"]["reference"]))
    on_progress("check the engine's logits", 0, len(logits))
    if request["engine"] == "onnxruntime":
        from edgeprune.ondevice.onnxruntime import GraphRunner

        runner = GraphRunner(Path(request["files"]["graph"]), 1, ids.shape[1], exact=True)
        return compare_logits(runner, ids, logits, on_progress)
    if request["engine"] == LLAMA_CPP:
        from edgeprune.ondevice.llamacpp import LlamaRunner

        return compare_logits(LlamaRunner(Path(request["files"]["graph"]), ids.shape[1]), ids, logits, on_progress)
    from edgeprune.ondevice.tensorrt_runner import EngineRunner

    with EngineRunner(Path(request["files"]["plan"]), 1, ids.shape[1], request["engine"]) as runner:
        return compare_logits(runner, ids, logits, on_progress)


def _measure(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Measures the latency of models in turn by their files, or latency and memory of one engine on a GPU."""
    on_progress("measure", 0, 0)
    workload = Workload(**request["workload"])
    if request["engine"] not in _IN_PROCESS:
        return _measure_gpu(request, workload)
    files = {name: Path(path) for name, path in request["files"].items()}
    module = importlib.import_module(_IN_PROCESS[request["engine"]])
    latency = module.measure_latency(files, workload, request["seconds"])
    return {"device": machine.processor(), **latency, "conditions": machine.conditions()}


def _measure_gpu(request: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """Measures latency and memory of an engine; notes a figure that did not settle, and a replayed decode step."""
    from edgeprune.ondevice.tensorrt_runner import EngineRunner, Timed
    from edgeprune.ondevice.timing import described, interleave

    notes = []
    before = machine.used_memory()
    with EngineRunner(Path(request["files"]["plan"]), workload.batch, workload.context, request["engine"]) as runner:
        timed = Timed(runner, workload)
        latency: dict[str, Any] = {}
        # Time decode and prefill; a figure of a wide interval is measured a second time.
        for kind, prepare, least in (("decode", timed.prepare_decode, MIN_RUNS), ("prefill", timed.prepare_prefill, 0)):
            prepare()
            for _ in range(2):
                timings = interleave({"candidate": getattr(timed, kind)}, request["seconds"] / 2, min_runs=least)
                if timings.median("candidate").relative_half_width <= SETTLED:
                    break
            else:
                notes.append(f"{kind} did not settle in two measurements and is inconclusive: check clocks and load")
            latency[kind] = described(timings, ["candidate"])
        # Read the memory while the engine is open.
        memory = {"activations": runner.memory_bytes, "cache": runner.cache_bytes, "buffers": runner.buffer_bytes}
        gpu = asdict(runner.cuda.gpu)
        after = machine.used_memory()
    memory["used"] = None if before is None or after is None else after - before
    notes += [timed.note] if timed.note else []
    return {
        **latency,
        "memory": memory,
        "gpu": gpu,
        "device": gpu["name"],
        "notes": notes,
        "conditions": machine.conditions(),
    }


def _memory(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    on_progress("measure the memory", 0, 0)
    module = importlib.import_module(_IN_PROCESS[request["engine"]])
    return module.measure_memory(Path(request["files"]["candidate"]), Workload(**request["workload"]))


def _probe(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    from edgeprune.ondevice import probe_tasks

    return probe_tasks.answer(request, on_progress)


def _checkup(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    from edgeprune.ondevice import checkup

    return checkup.answer(request, on_progress)


def _serve(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    from edgeprune.ondevice import serve

    return serve.answer(request, on_progress)


_WORK = {
    "describe": _describe,
    "build": _build,
    "check": _check,
    "measure": _measure,
    "memory": _memory,
    "probe": _probe,
    "checkup": _checkup,
    "serve": _serve,
}


if __name__ == "__main__":
    sys.exit(serve(answer))
