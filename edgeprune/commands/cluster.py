"""A cluster of Ray: its nodes, and tasks that it starts again elsewhere where a node dies. It knows no fits.

Only this file imports Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import __version__
from edgeprune.errors import EngineError, InputError

if TYPE_CHECKING:
    from types import ModuleType

RETRIES = 5  # of a task whose worker or node died
STOP_SECONDS = 15.0  # for which an interrupted fleet waits until its tasks have ended
STORE_BYTES = 80 << 20  # of Ray's object store on a machine of its own: small documents alone pass through it
NODE_SECONDS = 60.0  # for a node's answer
CONNECT_SECONDS = 10.0  # for the head of a cluster
UNREACHABLE = "Start it with `ray start --head`, or leave --address out for this machine alone."


@dataclass(frozen=True)
class Stage:
    """The stage that a task is in, with steps done and steps in all (0: unknown)."""

    name: str
    done: int
    total: int

    def __str__(self) -> str:
        return f"{self.name}, {100 * self.done // self.total} %" if self.total else self.name


@dataclass(frozen=True)
class Task:
    """A call of a function that a worker can import, which is given `on_stage` too, and what it takes of its node.

    cpus: cores, None: all of a node; memory: bytes; gpu: whether it has a GPU to itself where the cluster has some.
    """

    call: Callable[..., Any]
    arguments: Mapping[str, Any]
    cpus: int | None
    memory: int
    gpu: bool = False


@dataclass(frozen=True)
class Ended:
    """A task that ended: what it returned, or why it could not be run to its end."""

    index: int
    result: Any = None
    reason: str | None = None


class _Board:
    """The stages of the tasks that run, in an actor beside the driver."""

    def __init__(self) -> None:
        self._stages: dict[int, tuple[str, int, int]] = {}

    def tell(self, index: int, stage: str, done: int, total: int) -> None:
        self._stages[index] = (stage, done, total)

    def stages(self) -> dict[int, tuple[str, int, int]]:
        return self._stages


class Cluster:
    """A connection to a cluster, or to a Ray of this machine's own. `with` ends it.

    address: `auto` or HOST:PORT of a cluster that runs; None: this machine. Raises InputError where Ray is not
    installed, and EngineError where the cluster does not answer.
    """

    def __init__(self, address: str | None) -> None:
        self._ray = _import_ray()
        if address not in (None, "auto"):
            _check_address(address)
        options: dict[str, Any] = {"address": address or "local"}
        if address is None:
            options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        try:
            self._ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # Ray's own errors share no base
            raise EngineError(f"Ray does not answer at {address or 'this machine'}: {error}", UNREACHABLE) from None
        self._here = self._ray.get_runtime_context().get_node_id()
        self._board = self._beside(self._ray.remote(num_cpus=0)(_Board)).remote()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def _beside(self, remote: Any, node: str | None = None) -> Any:
        """Returns a remote function or class that runs on a node alone; None: on the driver's."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node or self._here, soft=False))

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """Returns the nodes that are alive and have cores."""
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]

    def check(self, marker: Path) -> None:
        """Raises EngineError where a node has another edgeprune, or does not see a file that is there."""
        ask = self._ray.remote(num_cpus=0)(_described)
        for node in self.nodes:
            name = node["NodeName"]
            reference = self._beside(ask, node["NodeID"]).remote(str(marker))
            try:
                version, sees = self._ray.get(reference, timeout=NODE_SECONDS)
            except Exception as error:  # Ray's own errors share no base
                raise EngineError(
                    f"the node {name} cannot run edgeprune: {_reason(error)}", f"Install edgeprune {__version__} there."
                ) from None
            if version != __version__:
                raise EngineError(
                    f"the node {name} has edgeprune {version}, not {__version__}",
                    "Install the same version everywhere.",
                )
            if not sees:
                raise EngineError(
                    f"the node {name} does not see {marker.parent}",
                    "Name an --output on a file system that all nodes share.",
                )

    def run(self, tasks: Sequence[Task], poll_seconds: float) -> Iterator[tuple[list[Ended], dict[int, Stage]]]:
        """Runs tasks in their order as nodes have room; yields those that have ended since, and the stages of those
        that run, every so often.

        A task that no node has room for ends at once. Interrupted, it ends the tasks, and raises on.
        """
        references: dict[Any, int] = {}
        lost = []
        for index, task in enumerate(tasks):
            if reason := self._lack(task):
                lost.append(Ended(index, reason=reason))
            else:
                references[self._submit(index, task)] = index
        try:
            if lost:
                yield lost, {}
            while references:
                ready, _ = self._ray.wait(list(references), num_returns=1, timeout=poll_seconds)
                ended = [self._end(references.pop(reference), reference) for reference in ready]
                told = self._ray.get(self._board.stages.remote())
                running = set(references.values()) & told.keys()
                yield ended, {index: Stage(*told[index]) for index in sorted(running)}
        except BaseException:
            self._cancel(references)
            raise

    def _lack(self, task: Task) -> str | None:
        """Returns why no node can ever run a task, in words; None where one can."""
        most = max((node["Resources"].get("memory", 0.0) for node in self.nodes), default=0.0)
        if task.memory > most:
            return (
                f"it holds about {task.memory / 2**30:.1f} GiB in memory, the largest node has {most / 2**30:.1f} GiB"
            )
        return None

    def _submit(self, index: int, task: Task) -> Any:
        cores = [int(node["Resources"]["CPU"]) for node in self.nodes]
        gpus = any(node["Resources"].get("GPU") for node in self.nodes)
        options = {
            "num_cpus": max(cores) if task.cpus is None else min(task.cpus, max(cores)),
            "memory": task.memory,
            "max_retries": RETRIES,
            "max_calls": 1,  # a process of its own, whose memory goes with it
            "num_gpus": 1 if task.gpu and gpus else 0,
        }
        return self._ray.remote(**options)(_run).remote(self._board, index, task.call, dict(task.arguments))

    def _end(self, index: int, reference: Any) -> Ended:
        try:
            return Ended(index, self._ray.get(reference))
        except Exception as error:  # Ray's own errors share no base
            return Ended(index, reason=_reason(error))

    def _cancel(self, references: Mapping[Any, int]) -> None:
        """Interrupts tasks, and waits for a while until they have left everything as --resume finds it."""
        for reference in references:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=False)
        end = time.monotonic() + STOP_SECONDS
        with contextlib.suppress(Exception):
            self._ray.wait(list(references), num_returns=len(references), timeout=max(0.0, end - time.monotonic()))


def _run(board: Any, index: int, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a task's function in a worker."""

    def on_stage(stage: str, done: int, total: int) -> None:
        board.tell.remote(index, stage, done, total)

    on_stage("begins", 0, 0)
    return call(**arguments, on_stage=on_stage)


def _described(marker: str) -> tuple[str, bool]:
    """Returns a node's version of edgeprune, and whether it sees a file."""
    import edgeprune

    return edgeprune.__version__, Path(marker).exists()


def _reason(error: Exception) -> str:
    """Returns the last line of an error of Ray's, which ends a traceback of a worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _check_address(address: str) -> None:
    """Raises InputError for an address of another form, and EngineError where nobody listens: Ray itself would try for
    minutes, and end the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or "/" in host:
        raise InputError(f"--address {address!r} is not auto or HOST:PORT", "Give what `ray start --head` prints.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise EngineError(f"Ray does not answer at {address}: {error.strerror or error}", UNREACHABLE) from None


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task without a GPU of its own may look at one
    try:
        import ray
    except ImportError:
        raise InputError("a fleet runs on Ray, which is not installed", 'pip install "edgeprune[fleet]"') from None
    return ray
