"""Configurations of weights that other programs quantised: the layout of each module, and words for people.

Whether a module is quantised is what the files say: ignored and excluded ones are stored as floats. It reads no
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import checked, printable
from edgeprune.model.checkpoint.layouts import ALL, FLOAT8, Awq, Block, Gptq, Layout, Mxfp4, Packed, Scaled
from edgeprune.model.checkpoint.packed import SCALE
from edgeprune.model.checkpoint.places import StoredTensor
from edgeprune.model.checkpoint.quantization import CLASS, details_of, is_own, module_of, quantisation
from edgeprune.model.checkpoint.targets import DETAILS, groups_by_module, pattern_of

Details = Mapping[str, Any]

WHOLE = "Give the checkpoint that it was made from, in fp32, fp16 or bf16."
READ = "Read are compressed-tensors in whole numbers or FP8, GPTQ, AWQ (gemm), FP8 in blocks, and experts in MXFP4."
PLAN = "`edgeprune plan` takes this one too."
TABLE = "Embedding"  # the class of a table, where CLASS is that of a matrix
SHORT = ("I8", FLOAT8)  # types of a `weight` that is no float
IGNORED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")
CACHED = tuple(f"{name}_{part}" for name in "qkv" for part in ("scale", "zero_point"))


@dataclass(frozen=True)
class Foreign:
    """The weights that another program quantised. words: method and formats. layout_of: by a module's name and class;
    None for floats.
    """

    words: str
    layout_of: Callable[[str, str], Layout | None]

    def layout(self, tensor: StoredTensor, type_of: Callable[[str], str | None]) -> Layout | None:
        """Returns the layout of a tensor; None where it is stored as floats.

        type_of: gives the type of what the files hold under a name in place of `weight`; None where it is missing.
        """
        stacked = tensor.place.stacked
        if len(tensor.shape) != 2 + stacked or not (stacked or tensor.key.endswith("weight")):
            return None
        kind = TABLE if tensor.names[0] in ("embedding", "positions") else CLASS
        layout = self.layout_of(module_of(tensor), kind)
        if layout is None or stacked != isinstance(layout, Mxfp4):
            return None
        if tensor.place.transposed and not isinstance(layout, Gptq | Mxfp4):
            return None
        names = layout.parts(tensor.matrix)
        is_stored = any(type_of(name) in SHORT if name == "weight" else type_of(name) for name in names)
        return layout if is_stored else None


def is_of_activations(name: str) -> bool:
    """Returns whether a tensor of this name quantises activations or the cache, which here are floats."""
    module, _, part = name.rpartition(".")
    return part in IGNORED or (part in CACHED and module.endswith("attn"))


def foreign_of(config: Mapping[str, Any]) -> Foreign | None:
    """Returns how another program quantised the weights of a configuration; None for floats and what edgeprune wrote.

    Raises InputError for a method or a format that is not read, and for fields that make no sense.
    """
    method = None if is_own(config) else quantisation(config)
    if method is None:
        return None
    if method not in METHODS:
        raise _unread(method)
    return METHODS[method](details_of(config))


def _unread(what: str) -> InputError:
    return InputError(f"the checkpoint is quantised ({printable(what, 100)})", f"{WHOLE} {READ} {PLAN}")


def _compressed_tensors(details: Details) -> Foreign:
    """Returns compressed-tensors' groups, of which each has a format."""
    form = {
        "config_groups": {...: {"targets": [str], "weights": dict, ...: Any}},
        "format": str,
        "quantization_status": str,
        ...: Any,
    }
    checked(details, form, DETAILS[0])
    details = details | {"ignore": checked(details.get("ignore") or [], [str], f"{DETAILS[0]}.ignore")}
    sparsity = details.get("sparsity_config") or {}
    if details["quantization_status"] != "compressed":
        raise _unread(f"compressed-tensors, {details['quantization_status']}")
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense" or details.get("transform_config"):
        raise _unread(f"compressed-tensors, {'sparse' if sparsity else 'transformed'}")
    # One layout for each group, and words for all.
    layouts = {id(group): _group_layout(group, details["format"]) for group in details["config_groups"].values()}
    group_of = groups_by_module(details)

    def layout_of(module: str, kind: str) -> Layout | None:
        group = group_of(module, kind)
        return None if group is None else layouts[id(group)]

    words = dict.fromkeys(_words_of(layout) for layout in layouts.values())
    others = [group.get("input_activations") for group in details["config_groups"].values()]
    floats = "; activations are floats here" if any(others) or details.get("kv_cache_scheme") else ""
    return Foreign(f"compressed-tensors, {' and '.join(words)}{floats}", layout_of)


def _group_layout(group: Details, container: str) -> Layout:
    """Returns the layout of a group. Raises InputError for one that is not read."""
    weights, container = group["weights"], group.get("format") or container
    number = (weights.get("type", "int"), weights.get("num_bits", 8))
    block, symmetric = _block(weights), weights.get("symmetric", True)
    # Only the older writers order the inputs of groups, and then always say in what order.
    ordered = True if weights.get("actorder") in (True, "group", "dynamic") else None
    if block is not None and isinstance(symmetric, bool) and _is_size(number[1]) and not weights.get("dynamic"):
        packs = number in (("int", 2), ("int", 4), ("int", 8)) and block[0] in ((1, ALL) if symmetric else (1,))
        if container == "pack-quantized" and packs:
            return Packed(number[1], block, not symmetric, ordered)
        if container in ("int-quantized", "naive-quantized") and number == ("int", 8):
            return Scaled("I8", SCALE, block, not symmetric, ordered)
        if container in ("float-quantized", "naive-quantized") and number == ("float", 8) and symmetric:
            return Scaled(FLOAT8, SCALE, block, ordered=ordered)
    raise _unread(f"compressed-tensors, {container} of {number[0]}{number[1]} by {weights.get('strategy')}")


def _block(weights: Details) -> Block | None:
    """Returns the block of a group's arguments; None for a strategy that is not read."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "group":
        return (1, size) if _is_size(size) else None
    if strategy == "block":
        return _sizes(weights.get("block_structure"))
    return {"tensor": (ALL, ALL), "channel": (1, ALL)}.get(str(strategy))


def _sizes(value: object) -> Block | None:
    return tuple(value) if isinstance(value, list) and len(value) == 2 and all(map(_is_size, value)) else None


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _gptq(details: Details) -> Foreign:
    """Returns GPTQ's one format, which `dynamic` changes for some modules."""
    version = str(details.get("checkpoint_format") or details.get("format") or "gptq").lower()
    odd = [name for name in ("is_marlin_format", "rotation") if details.get(name)]
    if version not in ("gptq", "gptq_v2") or odd or details.get("pack_dtype", "int32") != "int32":
        raise _unread(f"gptq, {odd[0] if odd else version}")
    own = checked(details.get("dynamic") or {}, {...: dict}, f"{DETAILS[0]}.dynamic")
    excluded = [pattern_of(name.removeprefix("-:")) for name in own if name.startswith("-:")]
    special = {pattern_of(name.removeprefix("+:")): details | own[name] for name in own if not name.startswith("-:")}

    def layout_of(module: str, kind: str) -> Layout | None:
        if kind != CLASS or any(pattern.match(module) for pattern in excluded):
            return None
        return one(next((fields for pattern, fields in special.items() if pattern.match(module)), details))

    def one(fields: Details) -> Gptq:
        bits, group = fields.get("bits"), fields.get("group_size", 128)
        if not (_is_size(bits) and bits in (2, 3, 4, 8)) or not (group == -1 or _is_size(group)):
            raise _unread(f"gptq, {bits} bits in groups of {group}")
        return Gptq(bits, (1, ALL if group == -1 else group), version == "gptq", bool(fields.get("desc_act")))

    words = dict.fromkeys(_words_of(one(fields)) for fields in (details, *special.values()))
    return Foreign(f"GPTQ, {' and '.join(words)}", layout_of)


def _awq(details: Details) -> Foreign:
    """Returns AWQ's one format."""
    version = str(details.get("version") or details.get("format") or details.get("checkpoint_format") or "gemm").lower()
    bits = details.get("bits", details.get("w_bit", 4))
    group = details.get("group_size", details.get("q_group_size", 128))
    if version != "gemm" or bits != 4 or details.get("backend") == "llm-awq" or not (group == -1 or _is_size(group)):
        raise _unread(f"awq, {version}, {bits} bits in groups of {group}")
    layout = Awq((1, ALL if group == -1 else group))
    return Foreign(f"AWQ, {_words_of(layout)}", lambda _, kind: layout if kind == CLASS else None)


def _fp8(details: Details) -> Foreign:
    """Returns FP8 with a scale for each block, or for each matrix, as transformers writes it."""
    stored = details.get("weight_block_size")
    block = (ALL, ALL) if stored is None else _sizes(stored)
    known = {"fmt": "e4m3", "scale_fmt": "float", "expert_dtype": "fp8"}
    odd = [str(details[name]) for name, value in known.items() if (details.get(name) or value) != value]
    if block is None or odd:
        raise _unread(f"fp8, {odd[0] if odd else stored}")
    layout = Scaled(FLOAT8, "weight_scale_inv", block, ordered=False)
    return Foreign(f"{_words_of(layout)}; activations are floats here", lambda *_: layout)


def _mxfp4(details: Details) -> Foreign:
    """Returns MXFP4, which the experts alone have."""
    return Foreign("MXFP4 in groups of 32; activations are floats here", lambda *_: Mxfp4())


METHODS = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq, "fp8": _fp8, "mxfp4": _mxfp4}


def _words_of(layout: Layout) -> str:
    """Returns the bits of a layout, and what has a scale in common."""
    bits = "FP8" if isinstance(layout, Scaled) and layout.dtype == FLOAT8 else f"{layout.bits} bits"
    rows, columns = layout.block
    if rows == 1:
        return f"{bits} in groups of {columns}" if columns else f"{bits} with a scale for each output"
    return f"{bits} in blocks of {rows} x {columns}" if rows else f"{bits} with one scale for each matrix"
