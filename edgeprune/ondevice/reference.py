"""The check that an engine computes its graph: its logits against those of the fp32 graph in ONNX Runtime.

This file also runs on the device: Python 3.10 and numpy. It knows no engine. A reference is a small file of token ids
and of the logits after a prompt and after every further token.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeprune.errors import EngineError, WrongEngine
from edgeprune.ondevice.worker import OnProgress
from edgeprune.precision import PRECISIONS

CODES_TOLERANCE = (0.99, 0.1)
"""Of the logits of a model that rounds states to codes, as the least cosine and the largest error: the least difference
before a rounding makes another code of a number between two. On SmolLM2 with a KV cache in codes, weights in fp16 and
in bf16 moved them by 0.9992 and 0.042 at most; on a small random model in w8a8 fp16 did by 0.9977 and 0.075."""
ROUNDED_INPUTS = "inputs of matrices of few bits in 8 bits"
TOLERANCES_OF_CODES = {"floats of 4 bits": (0.9, 0.5), "floats of 8 bits": (0.95, 0.2), ROUNDED_INPUTS: (0.95, 0.3)}
"""The same where a model's words say that these are what it rounds, in all its layers. The steps of floats are coarse:
SmolLM2's graph in fp16 and in bf16 moved by 0.983 and 0.25 in 4 bits, and by 0.983 and 0.094 in 8, from the one in
fp32; a small random model in fp16 by 0.94 and 0.36, and by 0.996 and 0.095. llama.cpp rounds what a matrix of few bits
reads to 8 bits, by blocks of 32 or 256 inputs: SmolLM2 has single inputs 160 times as large as others, and with its
layers in Q4_1 and Q8_0 logits moved by 0.990 and 0.13; those of the same numbers in floats by 0.999998 and 0.0025."""
PROMPT, STEPS = 64, 8  # tokens of the reference's prompt and of the steps after it, at most
# The errors of numpy for a file that is cut short, is empty, is not an archive, or holds one array alone.
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, zipfile.BadZipFile)


class StepRunner(Protocol):
    """A runner of a model step by step, on any engine: `batch` sequences, `capacity` tokens of KV cache."""

    batch: int
    capacity: int
    vocab_size: int

    def reset(self, past: int = 0) -> None: ...
    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray: ...


def write_reference(runner: StepRunner, ids: np.ndarray, path: Path, codes: str = "") -> None:
    """Writes the logits of a runner of one sequence, after a prompt of ids (tokens,) and after each of the last STEPS.

    codes: the states that it rounds, in words. An engine that takes fewer tokens at once, as those of image generators
    do, reads the prompt in parts.
    """
    ids = ids[None, : min(len(ids), runner.capacity, PROMPT + STEPS)]  # (1, tokens)
    # (1, vocabulary) for each position that is kept
    logits = list(_logits(runner, ids, max(1, ids.shape[1] - STEPS)))
    save_reference(ids, np.concatenate(logits), path, codes)


def save_reference(ids: np.ndarray, logits: np.ndarray, path: Path, codes: str = "") -> None:
    """Writes ids (1, tokens) and the logits (steps, vocabulary) after the last `steps` of them.

    codes: the states that were rounded on the way, in words.
    """
    with path.open("wb") as file:
        np.savez(file, ids=ids, logits=logits.astype(np.float32), codes=np.array(codes))


def read_reference(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids (1, tokens) int64 and logits (steps, vocabulary) fp32, which are those after the last `steps` tokens.

    Raises EngineError where the file is not a reference.
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


def codes_of(path: Path) -> str:
    """Returns which states were rounded for a reference, in words, which read_reference can read."""
    with np.load(path, allow_pickle=False) as file:
        return str(file["codes"]) if "codes" in file else ""


def compare_logits(
    runner: StepRunner, ids: np.ndarray, expected: np.ndarray, on_progress: OnProgress
) -> dict[str, Any]:
    """Compares a runner's logits with expected ones (steps, vocabulary) over the positions of a reference.

    Returns the least cosine, the largest error relative to the largest logit, the share of equal likeliest tokens and
    the number of positions. Raises EngineError where the vocabulary is of another size.
    """
    cosines, errors, equal = [], [], 0
    prompt = ids.shape[1] - len(expected) + 1
    for index, (logits, reference) in enumerate(zip(_logits(runner, ids, prompt), expected, strict=True)):
        if logits[0].shape != reference.shape:
            raise EngineError(
                f"the engine has a vocabulary of {logits.shape[1]}, its reference one of {len(reference)}",
                "The engine is of another model: build it again from the bundle's graph.",
            )
        # Logits that are not finite count as the worst agreement.
        logits, reference = logits[0].astype(np.float64), reference.astype(np.float64)  # (vocabulary,)
        finite = np.isfinite(logits).all()
        norms = np.linalg.norm(logits) * np.linalg.norm(reference)
        cosines.append(float(logits @ reference / norms) if finite and norms else 0.0)
        errors.append(float(np.abs(logits - reference).max() / np.abs(reference).max()) if finite else float("inf"))
        equal += int(logits.argmax() == reference.argmax())
        on_progress("check the engine's logits", index + 1, len(expected))
    # JSON has no infinity: an infinite error becomes a number that is beyond every tolerance.
    return {
        "cosine": min(cosines),
        "error": min(max(errors), 1e300),
        "equal": equal / len(expected),
        "positions": len(expected),
    }


def judge_logits(agreement: dict[str, Any], precision: str, what: str, codes: str = "") -> str:
    """Returns the agreement that compare_logits measured, in words; what: the name of the engine or graph.

    codes: the states that the model rounds, in words. Raises WrongEngine where it is beyond the tolerance of the
    precision.
    """
    cosine, error = PRECISIONS[precision].tolerance
    if codes:
        of_codes = (own for words, own in TOLERANCES_OF_CODES.items() if words in codes)
        least, most = next(of_codes, CODES_TOLERANCE)
        cosine, error = min(cosine, least), max(error, most)
    words = (
        f"cosine {agreement['cosine']:.6f}, largest error {agreement['error']:.2g} of the largest logit, "
        f"the likeliest token equal at {100 * agreement['equal']:.0f} % of {agreement['positions']} positions"
    )
    if not (agreement["cosine"] >= cosine and agreement["error"] <= error):
        raise WrongEngine(
            f"the engine {what} computes something else than its graph: {words} "
            f"({precision}{f' with {codes}' if codes else ''} allows {cosine} and {error})",
            "Do not deploy it. Build with another release of the engine, or with --precision fp32 if it has another.",
        )
    return words


def _logits(runner: StepRunner, ids: np.ndarray, prompt: int) -> Any:
    """Yields logits (1, vocabulary) after the first `prompt` tokens of ids (1, tokens) and after each further one."""
    runner.reset()
    yield runner.run(ids[:, :prompt])
    for index in range(prompt, ids.shape[1]):
        yield runner.run(ids[:, index : index + 1])
