"""The dialects of graphs: which one a version of TensorRT takes, whether it updates the KV cache in place, and why.

Everybody may import it, the device side too: Python 3.10, standard library only. engine/onnx writes them.
"""

from __future__ import annotations

from typing import Literal

from edgeprune.errors import InputError
from edgeprune.files import printable

Dialect = Literal["opset24", "opset23", "primitive", "onnxruntime"]
IN_PLACE: tuple[Dialect, ...] = ("opset24", "onnxruntime")  # they append to one buffer of the KV cache
LEAST_TENSORRT = "10.15"  # the first whose parser knows Attention, RotaryEmbedding and TensorScatter


def version_of(text: str) -> tuple[int, ...]:
    """Returns a version as numbers, as far as it has them. Raises InputError where it has none."""
    numbers = []
    for part in text.strip().split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    if not numbers:
        raise InputError(f"{printable(text, 40)!r} is not a version of TensorRT", "Give one like 10.16.")
    return tuple(numbers)


def is_in_place(tensorrt: str) -> bool:
    """Returns whether a version of TensorRT updates the KV cache in place. Raises InputError for what is no version."""
    return version_of(tensorrt) >= version_of(LEAST_TENSORRT)


def dialect_for(tensorrt: str, wanted: Dialect) -> Dialect:
    """Returns the dialect for a version of TensorRT, of which newer ones have a choice; wanted: that of the profile.

    Raises InputError for what is no version.
    """
    if not is_in_place(tensorrt):
        return "primitive"
    return "opset23" if wanted == "opset23" else "opset24"


def dialect_over(dialect: Dialect, cache: str | None) -> Dialect:
    """Returns the dialect over a KV cache in a format, None for floats, where a cache of floats has this one.

    TensorRT's TensorScatter is of floats alone: codes are joined at each step.
    """
    return "opset23" if dialect == "opset24" and cache is not None else dialect


def reason_of(dialect: Dialect, engine: str, tensorrt: str | None, precision: str, cache: str | None = None) -> str:
    """Returns why a graph has its dialect, in words.

    tensorrt: the version, where the engine has several; cache: the format of the KV cache, None for floats.
    """
    names = {"tensorrt-rtx": "TensorRT for RTX", "onnxruntime": "ONNX Runtime", "llama.cpp": "llama.cpp"}
    name = names.get(engine, " ".join(filter(None, ("TensorRT", tensorrt))))
    if dialect in IN_PLACE:
        whole = "; every step attends to all of its capacity" if dialect == "opset24" else ""
        return f"{name} writes new keys and values into the KV cache in place: one is held, none is copied{whole}"
    joined = "past and new tokens are joined at each step, from one cache into another"
    if cache is not None and dialect == "opset23":
        return f"{name} writes floats alone into the KV cache in place, not {cache}: {joined}"
    if engine == "tensorrt" and tensorrt is not None and not is_in_place(tensorrt):
        return f"{name} is older than {LEAST_TENSORRT}, the first that updates the KV cache in place: {joined}"
    if precision == "fp32" and dialect == "primitive":
        return f"TensorRT for RTX has no fp32 kernel for the operator Attention: {joined}"
    return f"the profile says so: {joined}"
