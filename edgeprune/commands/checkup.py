"""checkup(): every part of the way to a figure on a device, checked in about two minutes; `doctor --deep` prints it."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.engine.answers import ThisMachine
from edgeprune.engine.build_memory import build_memory
from edgeprune.engine.checkup import Checkup, check_device
from edgeprune.engine.checkup_room import Need
from edgeprune.engine.estimate import estimate_memory
from edgeprune.engine.onnx.graph import graph_weight_bytes
from edgeprune.engine.probe import with_figures
from edgeprune.engine.remote import target_of
from edgeprune.files import at_home
from edgeprune.model.load import load_outline
from edgeprune.ondevice.budget import format_bytes, parse_size
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.measure import Session
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.profiles import DeviceProfile, profile_of
from edgeprune.progress import OnProgress, Progress, progress_of

ENGINES = 2  # on the disk at most, beside the graphs: one more than is kept, while it is built
HOMES = re.compile(r"(?:/home/|/Users/)[^/\s'\"]+|/root(?=[/\s'\"]|$)")


def checkup(
    *,
    target: str | None = None,
    device: str | None = None,
    profile: str | Path | None = None,
    model: str | None = None,
    progress: Progress | OnProgress | None = None,
) -> Checkup:
    """Checks this machine, or a device behind ssh, with a small model that is made here.

    device, profile: to check against; by default that of the GPU that is found. model: a config.json or a model as of
    fit, or a size such as 6GiB, that is to run there. Raises InputError for an argument; all else is an outcome.
    """
    # What was asked for is read before anything is sent.
    there = target_of(target, False)
    named = None
    if device is not None or profile is not None:
        named = profile_of(device, None if profile is None else Path(at_home(profile)))
    need_of = None if model is None else _need_of(model)
    shown = progress_of(progress)
    shown.note("duration: about two minutes; every check has a limit of its own")
    session: Session = there or ThisMachine()
    where = str(there) if there else "this machine"
    return check_device(session, where, there is not None, named, need_of, shown.track)


def _need_of(model: str) -> Callable[[DeviceProfile], Need]:
    """Returns what a model needs on a device, by its profile. Raises InputError for what is neither model nor size."""
    if re.match(r"[\d.]", model) and not Path(model).exists():
        size = parse_size(model)
        return lambda profile: Need(f"a model of {format_bytes(size)}", size, _copies(profile) * size)
    name, decoder, _ = load_outline(model)

    def need(profile: DeviceProfile) -> Need:
        """Returns the need of the dense model in the profile's precision, at its workload: what a fit runs first."""
        measured, precision = with_figures(profile), profile.precision
        default, positions = profile.workload, decoder.max_position_embeddings
        context = min(default.context, positions)
        workload = Workload(default.batch, max(1, min(default.prompt, context - 1)), context)
        weights = graph_weight_bytes(decoder, precision, profile.dialect, context)
        running = estimate_memory(decoder, measured, workload, precision).total
        building = build_memory(decoder, measured, workload, precision).total
        return Need(f"{name} in {precision}, context {context}", running, _copies(profile) * weights, building)

    return need


def _copies(profile: DeviceProfile) -> int:
    """Returns how often the weights are on the disk at most: ONNX Runtime runs the graphs themselves."""
    return 1 + ENGINES * RUNTIMES[profile.engine].on_gpu


def as_json(checkup: Checkup) -> dict[str, Any]:
    """Returns a checkup for a report of a bug: no names of users, and of the device none but what --target gave."""
    described = checkup.description
    document = {
        "edgeprune": __version__,
        "python": platform.python_version(),
        "where": _host(checkup.where),
        "profile": checkup.profile,
        "engine": checkup.engine,
        "device": described,
        "seconds": checkup.seconds,
        "passed": checkup.count("passed"),
        "failed": checkup.count("failed"),
        "not_applicable": checkup.count("not applicable"),
        "checks": [check.as_json() for check in checkup.checks],
    }
    return _without_names(document, checkup.where)


def _host(where: str) -> str:
    """Returns an address without its user."""
    return re.sub(r"^(ssh://)[^@]*@", r"\1", where)


def _without_names(value: Any, where: str) -> Any:
    """Returns a document in whose texts homes are `~` and the address has no user."""
    if isinstance(value, str):
        return HOMES.sub("~", value.replace(where, _host(where)))
    if isinstance(value, list):
        return [_without_names(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _without_names(item, where) for key, item in value.items()}
    return value
