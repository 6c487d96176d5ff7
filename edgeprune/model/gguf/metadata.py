"""Can a GGUF file hold a model, and what are its fields? A model is held where its fields, read back, describe it.

llama.cpp computes what an architecture's name and its few fields say. Whatever a Decoder has beyond that (a window, a
scale, a bias, rope factors) would be lost without a word, so it is refused here, before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import decoder_of
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.checkpoint.places import StoredTensor, stored_tensors
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary
from edgeprune.model.gguf.config import config_of
from edgeprune.model.gguf.file import Metadata
from edgeprune.model.gguf.names import ARCHITECTURES, FREQUENCIES, LONG, SHORT, Architecture, places_of
from edgeprune.model.rope import longrope_context, rope_parameters

BY_FAMILY = {
    "llama": ("llama",),
    "mistral": ("llama",),
    "mixtral": ("llama",),
    "qwen2": ("qwen2", "llama"),
    "qwen3": ("qwen3",),
    "qwen3_moe": ("qwen3moe",),
    "gemma2": ("gemma2",),
    "gemma3_text": ("gemma3",),
    "phi3": ("phi3", "llama"),
    "smollm3": ("smollm3",),
    "olmo2": ("olmo2",),
    "granite": ("granite",),
    "gpt2": ("gpt2",),
    "gpt_neox": ("gptneox",),
    "starcoder2": ("starcoder2",),
}
"""The architectures that compute a family; those after the first where that one wants more heads than are left."""
REMEDY = "Deploy the checkpoint or the ONNX graph; a GGUF file cannot hold this model."
PRECISION = 1e-4  # relative, of frequencies and scales, which llama.cpp computes in fp32


@dataclass(frozen=True)
class Held:
    """decoder: as the file holds it, heads of zeros included. factor: by which the queries are multiplied, since
    the architecture has a scale of its own. factors: tensors of rope factors. fields: without the tokenizer's."""

    architecture: Architecture
    decoder: Decoder
    factor: float
    fields: dict[str, Any]
    factors: dict[str, np.ndarray]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        places = places_of(self.architecture, self.decoder, self.architecture.fused_qkv)
        return stored_tensors(self.decoder, places)


def held(decoder: Decoder, config: Mapping[str, Any]) -> Held:
    """How a GGUF file holds the decoder of a checkpoint's configuration. Raises InputError where none can."""
    if decoder.family not in BY_FAMILY:
        raise InputError(f"llama.cpp has no architecture for the family {decoder.family}", REMEDY)
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    if not decoder.is_uniform or attention is None or mlp is None:
        raise InputError("layers differ in width: a GGUF file has one width for all", REMEDY)
    wanted = [ARCHITECTURES[name] for name in BY_FAMILY[decoder.family]]
    whole = attention.query_size == decoder.hidden_size
    tries = [(each, decoder) for each in wanted if whole or not each.whole]
    if not whole and wanted[0].whole and (full := _filled(decoder)) is not None:
        tries.append((wanted[0], full))
    refusals = []
    for architecture, target in tries:
        try:
            return _held(architecture, target, config)
        except InputError as error:
            refusals.append(error)
    raise (
        refusals[0]
        if refusals
        else InputError(
            f"llama.cpp's {wanted[0].name} wants heads that fill the hidden size of {decoder.hidden_size}, "
            f"{attention.num_attention_heads} of {attention.head_dim} do not",
            REMEDY,
        )
    )


def _filled(decoder: Decoder) -> Decoder | None:
    """With heads of zeros, as few key/value heads as may be, until the query heads fill the hidden size; every one
    with keys and values of its own where the family has no other."""
    attention, fixed = decoder.layers[0].attention, FAMILIES[decoder.family].heads == "fixed"
    heads, rest = divmod(decoder.hidden_size, attention.head_dim)
    for groups in range(heads if fixed else attention.num_key_value_heads, heads + 1):
        if not rest and heads % groups == 0 and heads // groups >= attention.heads_per_group:
            return decoder.with_widths(groups, heads // groups, decoder.layers[0].mlp.intermediate_size)
    return None


def _held(architecture: Architecture, decoder: Decoder, config: Mapping[str, Any]) -> Held:
    if not architecture.windows and (windows := [window for window in decoder.windows if window is not None]):
        # all is seen: the same as long as nothing is beyond the window
        context = min(decoder.max_position_embeddings, *windows)
        layers = tuple(Layer(replace(each.attention, window=None), each.mlp) for each in decoder.layers)
        decoder = replace(decoder, layers=layers, max_position_embeddings=context)
    if architecture.head and decoder.tie_word_embeddings:
        decoder = replace(decoder, tie_word_embeddings=False)
    metadata = _metadata(architecture, decoder, config)
    understood = decoder_of(config_of(metadata, "the file"))
    scale = understood.layers[0].attention.score_scale
    factor = decoder.layers[0].attention.score_scale / scale
    if abs(factor - 1) > 1e-7:
        layers = tuple(Layer(replace(each.attention, scale=scale), each.mlp) for each in decoder.layers)
        decoder = replace(decoder, layers=layers)
    else:
        factor = 1.0
    if (difference := _difference(decoder, understood)) is not None:
        raise InputError(f"llama.cpp's {architecture.name} cannot compute this model: {difference}", REMEDY)
    found = Held(architecture, decoder, factor, dict(metadata.fields), dict(metadata.factors))
    allowed = architecture.biases | {"norm_bias", "attention.norm_bias", "mlp.norm_bias"}
    for name in decoder.shapes():
        part = name.split(".", 2)[-1] if name.startswith("layers.") else name
        if part.endswith("_bias") and part not in allowed:
            raise InputError(f"llama.cpp's {architecture.name} reads no {part.replace('_', ' ')}", REMEDY)
    return found


def _metadata(architecture: Architecture, decoder: Decoder, config: Mapping[str, Any]) -> Metadata:
    """What the file will say of the decoder, with tokens only counted."""
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    kind = "rms_" if decoder.norm == "rms" else ""
    own: dict[str, Any] = {
        "block_count": len(decoder.layers),
        "context_length": decoder.max_position_embeddings,
        "embedding_length": decoder.hidden_size,
        "feed_forward_length": mlp.intermediate_size,
        "attention.head_count": attention.num_attention_heads,
        "attention.head_count_kv": attention.num_key_value_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        f"attention.layer_norm_{kind}epsilon": decoder.norm_eps,
        "vocab_size": decoder.vocab_size,
    }
    if mlp.experts is not None:
        own |= {"expert_count": mlp.experts.num_experts, "expert_used_count": mlp.experts.num_experts_per_tok}
        if architecture.name == "qwen3moe":
            own["expert_feed_forward_length"] = mlp.intermediate_size
    own |= _windows(architecture, decoder)
    if architecture.name == "gemma2":
        own["attn_logit_softcapping"] = attention.softcap or 0.0
    if architecture.name in ("gemma2", "gemma3") and decoder.logits_softcap is not None:
        own["final_logit_softcapping"] = decoder.logits_softcap
    if architecture.name == "granite":
        own |= {
            "attention.scale": attention.score_scale,
            "embedding_scale": decoder.embedding_scale,
            "residual_scale": decoder.residual_scale,
            "logit_scale": 1.0 / decoder.logits_scale,
        }
    if architecture.name == "gptneox":
        own["use_parallel_residual"] = decoder.parallel
    factors: dict[str, np.ndarray] = {}
    rotary = next((layer.attention.rotary for layer in reversed(decoder.layers) if layer.attention.rotary), None)
    if rotary is not None:
        given, factors = _rope(architecture, decoder, config)
        own |= {"rope.dimension_count": 2 * len(rotary.inverse_frequencies), **given}
    names = set(stored_tensors(decoder, places_of(architecture, decoder, False))) | factors.keys()
    fields = {f"{architecture.name}.{key}": _as_stored(value) for key, value in own.items()}
    fields |= {"general.architecture": architecture.name, "tokenizer.ggml.tokens": range(decoder.vocab_size)}
    return Metadata(fields, names, factors)


def _as_stored(value: Any) -> Any:
    return float(np.float32(value)) if isinstance(value, float) else value


def _windows(architecture: Architecture, decoder: Decoder) -> dict[str, Any]:
    if not architecture.windows:
        return {"attention.sliding_window": 0} if architecture.name == "phi3" else {}
    slides = [layer.attention.window is not None for layer in decoder.layers]
    if not any(slides):
        if architecture.name == "gemma3":
            return {}
        return {"attention.sliding_window": decoder.max_position_embeddings}
    window = max(window for window in decoder.windows if window is not None)
    every = {"gemma2": 2, "gemma3": 6}[architecture.name]
    usual = [(index + 1) % every != 0 for index in range(len(slides))]
    pattern = {} if slides == usual else {"attention.sliding_window_pattern": slides}
    return {"attention.sliding_window": window, **pattern}


def _rope(
    architecture: Architecture, decoder: Decoder, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and tensors that say the rope parameters of a configuration."""
    config = {**FAMILIES[decoder.family].defaults, **config}
    given = rope_parameters(config)
    own, factors = {}, {}
    rotaries = [layer.attention.rotary for layer in decoder.layers]
    if decoder.family == "gemma3_text":
        given = given.get("full_attention", given)
        local = next((layer.attention.rotary for layer in decoder.layers if layer.attention.window), None)
        if local is not None:
            own["rope.freq_base_swa"] = _theta(local)
    theta = given.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base")
    if theta is None:
        theta = 1_000_000.0 if decoder.family == "gemma3_text" else 10000.0
    own["rope.freq_base"] = float(theta)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(given["factor"])}
    elif kind == "yarn":
        original = given.get("original_max_position_embeddings") or config["max_position_embeddings"]
        usual = 0.1 * float(np.log(float(given["factor"]))) + 1.0
        own |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(given["factor"]),
            "rope.scaling.original_context_length": int(original),
        }
        if abs(rotaries[0].scaling / usual - 1) > PRECISION:
            own["rope.scaling.attn_factor"] = rotaries[0].scaling / usual
    elif kind not in ("default", "dynamic"):
        if not architecture.frequencies:
            raise InputError(f"llama.cpp's {architecture.name} has no rope scaling {kind}", REMEDY)
        rotary = next(rotary for rotary in rotaries if rotary)
        turned = 2 * len(rotary.inverse_frequencies)
        plain = float(theta) ** (-np.arange(0, turned, 2) / turned)
        short = (plain / np.array(rotary.inverse_frequencies)).astype(np.float32)
        if kind == "llama3" and FREQUENCIES in architecture.frequencies:
            return own, {FREQUENCIES: short}
        long = np.array(given.get("long_factor") or short, np.float32)
        own |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.attn_factor": rotary.scaling,
            "rope.scaling.original_context_length": longrope_context(given, config) or decoder.max_position_embeddings,
        }
        factors = {LONG: long, SHORT: short}
    return own, factors


def _theta(rotary: Rotary) -> float:
    """The base of frequencies that nothing scales: the last of n pairs turns by theta ** (-(n - 1) / n)."""
    pairs = len(rotary.inverse_frequencies)
    return float(np.float32(rotary.inverse_frequencies[-1] ** (-pairs / (pairs - 1)))) if pairs > 1 else 10000.0


def _difference(meant: Decoder, understood: Decoder) -> str | None:
    """The first thing in which two decoders compute differently; None where they are the same."""
    for field in fields(Decoder):
        if field.name not in ("family", "layers") and not _same(*(getattr(d, field.name) for d in (meant, understood))):
            return f"{field.name.replace('_', ' ')} {getattr(meant, field.name)}"
    for index, (one, other) in enumerate(zip(meant.layers, understood.layers, strict=True)):
        for kind, part, seen in (("attention", one.attention, other.attention), ("MLP", one.mlp, other.mlp)):
            if (name := _part_difference(part, seen)) is not None:
                return f"{kind} of layer {index}: {name.replace('_', ' ')} {_short(getattr(part, name))}"
    return None


def _part_difference(part: Attention | Mlp, seen: Attention | Mlp) -> str | None:
    for field in fields(part):
        values = [getattr(each, field.name) for each in (part, seen)]
        if field.name == "scale":
            values = [part.score_scale, seen.score_scale]
        if field.name == "activation" and set(values) <= {"gelu", "gelu_tanh"}:
            continue  # llama.cpp has one of them, from a table of fp16
        if not _same(*values):
            return field.name
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Rotary) and isinstance(other, Rotary):
        pairs = (one.inverse_frequencies, other.inverse_frequencies)
        return (
            len(pairs[0]) == len(pairs[1])
            and np.allclose(*pairs, rtol=PRECISION, atol=0)
            and _same(one.scaling, other.scaling)
        )
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= PRECISION * abs(one)
    return one == other


def _short(value: Any) -> str:
    return "with other angles" if isinstance(value, Rotary) else str(value)
