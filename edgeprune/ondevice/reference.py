"""Whether an engine computes what its graph says: its logits against those of the fp32 graph in ONNX Runtime.

This file also runs on the device: Python 3.10 and numpy. A reference is a small file of token ids and the
logits that belong after a prompt and after every further token.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeprune.errors import EngineError, WrongEngine
from edgeprune.ondevice.worker import Tell
from edgeprune.precision import PRECISIONS

PROMPT, STEPS = 64, 8  # tokens of the reference's prompt and of the steps after it, at most
# What numpy raises for a file that is cut short, empty, no archive, or one array alone.
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, zipfile.BadZipFile)


class StepRunner(Protocol):
    """What runs a model step by step, on whichever engine."""

    batch: int
    capacity: int

    def reset(self, past: int = 0) -> None: ...
    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray: ...


def write_reference(runner: StepRunner, ids: np.ndarray, path: Path) -> None:
    """The logits of a runner of one sequence, after a prompt of the ids (tokens,) and after each of the last STEPS.

    An engine that takes fewer tokens at once, as of pictures, reads the prompt in parts.
    """
    ids = ids[None, : min(len(ids), runner.capacity, PROMPT + STEPS)]
    logits = list(_logits(runner, ids, max(1, ids.shape[1] - STEPS)))
    with path.open("wb") as file:
        np.savez(file, ids=ids, logits=np.concatenate(logits).astype(np.float32))


def read_reference(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """ids (1, tokens) int64, logits (steps, vocabulary) fp32: those after the last `steps` tokens.

    Raises EngineError where the file is no reference.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, logits = file["ids"], file["logits"]
        if not 0 < len(logits) <= ids.shape[1]:
            raise ValueError(f"{len(logits)} logits for {ids.shape[1]} tokens")
    except _UNREADABLE as error:
        raise EngineError(
            f"the reference {path.name} cannot be read: {error}", "Copy the bundle again, or fit again."
        ) from None
    return ids, logits


def compare_logits(runner: StepRunner, ids: np.ndarray, expected: np.ndarray, tell: Tell) -> dict[str, Any]:
    """Least cosine, largest relative error and share of equal likeliest tokens over the reference's positions."""
    cosines, errors, equal = [], [], 0
    prompt = ids.shape[1] - len(expected) + 1
    for index, (found, wanted) in enumerate(zip(_logits(runner, ids, prompt), expected, strict=True)):
        if found[0].shape != wanted.shape:
            raise EngineError(
                f"the engine has a vocabulary of {found.shape[1]}, its reference one of {len(wanted)}",
                "The engine is of another model: build it again from the bundle's graph.",
            )
        found, wanted = found[0].astype(np.float64), wanted.astype(np.float64)
        finite = np.isfinite(found).all()
        norms = np.linalg.norm(found) * np.linalg.norm(wanted)
        cosines.append(float(found @ wanted / norms) if finite and norms else 0.0)
        errors.append(float(np.abs(found - wanted).max() / np.abs(wanted).max()) if finite else float("inf"))
        equal += int(found.argmax() == wanted.argmax())
        tell("check the engine's logits", index + 1, len(expected))
    # JSON has no infinity: what is not finite is told as the largest number.
    return {
        "cosine": min(cosines),
        "error": min(max(errors), 1e300),
        "equal": equal / len(expected),
        "positions": len(expected),
    }


def judge_logits(found: dict[str, Any], precision: str, what: str) -> str:
    """What was found in words. Raises EngineError where the engine's logits are beyond the tolerance."""
    cosine, error = PRECISIONS[precision].tolerance
    words = (
        f"cosine {found['cosine']:.6f}, largest error {found['error']:.2g} of the largest logit, the likeliest token "
        f"equal at {100 * found['equal']:.0f} % of {found['positions']} positions"
    )
    if not (found["cosine"] >= cosine and found["error"] <= error):
        raise WrongEngine(
            f"the engine {what} computes something else than its graph: {words} "
            f"({precision} allows {cosine} and {error})",
            "Do not deploy it. Build with another release of the engine, or with --precision fp32 if it has another.",
        )
    return words


def _logits(runner: StepRunner, ids: np.ndarray, prompt: int) -> Any:
    runner.reset()
    yield runner.run(ids[:, :prompt])
    for index in range(prompt, ids.shape[1]):
        yield runner.run(ids[:, index : index + 1])
