"""What llama.cpp makes of weights: its own quantiser, and which type its recipes give every matrix.

The quantiser is ggml's, out of the library that the package `xllamacpp` brings, so that a comparison is with the code
that everybody runs. The recipes are those of llama-quantize (src/llama-quant.cpp) for a dense Llama.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.errors import InputError

FALLBACKS = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # of rows that 256 does not divide
RECIPES = ("Q3_K_M", "Q4_K_M")


@functools.cache
def _library() -> ctypes.CDLL:
    found = find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise InputError("llama.cpp's quantiser is not installed", "Run: pip install xllamacpp")
    library = ctypes.CDLL(str(next(Path(found.origin).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def blocks_of(weight: np.ndarray, importance: np.ndarray, type_name: str) -> np.ndarray:
    """Returns the bytes (out_features, any) uint8 of a weight (out_features, in_features) fp32 in a type of ggml.

    importance: (in_features,) fp32, the mean squares of the inputs: what llama.cpp calls an imatrix. in_features:
    a multiple of the type's block.
    """
    form = gguf.GGMLQuantizationType[type_name]
    size, width = gguf.GGML_QUANT_SIZES[form]
    rows, columns = weight.shape
    if columns % size:
        raise ValueError(f"blocks of {size} do not divide {columns} inputs")
    weight, importance = (np.ascontiguousarray(array, dtype=np.float32) for array in (weight, importance))
    blocks = np.empty((rows, columns // size * width), dtype=np.uint8)
    written = _library().ggml_quantize_chunk(
        form, weight.ctypes.data, blocks.ctypes.data, 0, rows, columns, importance.ctypes.data
    )
    if written != blocks.nbytes:
        raise ValueError(f"ggml wrote {written} bytes of {blocks.nbytes}")
    return blocks


def rounded_by_ggml(weight: torch.Tensor, importance: torch.Tensor, type_name: str) -> torch.Tensor:
    """Returns a weight (out_features, in_features) fp32 as llama.cpp rounds it to a type of ggml.

    importance: (in_features,). Rows that the blocks do not divide are filled up with zeros, and cut again.
    """
    form = gguf.GGMLQuantizationType[type_name]
    columns = weight.shape[1]
    missing = -columns % gguf.GGML_QUANT_SIZES[form][0]
    blocks = blocks_of(F.pad(weight, (0, missing)).numpy(), F.pad(importance.float(), (0, missing)).numpy(), type_name)
    return torch.from_numpy(gguf.dequantize(blocks, form))[:, :columns].contiguous()


def bits_of(type_name: str) -> float:
    """Returns the bits of a weight in a type of ggml."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return 8 * width / size


def recipe(name: str, layers: int, shapes: Sequence[tuple[str, int]]) -> list[dict[str, str]]:
    """Returns the types that a recipe gives to the matrices of every layer, by their names.

    shapes: the name and the inputs of every matrix of a layer. `v` and `down` get more bits than the others, in
    Q4_K_M those of the first and the last eighth of the layers and of every third between them.
    """
    return [
        {matrix: _fitting(_recipe_type(name, matrix, index, layers), inputs) for matrix, inputs in shapes}
        for index in range(layers)
    ]


def _recipe_type(name: str, matrix: str, index: int, layers: int) -> str:
    part = matrix.rpartition(".")[2]
    if name == "Q4_K_M":
        eighth = layers // 8
        has_more = index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2
        return "Q6_K" if part in ("v", "down") and has_more else "Q4_K"
    first = {"v": 2, "down": layers // 16}  # layers that get still more
    if part in first:
        return "Q5_K" if index < first[part] else "Q4_K"
    return "Q4_K" if part == "o" else "Q3_K"


def _fitting(type_name: str, inputs: int) -> str:
    """Returns the type that takes the place of one whose blocks do not divide so many inputs."""
    size, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return FALLBACKS[type_name] if inputs % size else type_name
