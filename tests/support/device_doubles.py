"""A device whose TensorRT and CUDA modules are doubles of a GPU, behind the sshd of tests/support/device.py."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support import ROOT
from tests.support.device import Server, bare_python, script

TESTS = ROOT / "tests"
MODULES = {
    "shared_double.py": (
        "from tests.support.doubles.double_device import Device\n\nDEVICE = Device(2**28, sm={sm})\n{more}\n"
    ),
    "tensorrt.py": (
        "import sys\n\nfrom shared_double import DEVICE\nfrom tests.support.doubles import double_tensorrt\n\n"
        'sys.modules[__name__] = double_tensorrt.module(DEVICE, "{version}")\n'
    ),
    "cuda/bindings/driver.py": (
        "import sys\n\nfrom shared_double import DEVICE\nfrom tests.support.doubles import double_cuda_python\n\n"
        "sys.modules[__name__] = double_cuda_python.module(DEVICE)\n"
    ),
}


def python_with_doubles(folder: Path, sm: int = 87, version: str = "10.3.0", more: str = "") -> Path:
    """A bare environment in which `tensorrt` and `cuda.bindings` are doubles of a GPU of this SM.

    version: of TensorRT; more: lines of Python that change the double DEVICE.
    """
    python = bare_python(folder, ("numpy", "onnxruntime", "onnx"))
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    for name, text in MODULES.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        text = text.replace("{sm}", str(sm)).replace("{version}", version).replace("{more}", more)
        (site / name).write_text(text)
    (site / "tests" / "support").mkdir(parents=True)
    for name in ("__init__.py", "support/__init__.py", "support/doubles", "data"):
        (site / "tests" / name).symlink_to(TESTS / name)
    return python


def nvidia_smi(folder: Path) -> Path:
    """A double that always tells the same memory in use, so that this machine's other programs do not count."""
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 1000\n")
    (folder / "nvidia-smi").chmod(0o755)
    return folder


def attentive_nvidia_smi(folder: Path, ledger: Path) -> None:
    """A double that tells the memory in use from a double device's ledger, and clocks."""
    script(
        folder / "nvidia-smi",
        f'case "$*" in\n*memory.used*) cat "{ledger}" 2>/dev/null || echo 0 ;;\n*memory.free*) echo 1000 ;;\n'
        "*) echo 1300 MHz, 1300 MHz, 3200 MHz, 47, 60.00 W, Enabled ;;\nesac",
    )


def path_to(server: Server) -> str:
    return f"{server.folder / 'bin'}:{os.environ['PATH']}"
