"""What stands in a GGUF file: its metadata and where its tensors lie. It knows no architecture.

Layout (the GGUF specification of ggml, versions 2 and 3, little-endian): magic, version, counts,
key/value pairs, tensor descriptions, padding, data. Read here because the `gguf` package's reader
makes a numpy view of every string: seconds for a vocabulary that takes a tenth of one.
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
from edgeprune.model.gguf.names import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

RESTORE = "Download the file again, or give the original Hugging Face directory."
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
    """shape: as torch says it, (out_features, in_features). data: the rows' bytes as stored, a view of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: np.ndarray

    def values(self) -> np.ndarray:
        """Dequantised, `shape`, fp32; a view of the file where it stores fp32.

        Raises InputError for a type that the gguf package cannot dequantise.
        """
        return self._dequantised(self.data).reshape(self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows of a vector or matrix, those of stacked matrices numbered through; else as `values`."""
        if len(self.shape) == 1:
            return self.values()[start:stop]
        return self._dequantised(self.data.reshape(-1, self.data.shape[-1])[start:stop])

    def _dequantised(self, data: np.ndarray) -> np.ndarray:
        from gguf.quants import dequantize

        try:
            return dequantize(data, self.type)
        except NotImplementedError as error:
            raise InputError(f"tensor {self.name} of type {self.type.name}: {error}", RESTORE) from None


@dataclass(frozen=True)
class GgufFile:
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


@dataclass
class _Cursor:
    """A place in the file's bytes that moves on as values are read."""

    data: mmap.mmap
    position: int = 0

    def bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, {end} were expected")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self.bytes(struct.calcsize(layout)))
        return value

    def string(self) -> str:
        return self.bytes(self.number("<Q")).decode("utf-8")

    def value(self, kind: int, nesting: int = 0) -> Any:
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
    """Metadata and tensors of a GGUF file; the data stays in the file. Raises InputError."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is no GGUF file", RESTORE)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _read(data)
    except (ValueError, struct.error) as error:
        raise InputError(f"{path} is damaged or truncated: {error}", RESTORE) from None


def _read(data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data, len(b"GGUF"))
    if (version := cursor.number("<I")) not in VERSIONS:
        raise ValueError(f"GGUF version {version} (2 and 3 are supported, little-endian)")
    tensor_count, field_count = cursor.number("<Q"), cursor.number("<Q")
    fields = {}
    for _ in range(field_count):
        name = cursor.string()
        fields[name] = cursor.value(cursor.number("<I"))
    places = [_place(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return GgufFile(fields, {place[0]: _tensor(data, start, *place) for place in places})


def _place(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of one tensor; GGUF stores the innermost size first."""
    name, dimensions = cursor.string(), cursor.number("<I")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))
    return name, shape[::-1], cursor.number("<I"), cursor.number("<Q")


def _tensor(data: mmap.mmap, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    dtype = GGMLQuantizationType(kind)
    stored = quant_shape_to_byte_shape(shape or (1,), dtype)
    end = start + offset + prod(stored)
    if end > len(data):
        raise ValueError(f"tensor {name} ends at byte {end}, the file has {len(data)}")
    values = np.frombuffer(data, np.uint8, prod(stored), start + offset).reshape(stored)
    return GgufTensor(name, shape, dtype, values)


@dataclass(frozen=True)
class Metadata:
    """fields: the file's key/value pairs; names: of its tensors; factors: its tensors of rope factors by name."""

    fields: Mapping[str, Any]
    names: Collection[str]
    factors: Mapping[str, np.ndarray]

    @property
    def architecture(self) -> Architecture:
        """Raises InputError that names an architecture that is not supported, and those that are."""
        name = self.fields.get("general.architecture")
        if name not in ARCHITECTURES:
            raise InputError(f"unsupported GGUF architecture {name!r}", f"Supported are: {', '.join(ARCHITECTURES)}.")
        return ARCHITECTURES[name]

    def get(self, key: str, default: Any = None) -> Any:
        """A field of the architecture's own."""
        return self.fields.get(f"{self.architecture.name}.{key}", default)

    def number(self, key: str) -> int:
        """An integer, of one that is given for each layer the one of all. Raises KeyError, TypeError, ValueError."""
        value = self.fields[f"{self.architecture.name}.{key}"]
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(f"{key} {value} differs between layers")
            value = value[0]
        return int(value)
