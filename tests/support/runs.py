"""One small run on the estimates of a Jetson, for all tests that need a real one: its setup, stages and results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from edgeprune.pipeline.flow import planner_of, search_budget
from edgeprune.pipeline.journal import Journal, open_journal
from edgeprune.pipeline.request import request_of
from edgeprune.pipeline.results import Fitted
from edgeprune.pipeline.setup import Setup, prepare
from edgeprune.pipeline.stages import Run
from edgeprune.progress import Silent
from edgeprune.search.planner import Planner
from edgeprune.search.solve import Allocation
from tests.support.checkpoints import save_llama
from tests.support.durations import durations

SHORT = durations(cross_check_seconds=0.1, warm_up_seconds=0.01, block_ms=2)
_homes: list[Path] = []  # one for all test files of a process


@contextmanager
def short_durations() -> Iterator[None]:
    """Meanwhile nothing is timed for long."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setenv(name, value)
        yield


def home(factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `notes.txt`; nobody changes it."""
    if not _homes:
        folder = factory.mktemp("small-run")
        sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
        more = {"num_hidden_layers": 2, "intermediate_size": 512, "max_position_embeddings": 128}
        save_llama(folder / "model", **sizes, **more, initializer_range=0.05)
        texts = (f"the quick brown fox jumps over {number} lazy dogs and runs away " * 4 for number in range(40))
        (folder / "notes.txt").write_text("\n\n".join(texts))
        _homes.append(folder)
    return _homes[0]


def options(home: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The options of a run that takes seconds."""
    return {
        "model": home / "model",
        "device": "jetson-orin",
        "memory": "90%",
        "calibration": home / "notes.txt",
        "samples": 4,
        "length": 24,
        "prompt": 8,
        "context": 32,
        "method": "magnitude",
        "output": output,
        **changes,
    }


def setup_of(home: Path, output: Path, **changes: Any) -> Setup:
    return prepare(request_of(**options(home, output, **changes)))


def journal_of(folder: Path) -> Journal:
    """The journal of a new run in that folder."""
    return open_journal(folder, {}, resume=False, force=False)


@dataclass(frozen=True)
class Finished:
    """A run after its search, before its bundle is written."""

    run: Run
    planner: Planner
    allocation: Allocation
    fitted: Fitted


def finished(factory: pytest.TempPathFactory) -> Finished:
    """The results of one run, which nobody changes."""
    return _finish(home(factory))


@cache
def _finish(folder: Path) -> Finished:
    setup = setup_of(folder, folder / "out")
    run = Run(setup, open_journal(folder / "out.work", setup.fingerprint, False, False), Silent())
    planner = planner_of(run)
    outcome, chosen, allocation = search_budget(run, planner, run.setup.budget)
    quality = run.evaluator.quality("0", chosen)
    gains = planner.gains(run.setup.budget.absolute(run.dense.performance).limits, allocation)
    with short_durations():
        cross_check = run.cross_check(chosen)
    fitted = Fitted(
        run.setup,
        run.samples,
        run.dense.performance,
        chosen,
        outcome,
        quality,
        cross_check,
        run.journal.seconds,
        gains,
        planner.latency,
    )
    run.journal.close()
    return Finished(run, planner, allocation, fitted)
