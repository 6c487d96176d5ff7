"""Rotary frequencies of a model's configuration, computed as transformers does.

It needs no framework and does not know which layers use the frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.model.decoder import Rotary

Parameters = Mapping[str, Any]
PARTIAL, ORIGINAL_CONTEXT = "partial_rotary_factor", "original_max_position_embeddings"
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class SenselessError(ValueError):
    """A parameter that makes no sense for any model; the message names it."""


def rope_parameters(config: Parameters) -> dict[str, Any]:
    """Returns the rope parameters of a configuration; empty where it has none.

    Newer files have `rope_parameters`, older ones `rope_scaling`; transformers prefers the latter where both are there.
    Raises SenselessError for anything but a mapping.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise SenselessError(f"rope parameters {parameters!r}")
    return parameters


def whole_heads(config: Parameters) -> dict[str, Any]:
    """Returns the configuration of a family that rotates whole heads: it does not read partial_rotary_factor.

    Raises SenselessError for one beside a kind of scaling, with which transformers cannot run the family.
    """
    whole = {name: value for name, value in config.items() if name != PARTIAL}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(parameters := config.get(name), dict):
            whole[name] = _whole(parameters, config.get(PARTIAL))
    return whole


def _whole(parameters: Parameters, partial: object) -> dict[str, Any]:
    """Returns rope parameters, or such sets by kind of layer, without partial_rotary_factor. Raises SenselessError."""
    partial = parameters.get(PARTIAL) or partial
    if partial not in (None, 1) and (parameters.get("rope_type") or parameters.get("type")) not in (None, "default"):
        raise SenselessError(f"{PARTIAL} {partial} with rope scaling, in a family that rotates whole heads")
    return {
        name: _whole(value, partial) if isinstance(value, dict) else value
        for name, value in parameters.items()
        if name != PARTIAL
    }


def rotary_of(parameters: Parameters, config: Parameters, head_dim: int, theta: float = 10000.0) -> Rotary:
    """Returns the rotary embedding of one set of rope parameters.

    config: the configuration that may have some of them beside the set; theta: the base where neither names one.
    Raises SenselessError, KeyError or ArithmeticError for parameters that make no sense, and InputError for an unknown
    kind of scaling.
    """
    # The frequencies without scaling, of the part of a head that is rotated.
    base = float(parameters.get("rope_theta") or config.get("rope_theta") or theta)
    if not 0 < base < math.inf:
        raise SenselessError(f"rope_theta {base}")
    partial = parameters.get(PARTIAL) or config.get(PARTIAL) or 1.0
    rotary_dim = int(head_dim * float(partial))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise SenselessError(f"{PARTIAL} {partial} of head_dim {head_dim}")
    frequencies = tuple(base ** (-2.0 * pair / rotary_dim) for pair in range(rotary_dim // 2))
    # Scale them as the parameters' kind asks for.
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "su":  # Phi-3's name of 2024
        kind = "longrope"
    match kind:
        case "default" | "dynamic":  # the dynamic kind changes angles only beyond max_position_embeddings
            return Rotary(frequencies)
        case "linear":
            factor = float(parameters["factor"])
            return Rotary(tuple(frequency / factor for frequency in frequencies))
        case "llama3":
            context = original_context(parameters, config)
            return Rotary(tuple(_llama3(frequency, parameters, context) for frequency in frequencies))
        case "yarn":
            return _yarn(frequencies, base, parameters, config)
        case "longrope":
            return _longrope(frequencies, parameters, config)
    raise InputError(f"unsupported rope scaling {printable(repr(kind), 60)}", f"Supported are: {', '.join(KINDS)}.")


def longrope_context(parameters: Parameters, config: Parameters) -> int | None:
    """Returns the number of positions for which longrope's short factors hold; None for other kinds of scaling.

    Beyond them transformers takes other factors for all positions, which would change keys that are already rotated and
    in the KV cache.
    """
    if (parameters.get("rope_type") or parameters.get("type")) not in ("longrope", "su"):
        return None
    return original_context(parameters, config)


def original_context(parameters: Parameters, config: Parameters) -> int:
    """Returns the context that the model was trained with before its rope was scaled.

    That beside the parameters takes precedence, as in transformers.
    """
    return int(config.get(ORIGINAL_CONTEXT) or parameters.get(ORIGINAL_CONTEXT) or config["max_position_embeddings"])


def _llama3(frequency: float, parameters: Parameters, context: int) -> float:
    """Returns a frequency after Llama 3.1's scaling.

    A pair that turns `high` times or more within the original context keeps its frequency, one that turns `low` times
    or fewer has it divided by `factor`; between them the two are blended.
    """
    factor, low, high = (float(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise SenselessError(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    turns = context * frequency / (2 * math.pi)
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return frequency * (kept + (1 - kept) / factor)


def _yarn(frequencies: tuple[float, ...], base: float, parameters: Parameters, config: Parameters) -> Rotary:
    """Returns the rotary embedding of YaRN (Peng et al. 2023, arXiv 2309.00071).

    Pairs that turn fast keep their frequency, slow ones are interpolated.
    """
    factor, context, rotary_dim = (
        float(parameters["factor"]),
        original_context(parameters, config),
        2 * len(frequencies),
    )

    def pair(rotations: float) -> float:
        """Returns the pair, as a fraction, that turns this often within the original context."""
        return rotary_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    # The range of pairs between the fast and the slow ones.
    low, high = pair(float(parameters.get("beta_fast") or 32)), pair(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    span = high - low if high != low else 0.001
    # Divide the slow pairs by the factor, and blend within the range.
    scaled = []
    for index, frequency in enumerate(frequencies):
        interpolated = min(1.0, max(0.0, (index - low) / span))
        scaled.append(frequency / factor * interpolated + frequency * (1 - interpolated))
    # The factor of cos and sin, where the parameters do not give it.
    scaling = parameters.get("attention_factor")
    if scaling is None:
        mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scaling = (
            _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
            if mscale and mscale_all_dim
            else _mscale(factor, 1.0)
        )
    return Rotary(tuple(scaled), float(scaling))


def _mscale(factor: float, weight: float) -> float:
    """Returns YaRN's factor of cos and sin for a scaling factor: 0.1 * weight * ln(factor) + 1, or 1 up to factor 1."""
    return 1.0 if factor <= 1 else 0.1 * float(weight) * math.log(factor) + 1.0


def _longrope(frequencies: tuple[float, ...], parameters: Parameters, config: Parameters) -> Rotary:
    """Returns the rotary embedding of LongRoPE (Ding et al. 2024, arXiv 2402.13753) with its short factors.

    They hold within the original context.
    """
    short = [float(value) for value in parameters["short_factor"]]
    long = [float(value) for value in parameters.get("long_factor") or short]
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != len(frequencies):
            raise SenselessError(f"{len(factors)} {name} values for {len(frequencies)} pairs")
    original = original_context(parameters, config)
    factor = int(config["max_position_embeddings"]) / original
    scaling = parameters.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rotary(tuple(f / s for f, s in zip(frequencies, short, strict=True)), float(scaling))
