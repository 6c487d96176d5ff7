"""LlamaGen's own checkpoint files: the configuration of one, and a directory that reads like any other checkpoint.

Shapes show the widths, but neither the number of heads nor that of picture tokens, with which the same weights compute
something else. The file's training arguments, its name, the published sizes and the user's hints give these numbers,
and must agree. It does not know how the weights are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.cache import cache_folder, cached_folder
from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import checkpoint_tensors, decoder_of
from edgeprune.model.decoder import Decoder

Shape = tuple[int, ...]
Claims = list[tuple[str, int]]  # the source of a number, and the number

TOKENS, CLASSES = "tok_embeddings.weight", "cls_embedding.embedding_table.weight"
LAYER = re.compile(r"layers\.(\d+)\.")
COMPILED = "_orig_mod."  # what torch.compile puts before every name
ANGLES = "freqs_cis"  # cos and sin of every position, which older files hold
PREFIX = 1  # positions before the picture: the class
DOWNSAMPLE = 16  # pixels a token, each side, where the training arguments have no number
NAME = re.compile(r"c2i_(?:B|L|XL|XXL|3B)_(\d+)(?!\d)")
ONLY_SIZE = 384  # pixels a side of the sizes that exist for one resolution
DAMAGED = "Download the checkpoint again, or give the original's file."
CHOOSE = "Give a class-conditional generator of LlamaGen's (c2i_*.pt), a checkpoint's directory, or a .gguf file."


@dataclass(frozen=True)
class Hints:
    """Numbers that the user adds where a file does not have them: pixels a side, and attention heads."""

    image_size: int | None = None
    num_heads: int | None = None


NO_HINTS = Hints()


@dataclass(frozen=True)
class Published:
    """One of the sizes that LlamaGen's authors published."""

    name: str
    heads: int
    one_size: bool = False  # there are weights for 384 pixels alone


PUBLISHED = {  # by layers and hidden_size
    (12, 768): Published("B", 12),
    (24, 1024): Published("L", 16),
    (36, 1280): Published("XL", 20, True),
    (48, 1536): Published("XXL", 24, True),
    (24, 3200): Published("3B", 32, True),
    (22, 2048): Published("1B", 32),
    (48, 2560): Published("XXXL", 40),
    (32, 4096): Published("7B", 32),
}


def check_hints(hints: Hints, decoder: Decoder, spec: str) -> None:
    """Raises InputError for a hint that contradicts the model's own configuration or has no use for the model."""
    options = [f"--{name.replace('_', '-')}" for name, value in vars(hints).items() if value is not None]
    if decoder.picture is None:
        if options:
            raise InputError(
                f"{options[0]} is for image generators, {spec} is a language model", f"Leave {options[0]} out."
            )
        return
    heads, side = decoder.layers[0].attention.num_attention_heads, decoder.picture.side
    if hints.num_heads not in (None, heads):
        raise InputError(f"--num-heads is {hints.num_heads}, but {spec} has {heads} heads", "Leave --num-heads out.")
    if hints.image_size is not None and (hints.image_size < side or hints.image_size % side):
        raise InputError(
            f"--image-size {hints.image_size} is not a multiple of the {side} tokens a side of {spec}",
            "Give the size that the model was trained for, or leave it out.",
        )


def config_of(path: Path, stored: Mapping[str, Shape], arguments: Mapping[str, Any], hints: Hints) -> dict[str, Any]:
    """Returns the configuration of a file's model.

    stored: the shapes of its tensors by name; arguments: of its training. Raises InputError for another kind of file,
    for a tensor that is missing, superfluous or of another shape, for sources that contradict each other, and where no
    source gives a number that is needed.
    """
    shapes = {name.removeprefix(COMPILED): shape for name, shape in stored.items()}
    _check_kind(path, shapes)
    angles = shapes.pop(ANGLES, None)
    # Sizes that the shapes show, and the heads, which they do not.
    (vocabulary, dim), (rows, _) = (_matrix(path, shapes, name) for name in (TOKENS, CLASSES))
    layers = len({match[1] for name in shapes if (match := LAYER.match(name))})
    rotation = None if angles is None else _rotation(path, angles)
    published = PUBLISHED.get((layers, dim))
    heads = _heads(path, dim, published, rotation, hints)
    head_dim = dim // heads
    groups = (_matrix(path, shapes, "layers.0.attention.wqkv.weight")[0] // head_dim - heads) // 2
    if groups < 1 or heads % groups:
        raise InputError(
            f"layers.0.attention.wqkv.weight of {path} does not hold queries, keys and values of {heads} heads",
            "Check --num-heads.",
        )
    # Classes and the whole configuration.
    classes, has_null = _classes(path, rows, arguments)
    _check_arguments(path, arguments, vocabulary)
    config = {
        "model_type": "llamagen",
        "architectures": ["LlamaGenForCausalImage"],
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "intermediate_size": _matrix(path, shapes, "layers.0.feed_forward.w1.weight")[0],
        "vocab_size": vocabulary,
        "num_classes": classes,
        "has_null_class": has_null,
        "image_side": _side(path, arguments, published, rotation, hints),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    if rotation is None or "downsample_size" in arguments:  # otherwise the tokens were counted, not derived from pixels
        config["downsample_size"] = _number(path, arguments, "downsample_size") or DOWNSAMPLE
    # The configuration must make sense, and ask for exactly the tensors that the file has.
    try:
        decoder = decoder_of(config)
    except InputError as error:
        reason = error.message.partition("senseless: ")[2] or error.message
        raise InputError(f"{path} does not describe a model: {reason}", "Check --image-size and --num-heads.") from None
    _check_tensors(path, shapes, decoder)
    return config


def _check_kind(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Raises InputError for tensors that are not those of a class-conditional generator."""
    if TOKENS in shapes:
        if any(".cap_proj." in name for name in shapes):
            raise InputError(f"{path} generates images from texts (t2i), which is not supported", CHOOSE)
    elif "quantize.embedding.weight" in shapes:
        raise InputError(
            f"{path} is a codec, which turns a generator's codes into pixels",
            "Give it by --codec, and the generator (c2i_*.pt) as the model.",
        )
    elif (path.parent / "config.json").is_file():
        raise InputError(f"{path} holds weights alone", f"Give the checkpoint's directory: {path.parent}")
    else:
        raise InputError(f"{path} is a file of weights, but not of a LlamaGen: it has no {TOKENS}", CHOOSE)


def _matrix(path: Path, shapes: Mapping[str, Shape], name: str) -> tuple[int, int]:
    """Returns the shape of a matrix. Raises InputError where it is missing or not a matrix."""
    if name not in shapes:
        raise InputError(f"{path} has no tensor {name}", DAMAGED)
    if len(shapes[name]) != 2 or 0 in shapes[name]:
        raise InputError(f"tensor {name} of {path} has shape {shapes[name]}, not that of a matrix", DAMAGED)
    return shapes[name]


def _check_tensors(path: Path, shapes: Mapping[str, Shape], decoder: Decoder) -> None:
    """Raises InputError for a tensor that is missing, superfluous, or not of the shape that the decoder asks for."""
    wanted = {name: tensor.shape for name, tensor in checkpoint_tensors(decoder).items()}
    for name, shape in wanted.items():
        if name not in shapes:
            raise InputError(f"{path} has no tensor {name}", DAMAGED)
        if shapes[name] != shape:
            raise InputError(
                f"tensor {name} of {path} has shape {shapes[name]}, but its others ask for {shape}", DAMAGED
            )
    if unknown := shapes.keys() - wanted.keys():
        raise InputError(f"{path} has the tensor {min(unknown)}, which no LlamaGen has", DAMAGED)


def _agreed(what: str, claims: Claims, remedy: str, path: Path) -> int:
    """Returns the number that all sources give.

    what: the number in words. Raises InputError, with the remedy, where there is no source or two of them differ.
    """
    if not claims:
        raise InputError(f"{path} does not contain {what}", remedy)
    (first, value), *others = claims
    for source, other in others:
        if other != value:
            raise InputError(f"{what} of {path} is {value} by {first}, but {other} by {source}", remedy)
    return value


def _rotation(path: Path, shape: Shape) -> tuple[int, int]:
    """Returns the number of picture tokens and head_dim, by the shape of cos and sin: (positions, pairs, 2)."""
    if len(shape) != 3 or shape[2] != 2 or shape[0] <= PREFIX or shape[1] < 1:
        raise InputError(f"{ANGLES} of {path} has shape {shape}, not (positions, pairs, 2)", DAMAGED)
    return shape[0] - PREFIX, 2 * shape[1]


def _heads(path: Path, dim: int, published: Published | None, rotation: tuple[int, int] | None, hints: Hints) -> int:
    """Returns the number of heads. Raises InputError where the sources differ or it does not divide the width."""
    claims: Claims = []
    if hints.num_heads is not None:
        claims.append(("--num-heads", hints.num_heads))
    if rotation is not None:
        claims.append((f"the head_dim {rotation[1]} of its {ANGLES}", dim // rotation[1]))
    if published is not None:
        claims.append((f"the size of LlamaGen-{published.name}", published.heads))
    heads = _agreed("the number of heads", claims, "Give --num-heads as the model was trained with.", path)
    if heads < 1 or dim % heads or (rotation is not None and dim != heads * rotation[1]):
        raise InputError(f"{heads} heads do not divide the width {dim} of {path}", "Give another --num-heads.")
    return heads


def _side(
    path: Path,
    arguments: Mapping[str, Any],
    published: Published | None,
    rotation: tuple[int, int] | None,
    hints: Hints,
) -> int:
    """Returns the number of tokens a side. Raises InputError where the sources differ.

    A published size counts only where the file itself gives nothing: others may have trained it for other pixels.
    """
    # Pixels a side by every source that has them, and the tokens that they make.
    downsample = _number(path, arguments, "downsample_size") or DOWNSAMPLE
    trained, name_match = _number(path, arguments, "image_size"), NAME.search(path.name)
    pixels: Claims = []
    if hints.image_size is not None:
        pixels.append((f"--image-size {hints.image_size}", hints.image_size))
    if trained is not None:
        pixels.append((f"its training argument image_size {trained}", trained))
    if name_match:
        pixels.append((f"its name ({name_match[1]} pixels)", int(name_match[1])))
    if published is not None and published.one_size and trained is None and rotation is None:
        pixels.append((f"LlamaGen-{published.name}, which exists for {ONLY_SIZE} pixels alone", ONLY_SIZE))
    for source, size in pixels:
        if size < 1 or size % downsample:
            raise InputError(
                f"{size} pixels by {source} are not a multiple of {downsample}, the pixels a token",
                "Give --image-size as 256, 384 or 512.",
            )
    claims = [(source, size // downsample) for source, size in pixels]
    # Cos and sin have a row for each token.
    if rotation is not None:
        side = math.isqrt(rotation[0])
        if side**2 != rotation[0]:
            raise InputError(f"{ANGLES} of {path} has {rotation[0]} tokens, which are not a square", DAMAGED)
        claims.append((f"its {ANGLES}", side))
    return _agreed(
        "the number of tokens a side", claims, "Give --image-size as the model was trained for: 256 or 384.", path
    )


def _number(path: Path, arguments: Mapping[str, Any], name: str) -> int | None:
    """Returns a training argument; None where there is none. Raises InputError for anything but a positive integer."""
    value = arguments.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"the training argument {name} of {path} is {value!r}", DAMAGED)
    return value


def _classes(path: Path, rows: int, arguments: Mapping[str, Any]) -> tuple[int, bool]:
    """Returns the number of classes, and whether the table's last row is the null class.

    A model that was trained without the null class has none. Raises InputError where the training arguments contradict
    the rows.
    """
    count, dropout = _number(path, arguments, "num_classes"), arguments.get("class_dropout_prob")
    nulls: Sequence[int] = [rows - count] if count is not None else []
    if dropout is not None:
        nulls = [*nulls, int(dropout != 0)]
    if len(set(nulls)) > 1 or not set(nulls) <= {0, 1}:
        described = f"num_classes {count}" + ("" if dropout is None else f", class_dropout_prob {dropout}")
        raise InputError(f"{CLASSES} of {path} has {rows} rows, but its training arguments are {described}", DAMAGED)
    null = nulls[0] if nulls else 1
    return rows - null, bool(null)


def _check_arguments(path: Path, arguments: Mapping[str, Any], vocabulary: int) -> None:
    """Raises InputError where a training argument contradicts the weights."""
    for name, expected in (("vocab_size", vocabulary), ("cls_token_num", PREFIX)):
        argument = _number(path, arguments, name)
        if argument not in (None, expected):
            raise InputError(
                f"the training argument {name} of {path} is {argument}, but its weights have {expected}", DAMAGED
            )


def prepared(path: Path, config: Mapping[str, Any]) -> Path:
    """Returns a directory in the cache with this configuration and a link to the file, which is not copied.

    Raises InputError where no such directory can be made.
    """
    text, target = json.dumps(config, indent=2, sort_keys=True) + "\n", path.resolve()
    digest = hashlib.sha256(f"{target}\n{text}".encode()).hexdigest()

    def fill(folder: Path) -> None:
        name = "model.safetensors" if path.suffix == ".safetensors" else "pytorch_model.bin"
        (folder / name).symlink_to(target)
        (folder / "config.json").write_text(text, encoding="utf-8")

    return cached_folder(cache_folder() / "models" / f"{digest[:32]}-llamagen", fill)
