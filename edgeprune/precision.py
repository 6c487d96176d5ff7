"""The precisions, weight formats and cache formats by name: what each takes, which GPUs compute in it, its names in
libraries.

Everybody may import it, the device side too: Python 3.10, standard library only. A new precision is a new row here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edgeprune.errors import InputError

GraphPrecision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Precision:
    """One precision of activations, KV cache and all weights that have no format of their own.

    tolerance: of an engine's logits against those of the fp32 graph, as the least cosine and the largest
    max|a - b| / max|b| at any position. numpy_dtype, torch_dtype, onnx_type:
    its name in these libraries.
    """

    element_bytes: int
    logit_bytes: int
    compute: Literal["fp32_compute", "fp16_compute"]  # the profile's figure that its products run at
    least_sm: int | None = None  # GPUs before it, and ONNX Runtime on a processor, compute no product in it
    tolerance: tuple[float, float] | None = None
    numpy_dtype: str = ""
    torch_dtype: str = ""
    onnx_type: str = ""


PRECISIONS: dict[str, Precision] = {
    # The tolerance of fp32 leaves room for TensorRT's TF32 products.
    "fp32": Precision(
        4, 4, "fp32_compute", tolerance=(0.9999, 0.01), numpy_dtype="float32", torch_dtype="float32", onnx_type="FLOAT"
    ),
    "fp16": Precision(
        2,
        2,
        "fp16_compute",
        tolerance=(0.9995, 0.03),
        numpy_dtype="float16",
        torch_dtype="float16",
        onnx_type="FLOAT16",
    ),
    # GPUs before Ampere have none. Graphs cast its logits to fp32. numpy has no such type: its bits.
    "bf16": Precision(
        2,
        4,
        "fp16_compute",
        least_sm=80,
        tolerance=(0.99, 0.1),
        numpy_dtype="uint16",
        torch_dtype="bfloat16",
        onnx_type="BFLOAT16",
    ),
}


@dataclass(frozen=True)
class ScaleBlock:
    """A way to store scales in few bits: those of a block's groups, and the offsets, are whole numbers of a unit.

    inputs: of an output that share a unit in fp16, and another one for the offsets; bits: of a scale, and of an offset;
    signed: a scale may be negative; an offset never is, and is taken away.
    """

    inputs: int
    bits: int
    signed: bool

    @property
    def levels(self) -> Levels:
        """Returns that these are whole numbers."""
        return "whole"

    @property
    def least(self) -> int:
        """Returns the least scale in units."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def most(self) -> int:
        """Returns the largest scale in units."""
        return 2 ** (self.bits - self.signed) - 1


Offset = Literal["zero", "minimum"]
Storage = Literal["packed", "floats", "gguf", "offset"]
Levels = Literal["whole", "e4m3", "e2m1"]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the levels that are not negative, by their bits
LARGEST_LEVEL: dict[Levels, int] = {"e4m3": 448, "e2m1": 6}


@dataclass(frozen=True)
class WeightFormat:
    """A way to store the matrix of a linear layer in few bits: levels, of which each group shares a scale.

    levels: whole numbers, which are codes themselves, or floats of 8 or 4 bits by their exponent and mantissa, whose
    bits are the codes.
    group: inputs of an output that share a scale; None: all of them. offset: what a group has beside its scale: the
    code of 0.0, `zero`, or the number that the code 0 stands for, `minimum`; None: 0 stands for 0.0. unsigned: codes
    are from 0 on. block: how scales are stored in few bits; None: as floats. signed_scales: they may be negative, so
    that the largest weight of a group can have the least code. activation_bits: of what the layer reads, which is then
    rounded to such levels too, by one scale for all that is fixed beforehand; None: floats. e4m3_scales: scales are
    numbers of e4m3 times one unit of the matrix; so are those of what it reads, of which each group of a token's has
    its own, found when it is read, and the unit is fixed. storage: what a checkpoint holds it in.
    """

    name: str
    bits: int
    group: int | None = None
    offset: Offset | None = None
    unsigned: bool = False
    block: ScaleBlock | None = None
    signed_scales: bool = False
    activation_bits: int | None = None
    levels: Levels = "whole"
    e4m3_scales: bool = False
    storage: Storage = "packed"

    @property
    def least(self) -> int:
        """Returns the least level; that of 8 bits is the negative of the largest, which engines ask for."""
        if self.levels != "whole":
            return -self.most
        return 0 if self.unsigned else -(2 ** (self.bits - 1)) + (self.bits == 8)

    @property
    def most(self) -> int:
        """Returns the largest level."""
        if self.levels != "whole":
            return LARGEST_LEVEL[self.levels]
        return 2 ** (self.bits - (not self.unsigned)) - 1

    @property
    def multiple(self) -> int:
        """Returns what the inputs of a matrix have to be a multiple of."""
        return self.block.inputs if self.block else self.group or 1

    @property
    def weight_bits(self) -> float:
        """Returns the bits of a weight with its share of what its group has beside the codes, in floats of 16 bits;
        without the scale of a whole output."""
        return self.bits + (self._group_bits(2) / self.group if self.group else 0.0)

    @property
    def activations(self) -> str:
        """Returns what is read is rounded to, in words."""
        return f"{'' if self.levels == 'whole' else 'floats of '}{self.activation_bits} bits"

    def groups_of(self, in_features: int) -> int:
        """Returns the groups of an output of so many inputs. Raises InputError where they do not divide them."""
        if in_features % self.multiple:
            raise InputError(
                f"{self.name} has groups of {self.multiple}, which do not divide {in_features} inputs",
                f"Use widths in multiples of {self.multiple}, or another format.",
            )
        return in_features // self.group if self.group else 1

    def stored_bytes(self, out_features: int, in_features: int, scale_bytes: int = 2) -> int:
        """Returns the bytes of a matrix: its codes, and for each group a scale and what it has beside.

        scale_bytes: of a scale in the engine's floats; a block of ggml has its own, and so have scales of e4m3.
        """
        groups, weights = out_features * self.groups_of(in_features), out_features * in_features
        return math.ceil((self.bits * weights + groups * self._group_bits(scale_bytes)) / 8)

    def _group_bits(self, scale_bytes: int) -> float:
        """Returns the bits that a group has beside its codes: a share of them where a block has some in common."""
        if self.block is not None:
            numbers = 1 + (self.offset is not None)
            return numbers * (self.block.bits + 16 * self.group / self.block.inputs)
        number = 8 if self.e4m3_scales else 16 if self.storage == "gguf" else 8 * scale_bytes
        return number + {None: 0, "zero": self.bits, "minimum": number}[self.offset]


def _of_gguf(
    name: str, bits: int, group: int, block: ScaleBlock | None = None, has_minimum: bool = False
) -> WeightFormat:
    """Returns a format that is one of ggml's types of blocks."""
    is_signed = not has_minimum and block is None and bits < 8
    offset: Offset | None = "minimum" if has_minimum else None
    return WeightFormat(name, bits, group, offset, has_minimum, block, is_signed, storage="gguf")


WEIGHT_FORMATS = {
    form.name: form
    for form in (
        WeightFormat("int8", 8),
        WeightFormat("w8a8", 8, activation_bits=8),
        WeightFormat("fp8", 8, activation_bits=8, levels="e4m3", storage="floats"),
        WeightFormat("nvfp4", 4, 16, activation_bits=4, levels="e2m1", e4m3_scales=True, storage="floats"),
        *(WeightFormat(f"int4-{group}", 4, group) for group in (32, 64, 128)),
        WeightFormat("int4-32-asymmetric", 4, 32, offset="zero"),
        WeightFormat("int4-offset", 4, 64, offset="minimum", storage="offset"),
        _of_gguf("q3_k", 3, 16, ScaleBlock(256, 6, signed=True)),
        _of_gguf("q4_0", 4, 32),
        _of_gguf("q4_1", 4, 32, has_minimum=True),
        _of_gguf("q4_k", 4, 32, ScaleBlock(256, 6, signed=False), has_minimum=True),
        _of_gguf("q5_0", 5, 32),
        _of_gguf("q5_1", 5, 32, has_minimum=True),
        _of_gguf("q5_k", 5, 32, ScaleBlock(256, 6, signed=False), has_minimum=True),
        _of_gguf("q6_k", 6, 16, ScaleBlock(256, 8, signed=True)),
        _of_gguf("q8_0", 8, 32),
    )
}


@dataclass(frozen=True)
class CacheFormat:
    """A way to store keys and values in codes of 8 bits; a scale belongs to each channel of a key/value head.

    least, most: the codes that there are, beyond which values are cut off; least_sm: GPUs before it have no such type;
    onnx_type, torch_dtype: of the codes, in these libraries.
    """

    name: str
    least: float
    most: float
    least_sm: int
    onnx_type: str
    torch_dtype: str
    element_bytes: int = 1


CACHE_FORMATS = {
    form.name: form
    for form in (
        CacheFormat("int8", -128.0, 127.0, 75, "INT8", "int8"),
        CacheFormat("fp8", -448.0, 448.0, 89, "FLOAT8E4M3FN", "float8_e4m3fn"),
    )
}
