"""The facts about this machine and the state in which it was measured. They are recorded, never changed.

This file also runs on the device: Python 3.10, standard library only. It does not know which figures they accompany.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeprune.ondevice import llama_tools
from edgeprune.ondevice.runtimes import RUNTIMES

_QUERY = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.limit,persistence_mode"


def processor() -> str:
    """Returns the processor's model name, and the number of threads that this process may use at once."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {threads()} threads"


def threads() -> int:
    """Returns the number of threads that this process may use at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """Returns the number of cores that this process may use, as llama.cpp counts them: two threads of a core are one.

    Where the system does not tell, it is the number of threads.
    """
    if not hasattr(os, "sched_getaffinity"):
        return threads()
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings").read_text(encoding="utf-8"))
        except OSError:
            return threads()
    return len(siblings)


def machine() -> str:
    """Returns the board's name where the system has one (a Jetson), else the processor's."""
    with contextlib.suppress(OSError):
        return Path("/proc/device-tree/model").read_text(encoding="utf-8").strip("\0\n ")
    return processor()


def memory_state() -> dict[str, int]:
    """Returns the bytes in all, available, swapped out and of free swap, by /proc/meminfo; empty without such a file.

    On a Jetson, where CPU and GPU share memory, this is what a program can have, not what CUDA calls free.
    """
    state = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        values = {line.partition(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith("kB")}
        state["total"], state["available"] = values.get("MemTotal", 0), values.get("MemAvailable", 0)
        state["swap_free"] = values.get("SwapFree", 0)
        state["swapped"] = values.get("SwapTotal", 0) - state["swap_free"]
    return state


def reset_peak_bytes() -> None:
    """Lets the peak begin again at the bytes that are resident now, on Linux; elsewhere the process keeps its peak."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def peak_bytes() -> int:
    """Returns the peak resident bytes of this process, which include file pages that are mapped and touched.

    On Linux they are read from /proc/self/status, because ru_maxrss begins there at the size of the parent.
    """
    if (peak := _of_status("VmHWM")) is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int | None:
    """Returns the resident bytes of this process; None where the system does not tell."""
    return _of_status("VmRSS")


def _of_status(name: str) -> int | None:
    """Returns the bytes of a line of /proc/self/status; None without such a line."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None


def used_memory() -> int | None:
    """Returns the bytes of the GPU's memory that all programs use together; None where they are unknown.

    They come from nvidia-smi where the GPU has a memory of its own, else from /proc/meminfo.
    """
    with contextlib.suppress(ValueError, IndexError):  # an integrated GPU answers [N/A]
        return (
            int(_output_of("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits").split()[0]) * 2**20
        )
    state = memory_state()
    return state["total"] - state["available"] if state else None


def conditions() -> dict[str, str]:
    """Returns power mode, clocks, temperatures and memory in words, which put a latency into perspective."""
    states: dict[str, str] = {}
    if mode := _output_of("nvpmodel", "-q"):
        states["power mode"] = " ".join(mode.split())
    if clocks := _output_of("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"):
        for name, value in zip(_QUERY.split(","), clocks.splitlines()[0].split(","), strict=False):
            states[name.replace(".", " ").replace("_", " ")] = value.strip()
    if locked := _locked_clocks():
        states["gpu clock range"] = locked
    if warm := _temperatures():
        states["temperatures"] = warm
    state = memory_state()
    if state:
        states["memory available"] = f"{state['available'] / 2**30:.1f} GiB"
        states["swapped out"] = f"{state['swapped'] / 2**30:.1f} GiB"
    return states


def describe() -> dict[str, Any]:
    """Returns the machine, the versions of the modules (None: missing), the GPU or why there is none, and the place of
    llama-bench."""
    # Import every module that an engine may need.
    modules, missing = {}, {}
    for name in ("numpy", *(runtime.module for runtime in RUNTIMES.values())):
        try:
            modules[name] = str(importlib.import_module(name).__version__)
        except Exception as error:  # a missing library is not an ImportError in every release
            modules[name], missing[name] = None, f"{type(error).__name__}: {error}"
    # Reach the GPU, which takes numpy.
    gpu, no_gpu = None, ""
    if modules["numpy"]:
        from edgeprune.errors import EngineError
        from edgeprune.ondevice.cuda import find_gpu

        try:
            gpu = dict(find_gpu().__dict__)
        except EngineError as error:
            no_gpu = error.message
    return {
        "machine": machine(),
        "processor": processor(),
        "python": platform.python_version(),
        "modules": modules,
        "missing": missing,
        "gpu": gpu,
        "no_gpu": no_gpu,
        "llama_bench": llama_tools.find(),
        "memory": memory_state(),
        "platform": sys.platform,
    }


def _output_of(*command: str) -> str:
    """Returns the output of a command, empty where the command is missing, fails or takes more than ten seconds."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _locked_clocks() -> str:
    """Returns the range of the integrated GPU's clock in MHz; equal ends mean that jetson_clocks locked it."""
    for folder in Path("/sys/class/devfreq").glob("*gpu*"):
        with contextlib.suppress(OSError, ValueError):
            low, high = (int((folder / f"{end}_freq").read_text()) // 10**6 for end in ("min", "max"))
            return f"{low} to {high} MHz{' (locked)' if low == high else ''}"
    return ""


def _temperatures() -> str:
    """Returns the name and degrees Celsius of every thermal zone."""
    zones = []
    for folder in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        with contextlib.suppress(OSError, ValueError):
            degrees = int((folder / "temp").read_text()) / 1000
            zones.append(f"{(folder / 'type').read_text().strip()} {degrees:.0f}")
    return ", ".join(zones)
