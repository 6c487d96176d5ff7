"""The content of a GGUF file: its metadata and where its tensors lie. It knows no weights of a decoder.

Layout (the GGUF specification of ggml, versions 2 and 3, little-endian): magic, version, counts, key/value pairs,
tensor descriptions, padding, data. The file is parsed in this module because the reader of the `gguf` package makes a
numpy view of every string, which takes seconds for a vocabulary that needs a tenth of a second.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.files import is_pointer, pointer_error, printable
from edgeprune.model.gguf.names import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

RESTORE = "Download the file again, or give the original Hugging Face directory."
WHOLE = "Give the .gguf file of the whole model; merge a LoRA adapter with llama.cpp's llama-export-lora."
PARTS = {  # by general.type or general.architecture
    "adapter": "a LoRA adapter",
    "mmproj": "a projector of pictures or sounds (mmproj)",
    "clip": "a projector of pictures or sounds (mmproj)",
    "imatrix": "an importance matrix",
}
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
MAX_NESTING = 4  # of arrays in arrays; no known writer nests at all
VERSIONS = (2, 3)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    shape: as in torch, (out_features, in_features). data: the stored bytes of its rows, a view of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: np.ndarray

    def values(self) -> np.ndarray:
        """Returns the dequantised tensor, of `shape`, fp32; a view of the file where the file stores fp32.

        Raises InputError for a type that the gguf package cannot dequantise.
        """
        return self._dequantised(self.data).reshape(self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns the dequantised rows `start` to `stop` of a vector or matrix, fp32.

        The rows of stacked matrices are numbered consecutively. Raises InputError as `values` does.
        """
        if len(self.shape) == 1:
            return self.values()[start:stop]
        return self._dequantised(self.data.reshape(-1, self.data.shape[-1])[start:stop])  # (stop - start, in_features)

    def _dequantised(self, data: np.ndarray) -> np.ndarray:
        from gguf.quants import dequantize

        try:
            return dequantize(data, self.type)
        except NotImplementedError as error:
            raise InputError(f"tensor {self.name} of type {self.type.name}: {error}", RESTORE) from None


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file as read: its metadata by key and its tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


@dataclass
class _Cursor:
    """A position in the file's bytes, which advances as values are read."""

    data: mmap.mmap
    position: int = 0

    def bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, {end} were expected")
        content = self.data[self.position : end]
        self.position = end
        return content

    def number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self.bytes(struct.calcsize(layout)))
        return value

    def string(self) -> str:
        return self.bytes(self.number("<Q")).decode("utf-8")

    def value(self, kind: int, nesting: int = 0) -> Any:
        """Reads a value of one of the types of the format, an array as a list. Raises ValueError for other types."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            if nesting == MAX_NESTING:
                raise ValueError("arrays are nested too deep")
            element, count = self.number("<I"), self.number("<Q")
            if element in SCALARS:
                dtype = np.dtype(SCALARS[element])
                return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()
            return [self.value(element, nesting + 1) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"unknown type of metadata {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.bytes(dtype.itemsize), dtype)[0].item()


def read_gguf(path: Path) -> GgufFile:
    """Reads the metadata of a GGUF file and finds its tensors; their data stays in the file.

    Raises InputError for a file that is not GGUF, is damaged or is truncated.
    """
    if is_pointer(path):
        raise pointer_error(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file", RESTORE)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _read(data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", RESTORE) from None
    except (ValueError, KeyError, OverflowError, MemoryError, struct.error) as error:
        raise InputError(f"{path} is damaged or truncated: {printable(error)}", RESTORE) from None


def _read(data: mmap.mmap) -> GgufFile:
    """Parses the bytes of a file. Raises ValueError where they break the format."""
    # Header: version and counts.
    cursor = _Cursor(data, len(b"GGUF"))
    if (version := cursor.number("<I")) not in VERSIONS:
        raise ValueError(f"GGUF version {version} (2 and 3 are supported, little-endian)")
    tensor_count, field_count = cursor.number("<Q"), cursor.number("<Q")
    # Key/value pairs.
    fields = {}
    for _ in range(field_count):
        name = cursor.string()
        fields[name] = cursor.value(cursor.number("<I"))
    # Tensor descriptions; the data begins behind them, at a multiple of the alignment.
    places = [_place(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return GgufFile(fields, {place[0]: _tensor(data, start, *place) for place in places})


def _place(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Reads the name, shape, type and offset of one tensor; GGUF stores the innermost size first."""
    name, dimensions = cursor.string(), cursor.number("<I")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))
    return name, shape[::-1], cursor.number("<I"), cursor.number("<Q")


def _tensor(data: mmap.mmap, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    """Returns a tensor as a view of the file. Raises ValueError where the file ends before the tensor does."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    dtype = GGMLQuantizationType(kind)
    byte_shape = quant_shape_to_byte_shape(shape or (1,), dtype)  # (rows, bytes of a row)
    end = start + offset + prod(byte_shape)
    if end > len(data):
        raise ValueError(f"tensor {name} ends at byte {end}, the file has {len(data)}")
    values = np.frombuffer(data, np.uint8, prod(byte_shape), start + offset).reshape(byte_shape)
    return GgufTensor(name, shape, dtype, values)


@dataclass(frozen=True)
class Metadata:
    """Metadata of a GGUF file: all that it states of a model apart from the values of the weights.

    fields: the key/value pairs of the file. names: the names of its tensors. factors: its tensors of rope factors by
    name, each (pairs,).
    """

    fields: Mapping[str, Any]
    names: Collection[str]
    factors: Mapping[str, np.ndarray]

    @property
    def architecture(self) -> Architecture:
        """Returns the architecture. Raises InputError, which lists the supported ones, for any other, and for a file of
        another kind than a model's.
        """
        name, kind = (str(self.fields.get(f"general.{key}", "model")) for key in ("architecture", "type"))
        if kind != "model" or name in PARTS:
            raise InputError(
                f"the GGUF file is no model of its own: {PARTS.get(name) or PARTS.get(kind) or printable(kind, 60)}",
                WHOLE,
            )
        if name not in ARCHITECTURES:
            named = printable(name, 60)
            raise InputError(f"unsupported GGUF architecture {named!r}", f"Supported are: {', '.join(ARCHITECTURES)}.")
        return ARCHITECTURES[name]

    def get(self, key: str, default: Any = None) -> Any:
        """Returns one of the architecture's own fields, such as `llama.block_count` for `block_count`."""
        return self.fields.get(f"{self.architecture.name}.{key}", default)

    def number(self, key: str) -> int:
        """Returns an integer field; of one that is given for each layer, the number that all layers share, or the
        largest where the architecture takes different ones.

        Raises KeyError, TypeError or ValueError.
        """
        value = self.fields[f"{self.architecture.name}.{key}"]
        if isinstance(value, list):
            if len(set(value)) != 1 and not self.architecture.by_layer:
                raise ValueError(f"{key} {value} differs between layers")
            value = max(value)
        return int(value)

    def numbers(self, key: str, count: int) -> list[int]:
        """Returns an integer field for each of so many layers. Raises KeyError, TypeError or ValueError."""
        value = self.fields[f"{self.architecture.name}.{key}"]
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count:
            raise ValueError(f"{key} of {len(values)} layers, not {count}")
        return list(map(int, values))
