"""The decoder and the fields with which a GGUF file holds a model. It knows no values of weights and writes no file.

A file can hold a model where its fields, read back, describe the same one. llama.cpp computes what an architecture's
name and its few fields describe; anything else that a Decoder has (a window, a scale, a bias, rope factors) would be
lost silently. This module therefore refuses such a model before any work.
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
from edgeprune.model.gguf.config import OLMO_PERIOD, config_of
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
    "hunyuan_v1_dense": ("hunyuan-dense",),
    "olmoe": ("olmoe",),
    "gemma": ("gemma",),
    "gemma2": ("gemma2",),
    "gemma3_text": ("gemma3",),
    "phi3": ("phi3", "llama"),
    "smollm3": ("smollm3",),
    "olmo2": ("olmo2",),
    "olmo3": ("olmo2",),
    "exaone4": ("exaone4",),
    "ernie4_5": ("ernie4_5",),
    "ministral3": ("llama",),
    "granite": ("granite",),
    "granitemoehybrid": ("granite",),
    "stablelm": ("stablelm",),
    "gpt2": ("gpt2",),
    "gpt_neox": ("gptneox",),
    "starcoder2": ("starcoder2",),
}
"""The architectures that compute a family, the preferred one first.

The others hold, among others, a model whose remaining heads do not fill the hidden size.
"""
BY_LAYER = {"llama": "deci", "mistral": "deci", "ministral3": "deci", "qwen2": "deci"}
"""The architecture that computes a family whose layers differ in width."""
FILLING = 32  # channels of an MLP of zeros
REMEDY = "Deploy the checkpoint or the ONNX graph; a GGUF file cannot hold this model."
PRECISION = 1e-4  # relative, of frequencies and scales, which llama.cpp computes in fp32


@dataclass(frozen=True)
class Held:
    """The form in which a GGUF file holds a decoder.

    decoder: as the file holds it, with heads of zeros where they are needed. factor: by which the queries are
    multiplied, since the architecture has a score scale of its own. fields: the file's fields, without those of the
    tokenizer. factors: tensors of rope factors by name.
    """

    architecture: Architecture
    decoder: Decoder
    factor: float
    fields: dict[str, Any]
    factors: dict[str, np.ndarray]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Returns the tensors of the file by key, in the order of the decoder's weights."""
        places = places_of(self.architecture, self.decoder, self.architecture.fused_qkv)
        return stored_tensors(self.decoder, places)


def check_family(decoder: Decoder) -> None:
    """Raises InputError for a family that llama.cpp does not know."""
    if decoder.family not in BY_FAMILY:
        raise InputError(f"llama.cpp has no architecture for the family {decoder.family}", REMEDY)


def held(decoder: Decoder, config: Mapping[str, Any]) -> Held:
    """Returns the form in which a GGUF file holds the decoder of a checkpoint's configuration.

    Raises InputError where no architecture of llama.cpp can compute the model.
    """
    check_family(decoder)
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    if not decoder.is_uniform or attention is None or mlp is None:
        check_by_layer(decoder)
        return _held(ARCHITECTURES[BY_LAYER[decoder.family]], _with_modules(decoder), config)
    # Architectures that compute the decoder as it is; as a last resort the preferred one, filled with heads of zeros.
    wanted = [ARCHITECTURES[name] for name in BY_FAMILY[decoder.family]]
    whole = attention.query_size == decoder.hidden_size
    tries = [(architecture, decoder) for architecture in wanted if whole or not architecture.whole]
    if not whole and wanted[0].whole and (full := _filled(decoder)) is not None:
        tries.append((wanted[0], full))
    # The first that can hold it is taken; else the first refusal is reported.
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
            f"llama.cpp's {wanted[0].name} requires heads that fill the hidden size of {decoder.hidden_size}, "
            f"but {attention.num_attention_heads} of {attention.head_dim} do not",
            REMEDY,
        )
    )


def check_by_layer(decoder: Decoder) -> None:
    """Raises InputError for a family whose layers have one width in every architecture of llama.cpp."""
    if decoder.family not in BY_LAYER:
        raise InputError(
            f"a GGUF file cannot hold layers of different widths of the family {decoder.family}",
            f"Use --layout uniform; llama.cpp takes them of {', '.join(BY_LAYER)}.",
        )


def _with_modules(decoder: Decoder) -> Decoder:
    """Returns the decoder with modules of zeros where llama.cpp needs them.

    It leaves out the attention of a layer without MLP, and takes the width of a head from the first layer's.
    """
    mlp = replace(next(layer.mlp for layer in decoder.layers if layer.mlp), intermediate_size=FILLING)
    first, *others = decoder.layers
    attention = first.attention or replace(decoder.first_attention, num_attention_heads=1, num_key_value_heads=1)
    layers = (replace(first, attention=attention), *others)
    layers = (Layer(layer.attention, layer.mlp or (layer.attention and mlp)) for layer in layers)
    return replace(decoder, layers=tuple(layers))


def _filled(decoder: Decoder) -> Decoder | None:
    """Returns the decoder with heads of zeros that fill the hidden size; None where heads of this width cannot.

    The key/value heads are as few as possible. In a family in which every query head has keys and values of its own,
    there are as many of them as query heads.
    """
    attention, fixed = decoder.layers[0].attention, FAMILIES[decoder.family].heads == "fixed"
    heads, rest = divmod(decoder.hidden_size, attention.head_dim)
    for groups in range(heads if fixed else attention.num_key_value_heads, heads + 1):
        if not rest and heads % groups == 0 and heads // groups >= attention.heads_per_group:
            return decoder.with_widths(groups, heads // groups, decoder.layers[0].mlp.intermediate_size)
    return None


def _held(architecture: Architecture, decoder: Decoder, config: Mapping[str, Any]) -> Held:
    """Returns the form for one architecture. Raises InputError where its fields, read back, describe another model."""
    if not architecture.windows and (windows := [window for window in decoder.windows if window is not None]):
        # Without windows every query sees all positions: the same within a context as short as the window.
        context = min(decoder.max_position_embeddings, *windows)
        layers = tuple(
            Layer(layer.attention and replace(layer.attention, window=None), layer.mlp) for layer in decoder.layers
        )
        decoder = replace(decoder, layers=layers, max_position_embeddings=context)
    if architecture.head and decoder.tie_word_embeddings:
        decoder = replace(decoder, tie_word_embeddings=False)
    # Read the fields back, as any reader of the file will.
    metadata = _metadata(architecture, decoder, config)
    understood = decoder_of(config_of(metadata, "the file"))
    # The queries make up for another scale of the scores.
    scale = understood.first_attention.score_scale
    factor = decoder.first_attention.score_scale / scale
    if abs(factor - 1) > 1e-7:
        layers = tuple(
            Layer(layer.attention and replace(layer.attention, scale=scale), layer.mlp) for layer in decoder.layers
        )
        decoder = replace(decoder, layers=layers)
    else:
        factor = 1.0
    # What still differs cannot be held, nor can biases that llama.cpp does not load.
    if (difference := _difference(decoder, understood)) is not None:
        raise InputError(f"llama.cpp's {architecture.name} cannot compute this model: {difference}", REMEDY)
    form = Held(architecture, decoder, factor, dict(metadata.fields), dict(metadata.factors))
    allowed = architecture.biases | {"norm_bias", "attention.norm_bias", "mlp.norm_bias"}
    for name in decoder.shapes():
        weight = name.split(".", 2)[-1] if name.startswith("layers.") else name
        if weight.endswith("_bias") and weight not in allowed:
            raise InputError(f"llama.cpp's {architecture.name} does not load {weight.replace('_', ' ')}", REMEDY)
    return form


def _metadata(architecture: Architecture, decoder: Decoder, config: Mapping[str, Any]) -> Metadata:
    """Returns the metadata that the file will have for the decoder; of the tokens only the number."""
    # Sizes that every architecture states.
    attention, mlp = decoder.first_attention, next(layer.mlp for layer in decoder.layers if layer.mlp)
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
    if architecture.by_layer:
        groups_and_heads = [(groups, groups * heads) for groups, heads, _ in decoder.layer_widths]
        own |= {
            "feed_forward_length": [channels for *_, channels in decoder.layer_widths],
            "attention.head_count": [heads for _, heads in groups_and_heads],
            "attention.head_count_kv": [groups for groups, _ in groups_and_heads],
        }
    # Experts, windows, caps and scales, where the architecture has them.
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
    # Rotary positions.
    factors: dict[str, np.ndarray] = {}
    if decoder.rotaries:
        rope_fields, factors = _rope(architecture, decoder, config)
        own |= {"rope.dimension_count": 2 * len(decoder.rotaries[0].inverse_frequencies), **rope_fields}
    # Under the names and in the fp32 of the file.
    names = set(stored_tensors(decoder, places_of(architecture, decoder, False))) | factors.keys()
    fields = {f"{architecture.name}.{key}": _as_stored(value) for key, value in own.items()}
    fields |= {"general.architecture": architecture.name, "tokenizer.ggml.tokens": range(decoder.vocab_size)}
    return Metadata(fields, names, factors)


def _as_stored(value: Any) -> Any:
    return float(np.float32(value)) if isinstance(value, float) else value


def _windows(architecture: Architecture, decoder: Decoder) -> dict[str, Any]:
    """Returns the fields of sliding windows; none where the architecture or the decoder has none."""
    if not architecture.windows:
        return {"attention.sliding_window": 0} if architecture.name == "phi3" else {}
    # Without any sliding layer: no field, or a window as long as the context.
    is_sliding = [layer.attention.window is not None for layer in decoder.layers]
    if not any(is_sliding):
        if architecture.name in ("gemma3", "olmo2"):
            return {}
        return {"attention.sliding_window": decoder.max_position_embeddings}
    # The period is implied where the layers follow it.
    window = max(window for window in decoder.windows if window is not None)
    period = {"gemma2": 2, "gemma3": 6, "olmo2": OLMO_PERIOD}[architecture.name]
    default = [(index + 1) % period != 0 for index in range(len(is_sliding))]
    pattern = {} if is_sliding == default else {"attention.sliding_window_pattern": is_sliding}
    return {"attention.sliding_window": window, **pattern}


def _rope(
    architecture: Architecture, decoder: Decoder, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the fields and the tensors, each (rotary_dim / 2,), that hold the rope parameters of a configuration."""
    # Base frequency; Gemma 3's sliding layers have one of their own.
    config = {**FAMILIES[decoder.family].defaults, **config}
    parameters = rope_parameters(config)
    own, factors = {}, {}
    attentions = [layer.attention for layer in decoder.layers if layer.attention and layer.attention.rotary]
    rotary = next((attention.rotary for attention in attentions if not attention.window), attentions[0].rotary)
    if decoder.family in ("gemma3_text", "olmo3"):
        parameters = parameters.get("full_attention", parameters)
    if decoder.family == "gemma3_text":
        local = next((attention.rotary for attention in attentions if attention.window), None)
        if local is not None:
            own["rope.freq_base_swa"] = _theta(local)
    theta = parameters.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base")
    if theta is None:
        theta = {"gemma3_text": 1_000_000.0, "olmo3": 500_000.0}.get(decoder.family, 10000.0)
    if decoder.family == "hunyuan_v1_dense":
        theta = _theta(rotary)
    own["rope.freq_base"] = float(theta)
    # Kinds of scaling that have fields of their own.
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    elif kind == "yarn":
        original = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
        default = 0.1 * float(np.log(float(parameters["factor"]))) + 1.0
        own |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(parameters["factor"]),
            "rope.scaling.original_context_length": int(original),
        }
        if abs(rotary.scaling / default - 1) > PRECISION:
            own["rope.scaling.attn_factor"] = rotary.scaling / default
    elif kind not in ("default", "dynamic"):
        if not architecture.frequencies:
            raise InputError(f"llama.cpp's {architecture.name} has no rope scaling {kind}", REMEDY)
        # Any other kind as factors of the frequencies, in fp32.
        rotary_dim = 2 * len(rotary.inverse_frequencies)
        plain = float(theta) ** (-np.arange(0, rotary_dim, 2) / rotary_dim)  # (rotary_dim / 2,)
        short = (plain / np.array(rotary.inverse_frequencies)).astype(np.float32)
        if kind == "llama3" and FREQUENCIES in architecture.frequencies:
            return own, {FREQUENCIES: short}
        long = np.array(parameters.get("long_factor") or short, np.float32)
        own |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.attn_factor": rotary.scaling,
            "rope.scaling.original_context_length": longrope_context(parameters, config)
            or decoder.max_position_embeddings,
        }
        factors = {LONG: long, SHORT: short}
    return own, factors


def _theta(rotary: Rotary) -> float:
    """Returns the base of frequencies without scaling: the last of n pairs turns by theta ** (-(n - 1) / n)."""
    pairs = len(rotary.inverse_frequencies)
    return float(np.float32(rotary.inverse_frequencies[-1] ** (-pairs / (pairs - 1)))) if pairs > 1 else 10000.0


def _difference(meant: Decoder, understood: Decoder) -> str | None:
    """Returns the first field in which two decoders compute differently, with its value; None where there is none."""
    # Fields of the decoder, then those of the modules of its layers.
    for field in fields(Decoder):
        if field.name not in ("family", "layers") and not _same(*(getattr(d, field.name) for d in (meant, understood))):
            return f"{field.name.replace('_', ' ')} {getattr(meant, field.name)}"
    for index, (layer, understood_layer) in enumerate(zip(meant.layers, understood.layers, strict=True)):
        for kind, module, understood_module in (
            ("attention", layer.attention, understood_layer.attention),
            ("MLP", layer.mlp, understood_layer.mlp),
        ):
            if module is None and understood_module is None:
                continue
            if (name := _part_difference(module, understood_module)) is not None:
                return f"{kind} of layer {index}: {name.replace('_', ' ')} {_short(getattr(module, name))}"
    return None


def _part_difference(module: Attention | Mlp, understood: Attention | Mlp) -> str | None:
    """Returns the name of the first field in which two modules compute differently; None where there is none."""
    for field in fields(module):
        values = [getattr(side, field.name) for side in (module, understood)]
        if field.name == "scale":
            values = [module.score_scale, understood.score_scale]
        if field.name == "activation" and set(values) <= {"gelu", "gelu_tanh"}:
            continue  # llama.cpp has one of them only, from a table of fp16
        if not _same(*values):
            return field.name
    return None


def _same(value: Any, other: Any) -> bool:
    """Returns whether two values of a field are equal, numbers up to PRECISION."""
    if isinstance(value, Rotary) and isinstance(other, Rotary):
        pairs = (value.inverse_frequencies, other.inverse_frequencies)
        return (
            len(pairs[0]) == len(pairs[1])
            and np.allclose(*pairs, rtol=PRECISION, atol=0)
            and _same(value.scaling, other.scaling)
        )
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other) <= PRECISION * abs(value)
    return value == other


def _short(value: Any) -> str:
    return "with other angles" if isinstance(value, Rotary) else str(value)
