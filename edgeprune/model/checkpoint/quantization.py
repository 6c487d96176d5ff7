"""The weight formats in a config.json: compressed-tensors' `quantization_config`, read into formats and written.

A group of it has the format of some modules by their names in the checkpoint; our own fields name those that others
take for floats: the embedding's, and formats that compressed-tensors does not have. It knows no tensors' values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.files import checked, printable
from edgeprune.model.checkpoint.configuration import RESTORE, checkpoint_tensors, valued_formats
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.checkpoint.packed import packed_parts
from edgeprune.model.checkpoint.places import StoredTensor
from edgeprune.model.checkpoint.safetensors_file import Packing
from edgeprune.model.checkpoint.targets import DETAILS, groups_by_module
from edgeprune.model.decoder import Decoder
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]

EMBEDDING_FORMAT = "edgeprune_embedding_format"  # `float` or a format; in every checkpoint of ours that has formats
MODULE_FORMATS = (
    "edgeprune_formats"  # by module, such as `layers.3.attention` or `head`: those that no other loader reads
)
FIELDS = {
    "quant_method": str,
    "format": str,
    "quantization_status": str,
    "config_groups": {...: {"targets": [str], "weights": dict, ...: Any}},
    "ignore": [str],
    ...: Any,
}
PACKED, MIXED = "pack-quantized", "mixed-precision"
STORED_AS = {"whole": PACKED, "e4m3": "float-quantized", "e2m1": "nvfp4-pack-quantized"}  # by the levels of a format
STORAGES = ("packed", "floats")  # of the formats that a checkpoint holds
E4M3 = "torch.float8_e4m3fn"
CLASS = "Linear"  # of every module that has a format, as a target


def details_of(config: Config) -> object:
    """Returns what a configuration says of the quantisation of its weights; None where it says nothing."""
    return next((config[name] for name in DETAILS if config.get(name)), None)


def quantisation(config: Config) -> str | None:
    """Returns the method by which a configuration says that its weights are quantised; None where it does not."""
    details = details_of(config)
    if not details:
        return None
    method = details.get("quant_method") if isinstance(details, dict) else None
    return printable(method, 60) if isinstance(method, str) else "by an unnamed method"


def is_own(config: Config) -> bool:
    """Returns whether edgeprune quantised the weights of a configuration, whose codes are read then."""
    return EMBEDDING_FORMAT in config


def has_embedding_codes(config: Config) -> bool:
    """Returns whether the embedding of a configuration has a format, so that its floats are the values of codes."""
    return config.get(EMBEDDING_FORMAT, "float") != "float"


def with_stored_formats(decoder: Decoder, config: Config) -> Decoder:
    """Returns the decoder with the weight formats of its configuration. Raises InputError where they make no sense."""
    if not is_own(config):
        return decoder
    # The modules' formats by the names of the weights in them.
    tensors = [tensor for tensor in checkpoint_tensors(decoder).values() if _is_module(tensor)]
    found = _formats([module_of(tensor) for tensor in tensors], config.get(DETAILS[0]))
    formats = {name: found[module_of(tensor)] for tensor in tensors for name in tensor.names}
    # Those of a layer's attention and MLP, and of the tables.
    own = _own_formats(config.get(MODULE_FORMATS, {}), decoder)
    layers = [
        tuple(own.get(module) or _common(f"{module}.", formats) for module in _modules_of(index))
        for index in range(len(decoder.layers))
    ]
    embedding = _named(config[EMBEDDING_FORMAT], EMBEDDING_FORMAT)
    head = embedding if decoder.tie_word_embeddings else own.get("head") or formats["head"]
    return decoder.with_formats(layers, embedding, head)


def _modules_of(index: int) -> tuple[str, str]:
    """Returns the names of a layer's modules in MODULE_FORMATS."""
    return f"layers.{index}.attention", f"layers.{index}.mlp"


def _own_formats(named: object, decoder: Decoder) -> dict[str, WeightFormat]:
    """Returns what the field MODULE_FORMATS says, by module. Raises InputError where it makes no sense."""
    checked(named, {...: str}, MODULE_FORMATS)
    modules = {module for index in range(len(decoder.layers)) for module in _modules_of(index)} | {"head"}
    if unknown := sorted(named.keys() - modules):
        raise InputError(
            f"{MODULE_FORMATS} names {printable(unknown[0], 60)}, which is no module of the model", RESTORE
        )
    return {module: _named(name, MODULE_FORMATS) for module, name in named.items()}


def _common(prefix: str, formats: Mapping[str, WeightFormat | None]) -> WeightFormat | None:
    """Returns the format of all weights with a prefix, but for routers; None for floats. Raises InputError where they
    differ.
    """
    of_module = {form for name, form in formats.items() if name.startswith(prefix) and not name.endswith(".router")}
    if len(of_module) > 1:
        names = ", ".join(sorted(form.name if form else "float" for form in of_module))
        raise InputError(f"{DETAILS[0]} has several formats in {prefix.rstrip('.')}: {names}", RESTORE)
    return next(iter(of_module), None)


def _named(name: object, field: str) -> WeightFormat | None:
    """Returns the format of a name in a field. Raises InputError for an unknown one."""
    if name == "float":
        return None
    if not isinstance(name, str) or name not in WEIGHT_FORMATS:
        raise InputError(f"{field} {printable(repr(name), 60)} is not a weight format", RESTORE)
    return WEIGHT_FORMATS[name]


def _formats(modules: Iterable[str], details: object) -> dict[str, WeightFormat | None]:
    """Returns the format of each module, by its name in the checkpoint; None for floats.

    Raises InputError for other than the formats that edgeprune stores.
    """
    if details is None:
        return dict.fromkeys(modules)
    checked(details, FIELDS, DETAILS[0])
    stored = tuple(details[name] for name in ("quant_method", "format", "quantization_status"))
    if stored[1] not in (MIXED, *STORED_AS.values()) or stored[::2] != ("compressed-tensors", "compressed"):
        raise InputError(f"{DETAILS[0]} is of {printable(', '.join(stored), 60)}, which is not read", RESTORE)
    group_of = groups_by_module(details)
    formats = {id(group): _format(group) for group in details["config_groups"].values()}
    groups = {module: group_of(module, CLASS) for module in modules}
    return {module: None if group is None else formats[id(group)] for module, group in groups.items()}


def _format(group: Config) -> WeightFormat:
    """Returns the format of a group. Raises InputError where it is none of ours."""
    weights = group["weights"]
    odd = ["dynamic"] * bool(weights.get("dynamic", False))
    odd += ["output_activations"] * (group.get("output_activations") is not None)
    for form in (form for form in WEIGHT_FORMATS.values() if form.storage in STORAGES):
        found = {name: weights.get(name) for name in _arguments(form)}
        is_alike = found | {"type": weights.get("type", "int")} == _arguments(form)
        if not odd and is_alike and group.get("input_activations") == _activations(form):
            return form
    raise InputError(f"{DETAILS[0]} has a format that is not known: {printable(weights, 200)}", RESTORE)


def _arguments(form: WeightFormat) -> dict[str, Any]:
    """Returns a format in compressed-tensors' words."""
    return {
        "num_bits": form.bits,
        "type": "int" if form.levels == "whole" else "float",
        "symmetric": form.offset is None,
        "strategy": _strategy(form, "channel"),
        "group_size": form.group,
    } | ({"scale_dtype": E4M3, "zp_dtype": E4M3} if form.e4m3_scales else {})


def _activations(form: WeightFormat) -> dict[str, Any] | None:
    """Returns how a format rounds what a layer reads, in compressed-tensors' words."""
    if form.activation_bits is None:
        return None
    arguments = {"num_bits": form.activation_bits, "strategy": _strategy(form, "tensor")}
    # The scales of groups are found when the layer reads them, under a fixed one.
    arguments["dynamic"] = "local" if form.e4m3_scales else False
    return {name: value for name, value in (_arguments(form) | arguments).items() if value is not None}


def _strategy(form: WeightFormat, of_one_scale: str) -> str:
    """Returns compressed-tensors' word for what shares a scale."""
    if form.group is None:
        return of_one_scale
    return "tensor_group" if form.e4m3_scales else "group"


def module_of(tensor: StoredTensor) -> str:
    """Returns the name of the module that has a tensor as its weight."""
    return tensor.key.removesuffix(".weight")


def _is_module(tensor: StoredTensor) -> bool:
    """Returns whether a tensor is the matrix of a linear layer."""
    is_matrix = len(tensor.shape) == 2 and not tensor.place.stacked
    return is_matrix and tensor.names[0] not in ("embedding", "positions")


def can_be_packed(family: str) -> bool:
    """Returns whether a checkpoint of a family can hold weight formats: not where it has no nn.Linear but experts."""
    return not any(place.transposed and not place.stacked for place in FAMILIES[family].places.values())


def check_packable(decoder: Decoder) -> None:
    """Raises InputError for weight formats that cannot be stored so that others read them.

    transformers joins the experts of a layer and takes all that it joins, in all layers, for one symmetric format:
    that of the first group that names experts. Where they differ, some load as other numbers, without an error.
    """
    valued = valued_formats(decoder)
    formats = {name: form for name, form in decoder.weight_formats.items() if name not in valued}
    if formats and not can_be_packed(decoder.family):
        raise InputError(
            f"a checkpoint of the family {decoder.family} cannot hold weights of few bits: it stores matrices as "
            "(inputs, outputs), and compressed-tensors has none of these",
            "Use --weights float.",
        )
    places = FAMILIES[decoder.family].places
    experts = {
        formats.get(name)
        for name, shape in decoder.shapes().items()
        if ".experts." in name and len(shape) == 2 and not places["mlp.experts.down"].stacked
    }
    if formats and experts and (len(experts) > 1 or None in experts or any(form.offset for form in experts)):
        names = ", ".join(sorted(form.name if form else "float" for form in experts))
        raise InputError(
            f"the experts have the weight formats {names}: transformers reads one symmetric format for all",
            "Use the same symmetric format for the MLPs of all layers, or --weights float.",
        )


def without_quantization(config: Config) -> dict[str, Any]:
    """Returns a configuration without what it says of weight formats."""
    return {name: value for name, value in config.items() if name not in (*DETAILS, EMBEDDING_FORMAT, MODULE_FORMATS)}


def own_fields(decoder: Decoder) -> dict[str, Any]:
    """Returns our own fields of config.json for a decoder with weight formats."""
    modules = {
        name: module.weight_format
        for index, layer in enumerate(decoder.layers)
        for name, module in zip(_modules_of(index), (layer.attention, layer.mlp), strict=True)
        if module is not None
    }
    if not decoder.tie_word_embeddings:
        modules["head"] = decoder.head_format
    valued = {".".join(name.split(".")[:3]) for name in valued_formats(decoder)}
    named = {
        name: form.name
        for name, form in modules.items()
        if form is not None and (form.storage not in STORAGES or name in valued)
    }
    embedding = decoder.embedding_format.name if decoder.embedding_format else "float"
    return {EMBEDDING_FORMAT: embedding} | ({MODULE_FORMATS: named} if named else {})


def packing_of(decoder: Decoder, dtype: torch.dtype) -> Packing | None:
    """Returns how the decoder's codes are stored; None where only an embedding has codes. dtype: of the floats.

    The scales are of the same type, whose bits are enough. But transformers multiplies the codes of experts by their
    scales in the type in which these are stored, whatever it loads the model in: with experts they are fp32.
    """
    import torch

    if not any(tensor.form for tensor in checkpoint_tensors(decoder).values()):
        return None
    has_experts = any(layer.mlp and layer.mlp.experts for layer in decoder.layers)
    return Packing(_details(decoder), partial(packed_parts, scale_dtype=torch.float32 if has_experts else dtype))


def _details(decoder: Decoder) -> dict[str, Any]:
    """Returns the field quantization_config.

    A module is named as it is; experts, of which there are thousands and which transformers finds by this word in a
    pattern, by one pattern for each of their matrices. Linear layers of floats are ignored by name: vLLM asks for that.
    """
    # Names in the order of the layers, each once.
    targets: dict[WeightFormat | None, dict[str, None]] = {None: {}}
    for tensor in checkpoint_tensors(decoder).values():
        if _is_module(tensor):
            targets.setdefault(tensor.form, {}).update(dict.fromkeys(_targets(tensor)))
    # A reader that takes one format for all takes int8 first, and then stops at the size of the others.
    ordered = [form for form in WEIGHT_FORMATS.values() if form in targets]
    groups = {}
    for index, form in enumerate(ordered):
        group = {"targets": list(targets[form]), "weights": _arguments(form)}
        if form.activation_bits is not None:
            # Without a format of its own, readers take a group that rounds activations for one that is not packed.
            group |= {"input_activations": _activations(form), "format": STORED_AS[form.levels]}
        groups[f"group_{index}"] = group
    stored_as = {STORED_AS[form.levels] for form in ordered}
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as.pop() if len(stored_as) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(targets[None]),
    }


def _targets(tensor: StoredTensor) -> list[str]:
    """Returns how a group names a tensor's module; transformers calls every head lm_head, whatever the file has."""
    if "{e}" not in tensor.place.key:
        return [module_of(tensor)] + (["lm_head"] if tensor.names == ("head",) else [])
    pattern = re.escape(tensor.place.key.removesuffix(".weight"))
    return [f"re:^{pattern.replace(re.escape('{i}'), r'[0-9]+').replace(re.escape('{e}'), r'[0-9]+')}$"]
