"""The tasks of `doctor --deep` on the device: each looks at one part of the way from a graph to a figure.

This file also runs on the device: Python 3.10, numpy and the engine's own modules. It judges nothing: what it returns
is read on the workstation, which knows what the device should be. Each task is a process of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.cache import cache_folder
from edgeprune.ondevice import machine
from edgeprune.ondevice.worker import OnProgress

if TYPE_CHECKING:
    import numpy as np

    from edgeprune.ondevice.tensorrt_runner import EngineRunner

PAST = 32  # tokens in the cache before a step that is looked at
TOKENS = (1, 2)  # of two such steps
STEPS, MANY = 20, 8  # steps that are timed one by one, and steps that are timed together
BALLAST = 128 * 2**20  # bytes that the device must miss when they are allocated


def answer(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Answers one request. Raises EngineError."""
    on_progress(f"look at the {request['step']}", 0, 0)
    on_gpu = request["engine"] != "onnxruntime"
    return _STEPS[request["step"]][on_gpu](request)


def _state(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the free bytes of the disk and of the GPU (None: unknown), and power mode, clocks and temperatures."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    return {
        "folder": str(folder),
        "free": shutil.disk_usage(folder).free,
        "gpu_free": _gpu_free(),
        "conditions": machine.conditions(),
    }


def _gpu_free() -> int | None:
    """Returns the free bytes of a GPU with a memory of its own; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(result.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _cache_of_graph(request: dict[str, Any]) -> dict[str, Any]:
    """Counts the buffers of ONNX Runtime's KV cache, those that a step wrote to, and those that it left as they were
    before its own place."""
    import numpy as np

    from edgeprune.ondevice.onnxruntime import GraphRunner

    runner = GraphRunner(Path(request["files"]["graph"]), 1, 2 * PAST)
    runner.run(np.arange(PAST)[None] % runner.vocab_size)
    before = [buffer.copy() for buffer in runner.buffers]  # (1, num_key_value_heads, capacity, head_dim)
    runner.run(np.full((1, 1), TOKENS[0]))
    pairs = list(zip(before, runner.buffers, strict=True))
    return {
        "buffers": len(pairs),
        "written": sum(bool((old[:, :, PAST] != new[:, :, PAST]).any()) for old, new in pairs),
        "kept": sum(bool((old[:, :, :PAST] == new[:, :, :PAST]).all()) for old, new in pairs),
    }


def _clock_of_processor(request: dict[str, Any]) -> dict[str, Any]:
    """Times steps in ONNX Runtime, as `_clocked` describes."""
    import numpy as np

    from edgeprune.ondevice.onnxruntime import GraphRunner
    from edgeprune.ondevice.timing import stopwatch

    runner = GraphRunner(Path(request["files"]["graph"]), 1, 2 * PAST)

    def step() -> None:
        runner.reset(PAST)
        runner.run(np.full((1, 1), TOKENS[0]))

    return _clocked(step, lambda work: stopwatch(work)())


def _clock_of_gpu(request: dict[str, Any]) -> dict[str, Any]:
    """Times steps by the GPU's events, as `_clocked` describes."""
    with _engine(request) as runner:
        stage(runner, TOKENS[0])
        return _clocked(runner.step, lambda work: runner.cuda.time_ms(work)[0])


def _clocked(step: Callable[[], None], time_ms: Callable[[Callable[[], None]], float]) -> dict[str, Any]:
    """Returns the median, the least and the sum of the ms of single steps, the ms of MANY steps that were timed
    together, and the ms that passed on the host's clock from before the first to after the last of the single ones."""
    import numpy as np

    def several() -> None:
        for _ in range(MANY):
            step()

    for _ in range(3):
        time_ms(step)
    start = time.perf_counter()
    times = [time_ms(step) for _ in range(STEPS)]
    host_ms = 1e3 * (time.perf_counter() - start)
    together = float(np.median([time_ms(several) for _ in range(3)]))
    return {"one": float(np.median(times)), "least": min(times), "sum": sum(times), "many": together, "host": host_ms}


def _capture(request: dict[str, Any]) -> dict[str, Any]:
    """Captures a step as a CUDA graph and replays it on other inputs.

    Returns whether it could be captured, the CUDA layer, and the largest difference of the replay's logits from those
    of the same step without a graph, relative to the largest logit; None where there is no replay.
    """
    import numpy as np

    with _engine(request) as runner:
        # The logits of both tokens, step by step.
        expected = []
        for token in TOKENS:
            stage(runner, token)
            runner.step()
            expected.append(runner.last_logits())
        # A step that was captured for one token and is replayed for the other.
        replay = runner.cuda.capture(runner.step)
        error = None
        if replay is not None:
            stage(runner, TOKENS[0])
            replay()
            found, wanted = runner.last_logits().astype(np.float64), expected[0].astype(np.float64)
            error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        return {
            "captured": replay is not None,
            "layer": runner.cuda.gpu.layer,
            "error": error if error is None or np.isfinite(error) else 1e300,
        }


def _memory(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the bytes in use on the device before an engine is opened and after (None: unknown), and the parts: what
    the engine asks for, what was allocated, and a ballast that any reading of the memory must see."""
    import numpy as np

    before = machine.used_memory()
    with _engine(request) as runner:
        runner.cuda.allocate(BALLAST)
        runner.run(np.full((1, 1), TOKENS[0]))
        after = machine.used_memory()
        return {
            "before": before,
            "after": after,
            "activations": int(runner.memory_bytes),
            "cache": runner.cache_bytes,
            "buffers": runner.buffer_bytes,
            "ballast": BALLAST,
        }


def _engine(request: dict[str, Any]) -> AbstractContextManager[EngineRunner]:
    """Opens the request's engine. Raises EngineError."""
    from edgeprune.ondevice.tensorrt_runner import EngineRunner

    return EngineRunner(Path(request["files"]["plan"]), 1, 2 * PAST, request["engine"])


def stage(runner: EngineRunner, token: int) -> None:
    """Stages a step of one token after PAST others, whatever the cache holds of them."""
    import numpy as np

    runner.reset(PAST)
    ids: np.ndarray = np.full((1, 1), token, np.int64)
    runner.stage(ids, np.full((1, 1), PAST, np.int64), np.ones((1, PAST + 1), np.int64), np.full(1, PAST))


_STEPS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]] | None, ...]] = {
    # step: (on the processor, on the GPU)
    "state": (_state, _state),
    "cache": (_cache_of_graph, None),
    "clock": (_clock_of_processor, _clock_of_gpu),
    "capture": (None, _capture),
    "memory": (None, _memory),
}
