"""The engines by name: one table of the module and the package of each, and of how it is installed.

Python 3.10, standard library only. A new engine is a new row here, a class in engine/engines.py and its tasks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """The module and the package of one engine, and the ways to install it."""

    module: str  # that Python imports
    package: str  # that pip installs
    extra: str  # of edgeprune that brings it; empty: edgeprune always does
    least: str  # the oldest version that is known to work
    on_gpu: bool
    builds_ahead: bool = False  # engines for GPUs that are not there
    on_device: str = ""  # how it is installed on a device where pip is not the way

    @property
    def install_here(self) -> str:
        """Returns the command that installs it on the workstation."""
        return f'pip install "edgeprune[{self.extra}]"' if self.extra else f"pip install {self.package}"

    @property
    def install_there(self) -> str:
        """Returns how it is installed on a device, which has no edgeprune."""
        return self.on_device or f"python3 -m pip install {self.package}"


LLAMA_CPP = "llama.cpp"
LLAMA_BENCH = "llama-bench"  # its own program, which measures on devices that have it on their PATH
RUNTIMES: dict[str, Runtime] = {
    "tensorrt": Runtime(
        "tensorrt",
        "tensorrt",
        "tensorrt",
        "10.3",
        on_gpu=True,
        on_device="it comes with JetPack (sudo apt install tensorrt python3-libnvinfer)",
    ),
    "tensorrt-rtx": Runtime("tensorrt_rtx", "tensorrt-rtx", "rtx", "1.2", on_gpu=True, builds_ahead=True),
    "onnxruntime": Runtime("onnxruntime", "onnxruntime", "", "1.32", on_gpu=False),
    LLAMA_CPP: Runtime("xllamacpp", "xllamacpp", "llama", "2026.10", on_gpu=False),
}
IN_PROCESS = tuple(name for name, runtime in RUNTIMES.items() if not runtime.on_gpu)
GPU_RUNTIMES = tuple(name for name, runtime in RUNTIMES.items() if runtime.on_gpu)


def preferred(name: str) -> list[str]:
    """Returns the engines of a GPU in the order in which a device is searched for them, the named one first."""
    return sorted(GPU_RUNTIMES, key=lambda other: other != name)
