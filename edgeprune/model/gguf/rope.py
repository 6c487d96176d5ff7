"""The rope parameters of a config.json from the rotary positions of a GGUF file, as llama.cpp reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.model.gguf.names import FREQUENCIES, LONG, SHORT

if TYPE_CHECKING:
    from edgeprune.model.gguf.file import Metadata

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALINGS = ("linear", "llama3", "yarn", "longrope")


def shortest(value: float) -> float:
    """Returns the shortest decimal that stands for a value in fp32.

    GGUF holds fp32, in which 1e-5 reads back as 9.999999747378752e-06.
    """
    return float(str(np.float32(value)))


def rope_of(metadata: Metadata, head_dim: int, where: object) -> dict[str, Any]:
    """Returns the rope parameters of transformers. where: the file's name, for messages.

    Raises InputError for a kind of scaling that is not supported, and for factors that do not match the head.
    """
    # Base frequency, and the part of each head that is rotated.
    theta = shortest(metadata.get("rope.freq_base", 10000.0))
    rotary_dim = int(metadata.get("rope.dimension_count", head_dim))
    if rotary_dim != head_dim and not metadata.architecture.partial:
        raise InputError(
            f"{where} rotates {rotary_dim} of {head_dim} head dimensions",
            "Only a rotation of all of them is supported.",
        )
    base = {"rope_theta": theta, **({"partial_rotary_factor": rotary_dim / head_dim} if rotary_dim != head_dim else {})}
    if base.get("partial_rotary_factor") is None and metadata.architecture.partial:
        base["partial_rotary_factor"] = 1.0
    # No type means linear, no factor means 1; files of 2023 name it scale_linear.
    kind = metadata.get("rope.scaling.type", "linear")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear")) or 1.0
    # Every tensor of factors has one value for each rotary pair: (rotary_dim / 2,).
    for name in metadata.factors:
        if len(metadata.factors[name]) != rotary_dim // 2:
            raise InputError(
                f"{where} has {len(metadata.factors[name])} {name} for {rotary_dim // 2} pairs", "Restore the file."
            )
    # Tensors of factors decide before the named kind does.
    if (frequencies := metadata.factors.get(FREQUENCIES)) is not None:
        return base | _from_frequencies(metadata, theta, head_dim, frequencies)
    if SHORT in metadata.factors:
        return base | _longrope(metadata)
    if kind == "yarn":
        return base | _yarn(metadata, float(factor), where)
    if kind == "linear" and factor != 1.0:
        return base | {"rope_type": kind, "factor": shortest(factor)}
    if kind not in ("linear", "none"):
        raise InputError(f"unsupported rope scaling {printable(kind, 60)!r}", f"Supported are: {', '.join(SCALINGS)}.")
    return base | {"rope_type": "default"}


def _yarn(metadata: Metadata, factor: float, where: object) -> dict[str, Any]:
    """Returns the parameters of YaRN; llama.cpp's attention factor is relative to the usual one, 0.1 ln(factor) + 1."""
    original = metadata.get("rope.scaling.original_context_length")
    if original is None or factor == 1.0:
        raise InputError(f"{where} has rope scaling 'yarn' without its factor or original context", "Restore the file.")
    scaling = {"rope_type": "yarn", "factor": shortest(factor), "original_max_position_embeddings": int(original)}
    if (attention := metadata.get("rope.scaling.attn_factor")) is not None:
        scaling["attention_factor"] = shortest(attention) * (0.1 * float(np.log(factor)) + 1.0)
    return scaling


def _longrope(metadata: Metadata) -> dict[str, Any]:
    """Returns the parameters of LongRoPE; without long factors the short ones serve for both."""
    short = metadata.factors[SHORT]
    context = metadata.number("context_length")
    original = min(context, int(metadata.get("rope.scaling.original_context_length", context)))
    scaling = {
        "rope_type": "longrope",
        "short_factor": _numbers(short),
        "long_factor": _numbers(metadata.factors.get(LONG, short)),
        "original_max_position_embeddings": original,
    }
    return scaling | {"attention_factor": shortest(metadata.get("rope.scaling.attn_factor", 1.0))}


def _from_frequencies(metadata: Metadata, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """Returns Llama 3's scaling where it explains the factors (pairs,), else LongRoPE with the factors themselves."""
    # Llama 3's scaling divides the slowest pairs by the whole factor; its context may be the usual one.
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # (head_dim / 2,)
    scaling = {"factor": float(np.max(factors)), **LLAMA3}
    contexts = [LLAMA3["original_max_position_embeddings"]]
    # A pair between the two ends reveals the original context.
    between = (factors > factors.min() * 1.001) & (factors < factors.max() * 0.999)
    if between.any():
        inverse = 1 / scaling["factor"]
        kept = (1 / factors[between][0] - inverse) / (1 - inverse)
        turns = scaling["low_freq_factor"] + kept * (scaling["high_freq_factor"] - scaling["low_freq_factor"])
        contexts.append(round(float(wavelengths[between][0] * turns)))
    # Take the first context that reproduces the factors.
    for context in contexts:
        scaling["original_max_position_embeddings"] = context
        if np.allclose(_llama3_factors(wavelengths, scaling), factors, rtol=1e-3):
            return {"rope_type": "llama3", **scaling}
    # No context does: keep the factors as they are.
    values = _numbers(factors)
    context = metadata.number("context_length")
    return {
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _numbers(factors: np.ndarray) -> list[float]:
    return [shortest(value) for value in factors]


def _llama3_factors(wavelengths: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Returns the divisor of each frequency in Llama 3's scaling, (head_dim / 2,)."""
    low, high, original = (scaling[name] for name in LLAMA3)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
