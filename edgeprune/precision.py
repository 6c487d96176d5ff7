"""The precisions, weight formats and cache formats by name: what each takes, which GPUs compute in it, its names in
libraries.

Everybody may import it, the device side too: Python 3.10, standard library only. A new precision is a new row here.
"""

from __future__ import annotations

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
class WeightFormat:
    """A way to store the matrix of a linear layer in few bits: whole numbers, of which each group shares a scale.

    group: inputs of an output that share a scale; None: all of them. asymmetric: a group has the code of 0.0 as well.
    activation_bits: of what the layer reads, which is then rounded too, by one scale for all that is fixed beforehand;
    None: floats.
    """

    name: str
    bits: int
    group: int | None = None
    asymmetric: bool = False
    activation_bits: int | None = None

    @property
    def least(self) -> int:
        """Returns the least code; that of 8 bits is the negative of the largest, which engines ask for."""
        return -(2 ** (self.bits - 1)) + (self.bits == 8)

    @property
    def most(self) -> int:
        """Returns the largest code."""
        return 2 ** (self.bits - 1) - 1

    def groups_of(self, in_features: int) -> int:
        """Returns the groups of an output of so many inputs. Raises InputError where they do not divide them."""
        if in_features % (self.group or 1):
            raise InputError(
                f"{self.name} has groups of {self.group}, which do not divide {in_features} inputs",
                f"Use widths in multiples of {self.group}, or another format.",
            )
        return in_features // self.group if self.group else 1

    def stored_bytes(self, out_features: int, in_features: int, scale_bytes: int = 2) -> int:
        """Returns the bytes of a matrix: its codes, and for each group a scale and the zero."""
        groups = out_features * self.groups_of(in_features)
        bits = self.bits * (out_features * in_features + groups * self.asymmetric) + 8 * scale_bytes * groups
        return -(-bits // 8)


WEIGHT_FORMATS = {
    form.name: form
    for form in (
        WeightFormat("int8", 8),
        WeightFormat("w8a8", 8, activation_bits=8),
        *(WeightFormat(f"int4-{group}", 4, group) for group in (32, 64, 128)),
        WeightFormat("int4-32-asymmetric", 4, 32, asymmetric=True),
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
