"""A double of this machine's clock: a graph takes as long as its bytes say, however busy the machine is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.engine.answers import ThisMachine

MS_PER_BYTE = 1e-5


@contextlib.contextmanager
def steady_clock() -> Iterator[None]:
    """Replaces the times in the answers of ONNX Runtime's measurements in this process; the graphs run all the same."""
    run = ThisMachine.run

    def steady(machine: ThisMachine, request: dict[str, Any], *rest: Any) -> dict[str, Any]:
        answer = run(machine, request, *rest)
        if request["do"] != "measure":
            return answer
        times = {name: MS_PER_BYTE * _bytes_of(Path(path).parent) for name, path in request["files"].items()}
        first = next(iter(times.values()))
        for kind in ("prefill", "decode"):
            for name, figures in answer[kind].items():
                figures["median"] = _exactly(times[name])
                if "ratio" in figures:
                    figures["ratio"] = _exactly(times[name] / first)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThisMachine, "run", steady)
        yield


def _bytes_of(graphs: Path) -> int:
    return sum(file.stat().st_size for file in graphs.iterdir() if file.is_file())


def _exactly(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}
