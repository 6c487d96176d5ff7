"""A device profile with the figures that are measured on the device, which may be this machine.

    python tools/probe_profile.py --output device.toml
    python tools/probe_profile.py --target ssh://user@jetson --output device.toml
    edgeprune fit MODEL --profile device.toml --target ssh://user@jetson

Small graphs are timed there by the engine that will run the model: weights in no cache times one row for the
bandwidth, a large product for the compute rate, one small node for the overhead of a call. What cannot be
measured (budget, workload, precision, dialect, channel multiple) comes from edgeprune's profile of the nearest
device, and the file names it. Close what else runs on the device; set its power mode as it will be used.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeprune.engine.answers import ThisMachine
from edgeprune.engine.choose import NAMES
from edgeprune.engine.probe import Probed, probe_gpu, probe_processor
from edgeprune.engine.remote import Device, Target
from edgeprune.errors import EdgepruneError, EngineError, InputError
from edgeprune.ondevice import measure
from edgeprune.ondevice.measure import Session
from edgeprune.ondevice.runtimes import GPU_RUNTIMES, RUNTIMES
from edgeprune.ondevice.worker import OnProgress
from edgeprune.profiles import DeviceProfile, list_profiles, load_profile, profile_toml

TAKEN = "budget, workload, precision, dialect and channel_multiple"
PROCESSOR = "cpu"


@dataclass(frozen=True)
class Choice:
    """The engine to probe with and its reason.

    flavour: name of the engine; device: the machine in words; gpu: facts of the GPU, None for a processor.
    """

    flavour: str
    device: str
    gpu: dict[str, Any] | None
    reason: str


def choose(asked: str, facts: dict[str, Any], where: str) -> Choice:
    """Returns the engine to probe with, of those that the device has.

    asked: an engine's name or `auto`; facts: of the device, as measure.describe returns them; where: the device's
    name in messages. Raises EngineError with what to install.
    """
    gpu, modules = facts["gpu"], facts["modules"]
    if modules["numpy"] is None:
        raise EngineError(f"{where} has no numpy", "Install it there: python3 -m pip install numpy")
    flavours = [name for name in GPU_RUNTIMES if modules[RUNTIMES[name].module]]
    if asked == "onnxruntime" or (asked == "auto" and (gpu is None or not flavours)):
        if modules["onnxruntime"] is None:
            raise EngineError(
                f"{where} has no Python module onnxruntime", "Install it there: python3 -m pip install onnxruntime"
            )
        reason = "asked for"
        if asked == "auto":
            reason = f"no GPU can be used: {facts['no_gpu']}" if gpu is None else "there is a GPU, but no TensorRT"
        return Choice("onnxruntime", facts["processor"], None, reason)
    if asked != "auto" and asked not in flavours:
        runtime = RUNTIMES[asked]
        raise EngineError(
            f"{where} has no Python module {runtime.module}", f"Install it there: {runtime.install_there}."
        )
    if gpu is None:
        raise EngineError(
            f"{where}: {facts['no_gpu']}",
            "Install cuda-python or pycuda there, and check the driver; or probe the "
            "processor with --engine onnxruntime.",
        )
    flavour = flavours[0] if asked == "auto" else asked
    board = facts["machine"] != facts["processor"]  # a Jetson names its board
    reason = "asked for" if asked != "auto" else f"it has a {gpu['name']} and {flavour}"
    return Choice(flavour, facts["machine"] if board else gpu["name"], gpu, reason)


def nearest(choice: Choice) -> tuple[DeviceProfile, str]:
    """Returns edgeprune's profile whose defaults suit the device best, and why: by SM, then memory, then the name."""
    if choice.gpu is None:
        return load_profile(PROCESSOR), "the processor's profile"
    sm, memory = choice.gpu["sm"], choice.gpu["memory"]

    def distance(profile: DeviceProfile) -> tuple[float, ...]:
        # A driver reports up to a tenth less than what is sold: that is no difference.
        ratio = abs(log(profile.memory.si / memory))
        name = difflib.SequenceMatcher(None, profile.description.lower(), choice.device.lower()).ratio()
        return abs(profile.sm - sm), round(4 * ratio), -name

    best = min((profile for profile in list_profiles() if profile.sm is not None), key=distance)
    same = f"SM {sm}" if best.sm == sm else f"SM {best.sm}, no profile has SM {sm},"
    return best, f"{same} and {best.memory.value:g} {best.memory.unit} are the nearest to {choice.device}"


def like(name: str | None, choice: Choice) -> tuple[DeviceProfile, str]:
    """Returns the profile that the defaults come from, and why. Raises InputError for another kind of device's."""
    if name is None:
        return nearest(choice)
    profile = load_profile(name)
    if (profile.engine == "onnxruntime") != (choice.gpu is None):
        raise InputError(
            f"--like {name} is a profile of {profile.engine}, {choice.device} was probed with {choice.flavour}",
            "Leave --like out, or choose another --engine.",
        )
    return profile, "asked for"


def profile_of(probed: Probed, choice: Choice, base: DeviceProfile, name: str | None) -> DeviceProfile:
    """Returns the measured figures with the defaults of `base`. Raises EngineError where they contradict each other."""
    dialect = base.dialect
    if choice.gpu is not None and choice.flavour != base.engine:
        dialect = "primitive"  # the one that the parser of every release takes
    defaults = base.model_dump(exclude={*base.hardware, "formats"}) | {
        "name": name or _slug(choice.device),
        "description": f"{choice.device}, measured; {TAKEN} of {base.name}",
        "engine": choice.flavour,
        "sm": choice.gpu["sm"] if choice.gpu else None,
        "dialect": dialect,
    }
    try:
        return DeviceProfile.model_validate(defaults | probed.figures)
    except ValidationError as error:
        reasons = "; ".join(item["msg"] for item in error.errors())
        raise EngineError(
            f"the figures measured on {choice.device} are not a valid profile: {reasons}",
            "Probe again on an idle device.",
        ) from None


def text_of(profile: DeviceProfile, base: DeviceProfile, conditions: dict[str, str]) -> str:
    """Returns the file's text: what is measured and what is not, the device's state, then the profile."""
    kept = [key for key, figure in profile.hardware.items() if not figure.source.startswith("measured")]
    lines = [
        "Hardware figures measured by tools/probe_profile.py"
        + (f", but for {', '.join(kept)} of {base.name}." if kept else "."),
        f"From edgeprune's profile {base.name}: {TAKEN}.",
        *(f"While it was measured: {key}: {value}" for key, value in conditions.items()),
    ]
    if profile.dialect != base.dialect:
        lines.insert(2, f"The dialect is not {base.dialect} but primitive, which every release of TensorRT takes.")
    plain = ("".join(c if c.isprintable() else " " for c in line) for line in lines)
    return "".join(f"# {line}\n" for line in plain) + "\n" + profile_toml(profile)


def _slug(text: str) -> str:
    """Returns the text as a name of a profile: lower case, with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "device"


def check_output(path: Path, force: bool) -> None:
    """Raises InputError for a file that cannot or must not be written, before anything is measured."""
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise InputError(f"--output {path} {reason}", "Give the name of a file, like device.toml.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--output {path}: {path.parent} cannot be written", "Give a place that you may write to.")
    if path.exists() and not force:
        raise InputError(f"{path} exists", "Give another --output, or --force to replace it.")


def write(path: Path, text: str) -> None:
    """Writes the file, complete or not at all. Raises InputError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", "Give another --output.") from None


def run(options: argparse.Namespace, on_progress: OnProgress) -> DeviceProfile:
    """Probes the device, writes the profile and returns it; reports each choice with its reason before it costs
    time.

    Raises InputError or EngineError.
    """
    check_output(options.output, options.force)
    if options.like is not None:
        load_profile(options.like)  # a bad name fails before anything is measured
    session: Session = ThisMachine() if options.target is None else Device(Target.parse(options.target))
    where = options.target or "this machine"
    choice = choose(options.engine, measure.describe(session, on_progress), where)
    on_progress(f"engine {choice.flavour} on {choice.device}: {choice.reason}", 0, 0)
    base, reason = like(options.like, choice)
    on_progress(f"{TAKEN} of {base.name}: {reason}", 0, 0)
    if choice.gpu is None:
        probed = probe_processor(session, on_progress)
    else:
        probed = probe_gpu(session, choice.flavour, choice.device, base, on_progress)
    profile = profile_of(probed, choice, base, options.name)
    write(options.output, text_of(profile, base, probed.conditions))
    return profile


def _summary(profile: DeviceProfile, options: argparse.Namespace) -> str:
    """Returns the figures in words, and the command that uses the profile."""
    lines = [f"{options.output}: {profile.description}"]
    for name, figure in profile.hardware.items():
        lines.append(f"{name}: {figure.value:.4g} {figure.unit} ({figure.confidence})")
    target = f" --target {options.target}" if options.target else ""
    timed = ("bandwidth", f"{profile.precision}_compute")
    if any(profile.hardware[name].confidence == "low" for name in timed):
        lines.append("The device was busy: close what else runs there and probe again for figures to rely on.")
    return "\n".join([*lines, f"Use it: edgeprune fit MODEL --profile {options.output}{target}"])


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", metavar="ssh://user@host[:port]", help="the device; without it this machine")
    parser.add_argument("--engine", choices=NAMES, default="auto", help="what to probe with (auto)")
    parser.add_argument("--like", metavar="NAME", help="edgeprune's profile to take the defaults from")
    parser.add_argument("--name", help="of the profile (the device's name)")
    parser.add_argument("--output", type=Path, required=True, help="the TOML file to write")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Runs the tool and returns an exit code as edgeprune does: 2 bad input, 4 engine or device failed, 130
    interrupted."""
    options = _parse(words)
    shown = [""]

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage != shown[0]:
            shown[0] = stage
            print(stage, file=sys.stderr)

    try:
        profile = run(options, on_progress)
    except EdgepruneError as error:
        print(f"error: {error.message}\n{error.remedy}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(_summary(profile, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
