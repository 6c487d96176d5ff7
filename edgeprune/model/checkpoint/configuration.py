"""The way from a config.json to a Decoder, and the config.json of a pruned Decoder.

It does not know where a family keeps its weights.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable, read_json
from edgeprune.model.checkpoint.adapt import FORMER_TYPES, LAYER_TYPES
from edgeprune.model.checkpoint.families import FAMILIES, Family
from edgeprune.model.checkpoint.nested import text_part
from edgeprune.model.checkpoint.places import StoredTensor, formats_by_value, stored_tensors
from edgeprune.model.decoder import Activation, Attention, Decoder, Layer, Mlp
from edgeprune.model.rope import SenselessError, longrope_context, rope_parameters, rotary_of, whole_heads
from edgeprune.precision import WeightFormat

Config = dict[str, Any]
RESTORE = "Restore the checkpoint's own config.json."

MAX_LAYERS, MAX_SIZE = 10_000, 2**31  # beyond any model; a damaged file must not ask for all memory
MAX_EXPERTS = 200_000  # of all layers together
HEADS = "edgeprune_heads"  # key/value heads, query heads per group, of a checkpoint that holds more, which are zeros
LAYER_WIDTHS = "edgeprune_layer_widths"  # key/value heads, query heads per group, MLP channels of every layer
UNNAMED_WIDTHS = {"fixed": ("num_key_value_heads", "head_dim"), "whole": ("head_dim",)}
"""The widths that a configuration does not name, by the rule that a family has for its heads: others give them."""
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
}


def family_of(config: Config) -> Family:
    """Returns the family of a configuration. Raises InputError that names what is not supported, and what is."""
    model_type = config.get("model_type")
    supported = f"Supported are: {', '.join(FAMILIES)} (decoder-only)."
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = printable(repr(model_type or config.get("architectures")))
        raise InputError(f"unsupported architecture {named}", supported)
    # The class, where the configuration names one, must be the family's.
    family = FAMILIES[model_type]
    architectures = config.get("architectures") or [family.architecture]
    if not isinstance(architectures, list):
        raise _senseless(f"architectures {architectures!r}")
    if family.architecture not in [str(name).removeprefix("FSDP") for name in architectures]:  # as FSDP saves it
        raise InputError(
            f"unsupported architecture {printable(', '.join(map(str, architectures)))} of the family {model_type}",
            f"Give a checkpoint of {family.architecture}.",
        )
    # Fields whose values this program cannot handle.
    try:
        reason = _refuse(family.defaults | config, family) or family.refuse(family.defaults | config)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise _senseless(error) from None
    if reason is not None:
        raise InputError(f"unsupported {model_type} configuration: {printable(reason)}", "Choose another checkpoint.")
    return family


def _refuse(config: Config, family: Family) -> str | None:
    """Returns why a configuration of any family, with its defaults, cannot be handled; None where it can."""
    activation = config.get(family.activation) or "silu"
    if activation not in ACTIVATIONS:
        return f"{family.activation} {activation!r} ({', '.join(ACTIVATIONS)} are supported)"
    if isinstance(kinds := config.get("layer_types"), list) and (
        unknown := set(map(str, kinds)) - {*LAYER_TYPES, *FORMER_TYPES}
    ):
        return f"layer_types {min(unknown)!r} ({', '.join(LAYER_TYPES)} are supported)"
    return None


def _senseless(reason: object) -> InputError:
    if isinstance(reason, KeyError):
        reason = f"{reason.args[0]} is missing"
    elif isinstance(reason, Exception) and not isinstance(reason, SenselessError):
        reason = repr(reason)
    return InputError(f"config.json is incomplete or senseless: {printable(reason)}", RESTORE)


def _plain(config: Config, family: Family) -> Config:
    """Returns the configuration with the family's defaults, and with its fields also by Llama's names."""
    config = family.defaults | (config if family.rotates_part else whole_heads(config))
    fields = {name: own_name for name, own_name in family.fields.items() if config.get(own_name) is not None}
    return config | {name: config[own_name] for name, own_name in fields.items()} | family.plain(config)


def decoder_of(config: Config) -> Decoder:
    """Returns the Decoder that a configuration describes. Raises InputError naming a missing or senseless field."""
    family = family_of(config)
    # Read it in Llama's words, then apply what the family does otherwise.
    try:
        plain = _plain(config, family)
        decoder = family.adapt(_llama(plain, family), plain)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise _senseless(error) from None
    # Check what no single field shows.
    if decoder.picture is not None:
        _check_picture(decoder)
    attention, experts = decoder.layers[0].attention, decoder.layers[0].mlp.experts
    if experts is not None and not (
        1 <= experts.num_experts_per_tok <= experts.num_experts < MAX_EXPERTS // len(decoder.layers)
    ):
        raise _senseless(f"{experts.num_experts_per_tok} of {experts.num_experts} experts for a token")
    numbers = [decoder.norm_eps, decoder.embedding_scale, decoder.logits_scale, attention.score_scale]
    numbers += [value for rotary in decoder.rotaries for value in (*rotary.inverse_frequencies, rotary.scaling)]
    if not all(map(math.isfinite, numbers)):
        raise _senseless(f"its rope parameters, its scales or its {family.norm_eps} are not finite")
    if attention.num_attention_heads % attention.num_key_value_heads:
        raise InputError(
            f"{attention.num_attention_heads} query heads do not divide into {attention.num_key_value_heads} "
            "key/value heads",
            "Check config.json.",
        )
    # Apply the fields of edgeprune's own.
    if HEADS in config:
        return _without_padding(decoder, config[HEADS])
    return _with_own_widths(decoder, config[LAYER_WIDTHS]) if LAYER_WIDTHS in config else decoder


def stored_decoder(config: Config) -> Decoder:
    """Returns the Decoder whose tensors the checkpoint holds. Raises InputError.

    It is that of `decoder_of` together with the heads of zeros that `loadable` added.
    """
    return decoder_of({name: value for name, value in config.items() if name != HEADS})


def _without_padding(decoder: Decoder, heads: object) -> Decoder:
    """Returns the Decoder without heads of zeros. heads: the field HEADS. Raises InputError where it makes no sense."""
    stored_groups, stored_heads, channels = decoder.layer_widths[0]
    try:
        groups, heads_per_group = map(int, heads)
    except (TypeError, ValueError) as error:
        raise _senseless(f"{HEADS}: {error}") from None
    if not (0 < groups <= stored_groups and 0 < heads_per_group <= stored_heads):
        raise _senseless(f"{HEADS} {heads!r} of {stored_groups} x {stored_heads}")
    return decoder.with_widths(groups, heads_per_group, channels)


def _llama(config: Config, family: Family) -> Decoder:
    """Returns the Decoder of a configuration that is read as a plain Llama's."""
    # Attention and its rotary embedding.
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    key_value_heads, head_dim = heads, hidden // heads
    if family.heads != "fixed":
        key_value_heads = int(config.get("num_key_value_heads") or key_value_heads)
    if family.heads not in ("fixed", "whole"):
        head_dim = int(config.get("head_dim") or head_dim)
    attention = Attention(heads, key_value_heads, head_dim)
    _check_sizes(config, attention)
    parameters = rope_parameters(config)
    if not {"full_attention", "sliding_attention"} & parameters.keys():  # otherwise the family reads both
        attention = replace(attention, rotary=rotary_of(parameters, config, head_dim))
    # MLP and the model around both; every layer is the same here.
    mlp = Mlp(int(config["intermediate_size"]), ACTIVATIONS[config.get(family.activation) or "silu"])
    return Decoder(
        family=family.model_type,
        hidden_size=hidden,
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        norm_eps=float(config.get(family.norm_eps, 1e-6)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        layers=(Layer(attention, mlp),) * int(config["num_hidden_layers"]),
    )


def _with_own_widths(decoder: Decoder, widths: object) -> Decoder:
    """Returns the Decoder with other widths in each layer, as the field LAYER_WIDTHS has them.

    Raises InputError where the field makes no sense.
    """
    try:
        layer_widths = [(int(groups), int(heads), int(channels)) for groups, heads, channels in widths]
        if min(map(min, layer_widths)) < 0 or min(heads for _, heads, _ in layer_widths) < 1:
            raise ValueError("widths below zero")
        return decoder.with_layer_widths(layer_widths)
    except (TypeError, ValueError) as error:
        raise _senseless(f"{LAYER_WIDTHS}: {error}") from None


def _check_sizes(config: Config, attention: Attention) -> None:
    """Raises InputError for a size that no model has."""
    names = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "max_position_embeddings")
    for name in (*names, "num_attention_heads", "num_key_value_heads", "head_dim"):
        if isinstance(value := config.get(name), str | bool):
            raise SenselessError(f"{name} {value!r} is no number")
    sizes = {name: int(config[name]) for name in names}
    sizes |= {name: getattr(attention, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    for name, size in sizes.items():
        limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if not 0 < size < limit:
            raise _senseless(f"{name} {size}")
    if attention.head_dim % 2 or attention.head_dim > sizes["hidden_size"]:
        raise _senseless(f"head_dim {attention.head_dim} (even, at most hidden_size, is supported)")


def _check_picture(decoder: Decoder) -> None:
    """Raises InputError for a picture that no model generates."""
    picture, positions = decoder.picture, decoder.max_position_embeddings
    if picture.side < 1 or picture.num_classes < 0 or picture.inputs < 1 or decoder.input_vocab_size >= MAX_SIZE:
        raise _senseless(
            f"a picture of {picture.side} x {picture.side} tokens, {picture.num_classes} classes"
            f"{'' if picture.has_null else ' and no other opening'}"
        )
    if positions != next((rotary.grid.positions for rotary in decoder.rotaries if rotary.grid), picture.tokens):
        raise _senseless(f"{positions} positions are not a square of picture tokens")


def checkpoint_tensors(decoder: Decoder) -> dict[str, StoredTensor]:
    """Returns the tensors of the decoder's checkpoint by name, in the order in which their last weights are used."""
    return stored_tensors(decoder, FAMILIES[decoder.family].places)


def valued_formats(decoder: Decoder) -> dict[str, WeightFormat]:
    """Returns the formats of the weights that the decoder's checkpoint holds by their values, by name."""
    return formats_by_value(decoder, FAMILIES[decoder.family].places)


def with_final_outputs(decoder: Decoder, config: Config) -> tuple[Decoder, Config]:
    """Returns the same model without a factor of its output projections: their weights have it multiplied in already.

    Codes stand for these final values, and their scales would not stay what they are when divided by it.
    """
    if decoder.residual_scale == 1.0:
        return decoder, config
    return replace(decoder, residual_scale=1.0), config | {"residual_multiplier": 1.0}  # Granite alone has one


def loadable(decoder: Decoder, source: Config, fills: bool = False) -> Decoder:
    """Returns the decoder as a standard configuration like `source` can describe its widths.

    It adds heads of zeros to a uniform decoder where transformers derives head_dim from the number of heads, or
    requires that this number divides hidden_size; as many as fill the groups of a weight format: whole groups of heads
    where these are enough, else query heads in every group too. fills: they have to fill hidden_size, whatever the
    family's own rule. Raises InputError where no number will do.
    """
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    head_rule = "whole" if fills else FAMILIES[decoder.family].heads
    # Where any number of heads can be described, or the layers differ, nothing is added.
    if longrope_context(rope_parameters(source), source) is not None:
        head_rule = "whole"  # its validation takes hidden_size over their number for head_dim
    if not decoder.is_uniform or None in (attention, mlp) or head_rule == "free":
        return decoder
    if _is_mistral(decoder) and not fills:
        return decoder
    # Otherwise add heads until the rule is met, and the groups of a format are whole.
    hidden, head_dim = decoder.hidden_size, attention.head_dim
    formats = [layer.attention.weight_format for layer in decoder.layers]
    multiple = max((form.multiple for form in formats if form), default=1)
    for heads in range(attention.heads_per_group, hidden + 1):
        for groups in range(attention.num_key_value_heads, hidden // heads + 1):
            is_whole = groups * heads * head_dim == hidden
            if head_rule == "divide":
                is_whole = hidden % (groups * heads) == 0
            if is_whole and groups * heads * head_dim % multiple == 0:
                return decoder.with_widths(groups, heads, mlp.intermediate_size)
    raise InputError(
        f"no {decoder.family} has a number of heads of {head_dim} that holds these {attention.num_attention_heads}",
        "Leave the checkpoint out with --no-checkpoint.",
    )


def _is_mistral(decoder: Decoder) -> bool:
    """Returns whether a Llama must be written as a Mistral, which allows its number of heads but has no biases."""
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    biases = attention.input_bias or attention.output_bias or mlp.input_bias
    return decoder.family == "llama" and decoder.hidden_size % attention.num_attention_heads != 0 and not biases


def config_for(decoder: Decoder, source: Config, fills: bool = False) -> Config:
    """Returns the configuration of a Decoder that was pruned from `source`, as `loadable` stores it; all else is kept.

    It is a standard one where all layers are whole and alike; otherwise it has their widths in a field of edgeprune's
    own. LlamaConfig refuses a hidden_size that the number of heads does not divide, even where head_dim is given;
    MistralConfig, for the same weights and names, has no such check.
    """
    # The heads that are left, where the checkpoint holds more.
    own_heads, decoder = decoder.layer_widths[0][:2], loadable(decoder, source, fills)
    source = {name: value for name, value in source.items() if name != HEADS}
    if decoder.layer_widths[0][:2] != own_heads:
        source[HEADS] = list(own_heads)
    # The layers that are left, and the fields with one value for each.
    layer, family = decoder.layers[0], FAMILIES[decoder.family]
    depth = {family.fields.get("num_hidden_layers", "num_hidden_layers"): len(decoder.layers)}
    depth |= _layer_kinds(decoder, source)
    if not decoder.is_uniform or layer.attention is None or layer.mlp is None:
        return source | depth | {LAYER_WIDTHS: decoder.layer_widths}
    # A standard configuration: drop what described the source's code, and choose the family.
    config = {name: value for name, value in source.items() if name not in ("auto_map", "_name_or_path", "torch_dtype")}
    if _is_mistral(decoder):
        family = FAMILIES["mistral"]
        config["sliding_window"] = None
        for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
            config.pop(name, None)
        # without it transformers takes any large vocabulary of a `mistral` for an old one with a wrong pattern
        config["transformers_version"] = version("transformers")
    # The widths, by the family's names.
    widths: Config = {
        "num_attention_heads": layer.attention.num_attention_heads,
        "num_key_value_heads": layer.attention.num_key_value_heads,
        "head_dim": layer.attention.head_dim,
        "intermediate_size": layer.mlp.intermediate_size,
    }
    for name in UNNAMED_WIDTHS.get(family.heads, ()):
        del widths[name]
    config.setdefault(
        family.fields.get("max_position_embeddings", "max_position_embeddings"), decoder.max_position_embeddings
    )
    return (
        config
        | depth
        | {family.fields.get(name, name): value for name, value in widths.items()}
        | {
            "model_type": family.model_type,
            "architectures": [family.architecture],
            "tie_word_embeddings": decoder.tie_word_embeddings,
        }
    )


def _layer_kinds(decoder: Decoder, source: Config) -> Config:
    """Returns the fields with one value for each layer, for the layers that are left.

    They are those that the family always has, and layer_types where the source had it or the windows differ.
    """
    attentions, always = [layer.attention for layer in decoder.layers], FAMILIES[decoder.family].by_layer
    kinds: Config = {}
    if "layer_types" in always or source.get("layer_types") or len(decoder.windows) > 1:
        kinds["layer_types"] = [LAYER_TYPES[bool(attention and attention.window)] for attention in attentions]
    if "no_rope_layers" in always:
        kinds["no_rope_layers"] = [int(bool(attention and attention.rotary)) for attention in attentions]
    return kinds


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the content of a directory's config.json, or the text part of a model of images and text.

    Raises InputError where it is missing or cannot be read.
    """
    return text_part(read_whole_config(directory))


def read_whole_config(directory: Path) -> dict[str, Any]:
    """Returns the content of a directory's config.json. Raises InputError where it is missing or cannot be read."""
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} has no config.json", "Give a directory that transformers can load.")
    return read_json(directory / "config.json", remedy=RESTORE)
